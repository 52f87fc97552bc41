"""A run that was killed, wherever that was, and resumed ends bit for bit where an uninterrupted one ends."""

from __future__ import annotations

import json

import pytest
import torch
from everyday import full_but
from finetune_setup import Killed, run, save_bert, sentences, write_tsv
from safetensors.torch import load_file
from transformers import Trainer

from mos_kernels.finetune import results
from mos_kernels.run_report.log import TRAINER_STATE


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The arguments of a run of 8 steps, 4 an epoch, with a checkpoint every 3 steps."""
    folder = tmp_path_factory.mktemp("resume")
    rows = write_tsv(folder / "train.tsv", sentences(40)), write_tsv(folder / "test.tsv", sentences(10, seed=1))
    source = ("--model", save_bert(folder / "bert"), "--train-file", rows[0], "--eval-file", rows[1])
    columns = ("--text-column", "sentence", "--label-column", "label")
    rhythm = (
        "--batch-size",
        5,
        "--gradient-accumulation",
        2,
        "--epochs",
        2,
        "--eval-steps",
        3,
        "--logging-steps",
        1,
    )
    return (*source, *columns, *rhythm, "--learning-rate", 1e-2, "--lora-dropout", 0.1, "--r", 2)


@pytest.fixture(scope="module")
def uninterrupted(base, tmp_path_factory):
    outputs = {method: tmp_path_factory.mktemp("whole") / method for method in ("mos", "lora")}
    for method, output in outputs.items():
        assert run(*base, "--method", method, "--output", output) == 0
    return outputs


def weights(output):
    return load_file(output / "adapter" / "adapter_model.safetensors")


def entries(output):
    untimed = (
        "seconds",
        "eval_model_preparation_time",
        "eval_runtime",
        "eval_samples_per_second",
        "eval_steps_per_second",
    )
    lines = (json.loads(line) for line in (output / "log.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in untimed} for line in lines]


def assert_same_run(output, reference):
    for name, tensor in weights(reference).items():
        assert torch.equal(weights(output)[name], tensor), name
    assert entries(output) == entries(reference)
    assert json.loads((output / "metrics.json").read_text())["steps"] == 8


def kill_at_call(monkeypatch, owner, name, call, before):
    """Raise `Killed` at a call of a method: before it does its work, or after."""
    original, calls = getattr(owner, name), [0]

    def wrapper(*args, **kwargs):
        calls[0] += 1
        if calls[0] == call and before:
            raise Killed
        result = original(*args, **kwargs)
        if calls[0] == call:
            raise Killed
        return result

    monkeypatch.setattr(owner, name, wrapper)


KILLS = {
    "before the first checkpoint": ("mos", Trainer, "training_step", 4, True),
    "between two checkpoints": ("mos", Trainer, "training_step", 10, False),
    "with the weights of the first checkpoint written": ("mos", Trainer, "_save", 1, False),
    "before the optimizer of the second is written": ("mos", Trainer, "_save_optimizer_and_scheduler", 2, True),
    "before the second's random state is written": ("lora", Trainer, "_save_rng_state", 2, True),
    "after the last checkpoint": ("mos", Trainer, "_save_checkpoint", 3, False),
    "while the results are written": ("mos", results, "_predictions", 1, True),
}


EVERYDAY = ("with the weights of the first checkpoint written", "after the last checkpoint")


@pytest.mark.parametrize("when", full_but(EVERYDAY, KILLS))
@pytest.mark.budget(15)
def test_resume_equals_uninterrupted(when, base, uninterrupted, tmp_path, monkeypatch):
    method, *kill = KILLS[when]
    arguments = (*base, "--method", method, "--output", tmp_path / "out")
    with monkeypatch.context() as patched, pytest.raises(Killed):
        kill_at_call(patched, *kill)
        run(*arguments)
    assert not (tmp_path / "out" / "metrics.json").exists()
    assert run(*arguments, "--resume") == 0
    assert_same_run(tmp_path / "out", uninterrupted[method])


@pytest.mark.full
def test_a_state_file_that_was_cut_off_is_no_checkpoint(base, uninterrupted, tmp_path, monkeypatch):
    arguments = (*base, "--output", tmp_path / "out")
    with monkeypatch.context() as patched, pytest.raises(Killed):
        kill_at_call(patched, results, "_predictions", 1, True)
        run(*arguments)
    state = max((tmp_path / "out").glob("checkpoint-*"), key=lambda path: int(path.name[11:])) / TRAINER_STATE
    state.write_text(state.read_text()[:100])
    with open(tmp_path / "out" / "log.jsonl", "a") as log:
        log.write('{"step": 9, "lo')
    assert run(*arguments, "--resume") == 0
    assert_same_run(tmp_path / "out", uninterrupted["mos"])


@pytest.mark.parametrize("damage, message", [("adapter_model.safetensors", "header"), ("optimizer.pt", "no optimizer")])
@pytest.mark.budget(10)
def test_a_checkpoint_that_is_damaged_is_said(damage, message, base, tmp_path, monkeypatch, capsys):
    arguments = (*base, "--output", tmp_path / "out")
    with monkeypatch.context() as patched, pytest.raises(Killed):
        kill_at_call(patched, Trainer, "_save_checkpoint", 1, False)
        run(*arguments)
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    if damage == "optimizer.pt":
        (checkpoint / damage).unlink()
    else:
        (checkpoint / damage).write_bytes((checkpoint / damage).read_bytes()[:50])
    assert run(*arguments, "--resume") == 2
    said = capsys.readouterr().err
    assert f"--resume: {checkpoint} is no checkpoint to go on from" in said and message in said
    assert checkpoint.is_dir() and not (tmp_path / "out" / "metrics.json").exists()


def test_resume_without_a_run_starts_one(base, uninterrupted, tmp_path):
    assert run(*base, "--output", tmp_path / "out", "--resume") == 0
    assert_same_run(tmp_path / "out", uninterrupted["mos"])


def test_a_complete_run_is_left_alone(base, uninterrupted, capsys):
    before = {path: path.stat().st_mtime_ns for path in uninterrupted["mos"].rglob("*")}
    assert run(*base, "--output", uninterrupted["mos"], "--resume") == 0
    assert "nothing to resume" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in uninterrupted["mos"].rglob("*")}


def test_resume_with_other_settings_is_refused(base, uninterrupted, tmp_path, capsys):
    out = uninterrupted["mos"]
    assert run(*base, "--output", out, "--resume", "--learning-rate", 1e-3, "--r", 4) == 2
    error = capsys.readouterr().err
    assert "the settings differ: learning_rate was 0.01, is 0.001; r was 2, is 4. Give" in error
    assert run(*base, "--output", out, "--resume", "--method", "lora") == 2
    assert "differ: method was 'mos', is 'lora'. Give" in capsys.readouterr().err
    assert run(*base, "--output", out, "--resume", "--overwrite") == 2
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("")
    assert run(*base, "--output", tmp_path / "other", "--resume") == 2
    assert "holds no run" in capsys.readouterr().err


def test_an_interrupt_says_how_to_go_on(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Trainer, "training_step", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run(*base, "--output", tmp_path / "out") == 130
    assert "--resume" in capsys.readouterr().err


def test_old_checkpoints_are_removed(uninterrupted):
    assert sorted(path.name for path in uninterrupted["mos"].glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-8"]
