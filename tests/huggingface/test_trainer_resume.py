"""A Trainer killed by SIGKILL, wherever that was, goes on from its last complete checkpoint to the same model."""

import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import MATRIX, batch, mos, tiny
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from mos_kernels.huggingface import MoSCallback, apply_mos, last_complete_checkpoint
from mos_kernels.huggingface.modules import adapter_parameters
from mos_kernels.run_report.log import HISTORY, complete_lines

STEPS, SAVES = 8, (3, 6)
KILLS = ("in mid-training", "with the weights of the second checkpoint written", "while its state is written")


def trainer_in(folder, callbacks=(), family="llama"):
    """8 steps with dropout, accumulation and AdamW, over more than one epoch, with a checkpoint every 3."""
    torch.manual_seed(0)
    model = tiny(family, torch.float32)
    apply_mos(model, mos(model, lora_dropout=0.2, router_aux_loss_coef=0.1))
    tokens = [batch(family, i, i % 2 + 1, 6) for i in range(22)]
    samples = [{name: values[-1] for name, values in sample.items()} for sample in tokens]
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=STEPS,
        save_steps=3, logging_steps=1, learning_rate=1e-2, use_cpu=True, report_to=[], disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=samples, callbacks=list(callbacks))
    MoSCallback.add_to(trainer)
    return trainer


def run_and_be_killed(folder, when):
    """For a process of its own."""

    def die(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    class AtStep(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            if when == KILLS[0] and state.global_step == 4:
                die()

    def before_second(owner, name, call):
        original, calls = getattr(owner, name), []

        def wrapper(*args):
            calls.append(1)
            return call(*args) if len(calls) == 2 else original(*args)

        setattr(owner, name, wrapper)

    def half_a_state(state, path):
        text = json.dumps(vars(state), default=str)
        Path(path).write_text(text[: len(text) // 2])
        die()

    if when == KILLS[1]:
        before_second(Trainer, "_save_optimizer_and_scheduler", die)
    elif when == KILLS[2]:
        before_second(TrainerState, "save_to_json", half_a_state)
    trainer_in(folder, [AtStep()]).train()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The trainer of a family's whole run."""

    @functools.cache
    def run(family):
        trainer = trainer_in(tmp_path_factory.mktemp("whole"), family=family)
        trainer.train()
        return trainer

    return run


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A folder for each of KILLS. One process imports everything and forks a child for each."""
    folders = {when: tmp_path_factory.mktemp("killed") for when in KILLS}
    code = "import json, os, sys; sys.path[:0] = json.loads(sys.argv[1]); import test_trainer_resume as test\n"
    code += "for when, folder in json.loads(sys.argv[2]).items():\n    child = os.fork()\n    if child == 0:\n"
    code += (
        "        test.run_and_be_killed(folder, when); os._exit(0)\n    print(os.waitpid(child, 0)[1], flush=True)\n"
    )
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    arguments = [json.dumps(paths), json.dumps({when: str(folder) for when, folder in folders.items()})]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300, env=environment
    )
    statuses = [int(line) for line in ended.stdout.splitlines() if line.isdecimal()]
    assert statuses == [signal.SIGKILL] * len(KILLS), ended.stderr[-3000:]
    return folders


def state_of(trainer):
    optimizer = trainer.optimizer.state_dict()["state"]
    return adapter_parameters(trainer.model), [t for s in optimizer.values() for t in s.values()]


def assert_same(resumed, whole):
    """Parameters and optimizer bit for bit, and the same logs and history."""
    (ours, optimizer), (theirs, other) = state_of(resumed), state_of(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert len(optimizer) == len(other) > 0 and all(map(torch.equal, optimizer, other))
    histories = [complete_lines(Path(t.args.output_dir) / HISTORY) for t in (resumed, whole)]
    assert histories[0] == histories[1]
    callbacks = [next(c for c in t.callback_handler.callbacks if isinstance(c, MoSCallback)) for t in (resumed, whole)]
    assert callbacks[0].history == callbacks[1].history
    assert [entry["step"] for entry in callbacks[0].history] == list(range(1, STEPS + 1))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the killed runs are forked, and this system has no fork")
@pytest.mark.parametrize(("when", "goes_on_from"), [(when, 3) for when in KILLS])
def test_killed_and_resumed_equals_uninterrupted(when, goes_on_from, killed, uninterrupted):
    """On a Llama alone: what a killed process leaves does not depend on the model."""
    folder = killed[when]
    there = sorted(path.name for path in folder.glob("checkpoint-*"))
    assert there == (["checkpoint-3"] if when == KILLS[0] else ["checkpoint-3", "checkpoint-6"])
    checkpoint = last_complete_checkpoint(folder)
    assert checkpoint == folder / f"checkpoint-{goes_on_from}"
    resumed = trainer_in(folder)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same(resumed, uninterrupted("llama"))


@pytest.mark.parametrize("family", MATRIX)
def test_resumed_from_a_later_checkpoint(family, uninterrupted, tmp_path):
    whole = uninterrupted(family)
    source = Path(whole.args.output_dir)
    (tmp_path / HISTORY).write_text((source / HISTORY).read_text())
    resumed = trainer_in(tmp_path, family=family)
    resumed.train(resume_from_checkpoint=str(source / "checkpoint-6"))
    assert_same(resumed, whole)


def test_a_folder_without_a_complete_checkpoint(tmp_path):
    (tmp_path / "checkpoint-2").mkdir()
    assert last_complete_checkpoint(tmp_path) is None


def test_a_folder_that_is_not_there_is_said(tmp_path):
    with pytest.warns(UserWarning, match="nowhere is no folder"):
        assert last_complete_checkpoint(tmp_path / "nowhere") is None
