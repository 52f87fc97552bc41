"""mos_param_groups, MoSCallback in transformers' Trainer, routing_report."""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from balance import adapted as in_float32
from balance import assert_injected, balance_gradients, batches_seen, values
from tiny_models import MATRIX, VOCABULARY, ffn_of, ids, layers_of, mos, tiny
from torch.testing import assert_close
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import WandbCallback

from mos_kernels import routing
from mos_kernels.huggingface import (
    MoSCallback,
    apply_mos,
    load_adapter,
    mos_param_groups,
    routing_report,
    save_adapter,
)
from mos_kernels.huggingface.balance import set_factor
from mos_kernels.huggingface.modules import adapter_parameters, router_owners

SAMPLE = {"input_ids": ids(batch=1, length=6)[0], "labels": ids(batch=1, length=6)[0]}
SAMPLE["labels"][0] = -100  # the first label is never predicted, and the Trainer of transformers 5.0 counts it
every_family = pytest.mark.parametrize("family", MATRIX)


def sample_for(family):
    return {**SAMPLE, "labels": torch.tensor(1)} if family == "bert" else SAMPLE


def adapted(family="llama", dtype=torch.float32, **options):
    model = tiny(family, dtype)
    apply_mos(model, mos(model, **{"router_aux_loss_coef": 5.0, **options}))
    if family == "bert":  # takes num_items_in_batch and leaves it unused: Trainer must do the dividing
        model.accepts_loss_kwargs = False
    return model


def trainer_for(model, folder, samples, callbacks=(), lr=0.5, eval_samples=None, report_to_folder=None, **options):
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=1, use_cpu=True, max_grad_norm=0.0, report_to=[],
        disable_tqdm=True, lr_scheduler_type="constant", save_strategy=options.pop("save_strategy", "no"),
        logging_steps=options.pop("logging_steps", 1), num_train_epochs=options.pop("num_train_epochs", 1), **options,
    )  # fmt: skip
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    if report_to_folder is not None:
        from torch.utils.tensorboard import SummaryWriter
        from transformers.integrations import TensorBoardCallback

        callbacks = [*callbacks, TensorBoardCallback(SummaryWriter(str(report_to_folder)))]
    return Trainer(
        model, arguments, train_dataset=samples, eval_dataset=eval_samples, callbacks=list(callbacks),
        optimizers=(optimizer, None),
    )  # fmt: skip


def hooks(model):
    return {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()}


def trained(folder, samples, callback=True, family="llama", **options):
    """The adapter after training with plain SGD, which shows every factor on a gradient."""
    model = adapted(family)
    trainer_for(model, folder, samples, [MoSCallback()] if callback else [], **options).train()
    return {name: p.detach().clone() for name, p in adapter_parameters(model).items()}, model


@every_family
@pytest.mark.parametrize("accumulation", [2, 4])
@pytest.mark.budget(7)
@pytest.mark.one_at_a_time("accumulation", "family")
def test_accumulated_gradients_equal_that_of_one_batch(tmp_path, accumulation, family):
    samples, options = [sample_for(family)] * accumulation, {"gradient_accumulation_steps": accumulation}
    single, _ = trained(tmp_path, samples[:1], family=family)
    accumulated, _ = trained(tmp_path, samples, family=family, **options)
    assert_close(accumulated, single, rtol=1e-5, atol=1e-6)
    without, _ = trained(tmp_path, samples, False, family, **options)
    router = next(name for name in single if "mos_router" in name)
    assert not torch.allclose(without[router], single[router], rtol=1e-3)


def test_the_single_batch_gradient_is_that_of_loss_and_load_balancing(tmp_path):
    after, _ = trained(tmp_path, [SAMPLE])
    model, terms = adapted(router_aux_loss_coef=0.0), []

    def measure(owner, args, output):
        logits = torch.nn.functional.linear(args[0], owner.weight).flatten(0, -2)
        terms.append(routing.load_balancing_loss(logits, owner.config.num_experts_per_tok))

    for owner in router_owners(model).values():
        owner.register_forward_hook(measure)
    model.train()
    loss = model(**{key: value.unsqueeze(0) for key, value in SAMPLE.items()}).loss
    (loss + 5.0 * sum(terms) / len(terms)).backward()
    expected = {name: p.detach() - 0.5 * p.grad for name, p in adapter_parameters(model).items()}
    assert_close(after, expected, rtol=1e-5, atol=1e-6)


@every_family
@pytest.mark.budget(9)
def test_a_shorter_last_group_of_an_epoch_counts_its_own_steps(tmp_path, family):
    sample, of = sample_for(family), {"family": family}
    two_steps, _ = trained(tmp_path, [sample] * 2, **of)
    remainder, _ = trained(tmp_path, [sample] * 5, gradient_accumulation_steps=4, **of)
    assert_close(remainder, two_steps, rtol=1e-5, atol=1e-6)
    four_steps, _ = trained(tmp_path, [sample] * 2, num_train_epochs=2, **of)
    remainder, _ = trained(tmp_path, [sample] * 3, gradient_accumulation_steps=2, num_train_epochs=2, **of)
    assert_close(remainder, four_steps, rtol=1e-5, atol=1e-6)


def ragged(count):
    """Samples of other lengths, and with other numbers of tokens that have a loss, each."""
    samples = []
    for i in range(count):
        tokens = ids(i, 1, 4 + 3 * (i % 3))[0]
        samples.append({"input_ids": tokens, "labels": tokens.clone().index_fill_(0, torch.arange(i % 4), -100)})
    return samples


def pad(samples):
    def padded(name, value):
        return torch.nn.utils.rnn.pad_sequence([s[name] for s in samples], batch_first=True, padding_value=value)

    tokens = padded("input_ids", 0)
    return {"input_ids": tokens, "attention_mask": (tokens != 0).long(), "labels": padded("labels", -100)}


@pytest.mark.parametrize(
    ("accumulation", "use_reentrant", "bf16"),
    [(1, None, False), (2, False, False), (4, True, False), (2, True, True), (4, False, True)],
)
@every_family
@pytest.mark.one_at_a_time("accumulation", "family")
def test_the_injected_gradient_in_padded_batches(tmp_path, accumulation, use_reentrant, bf16, family):
    """Averaged over a step's batches, however many tokens with a loss Trainer divides the rest by."""
    samples = ragged(3 * accumulation)
    if family == "bert":
        samples = [{**sample, "labels": torch.tensor([i % 2])} for i, sample in enumerate(samples)]
    after = []
    for coefficient in (5.0, 0.0):
        model = in_float32(coefficient, family)
        seen = batches_seen(model)
        trainer = trainer_for(
            model, tmp_path, samples, [MoSCallback()], gradient_accumulation_steps=accumulation, bf16=bf16,
            gradient_checkpointing=use_reentrant is not None,
            gradient_checkpointing_kwargs=None if use_reentrant is None else {"use_reentrant": use_reentrant},
        )  # fmt: skip
        trainer.args.per_device_train_batch_size = trainer._train_batch_size = 3
        trainer.data_collator = pad
        trainer.train()
        assert trainer.state.global_step == 1 and len(seen) == accumulation
        after.append(values(model))
    expected = balance_gradients([{k: b[k] for k in ("input_ids", "attention_mask")} for b in seen], bf16, family)
    assert_injected(*after, expected, lr=0.5, bf16=bf16)


class Watch(TrainerCallback):
    """The weights of the load-balancing gradient at the end of each step, and the keys that a reporter would see."""

    def __init__(self):
        self.weights, self.logged = {}, {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.weights[state.global_step] = [owner.mos_aux_weight.item() for owner in router_owners(model).values()]

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.logged[state.global_step] = set(logs)


@every_family
@pytest.mark.parametrize("ignore_data_skip", [False, True])
@pytest.mark.one_at_a_time("ignore_data_skip", "family")
def test_the_factors_are_right_after_resuming_within_an_epoch(tmp_path, ignore_data_skip, family):
    samples, count = [sample_for(family)] * 5, len(router_owners(adapted(family)))
    options = {"gradient_accumulation_steps": 2, "num_train_epochs": 3, "save_strategy": "steps", "save_steps": 1}
    watch = Watch()
    trainer_for(adapted(family), tmp_path, samples, [MoSCallback(), watch], **options).train()
    half, full = [5.0 / count / 2] * count, [5.0 / count] * count
    assert watch.weights == {step: full if step % 3 == 2 else half for step in range(9)}

    resumed = Watch()
    trainer = trainer_for(
        adapted(family), tmp_path, samples, [MoSCallback(), resumed], ignore_data_skip=ignore_data_skip, **options
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    shift = 1 if ignore_data_skip else 0  # then the epoch starts anew, and ends a step later
    assert resumed.weights
    for step, weights in resumed.weights.items():
        assert weights == (full if (step - shift) % 3 == 2 else half), step


@pytest.mark.parametrize("family", [*MATRIX, "gpt2"])
def test_the_fp16_scalers_scale_is_on_the_injected_gradient(family):
    # by three not where norms are float32 in a float64 model, in which a third is rounded
    model, callback, steps = adapted(family, torch.float64), MoSCallback(), 3 if family in ("gpt2", "bert") else 4
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    args = TrainingArguments(output_dir="unused", gradient_accumulation_steps=steps, use_cpu=True, logging_steps=100)
    state, control = SimpleNamespace(global_step=0, logging_steps=100, is_world_process_zero=False), None
    callback.on_train_begin(args, state, control, model=model)
    callback.on_epoch_begin(args, state, control, train_dataloader=[0] * 7)
    callback.on_step_begin(
        args, state, control, model=model, optimizer=SimpleNamespace(scaler=scaler), train_dataloader=[0] * 7
    )
    model.train()
    for _ in range(steps):
        scaler.scale(model(ids()).logits.square().mean() / steps).backward()
    scaled = {name: p.grad / 2**10 for name, p in adapter_parameters(model).items()}
    callback.on_train_end(args, state, control, model=model)
    model.zero_grad()
    model(ids()).logits.square().mean().backward()
    assert_close(scaled, {name: p.grad for name, p in adapter_parameters(model).items()}, rtol=1e-6, atol=1e-9)


@every_family
def test_logs_and_history(tmp_path, family):
    watch, model, sample = Watch(), adapted(family), sample_for(family)
    before = hooks(model)
    trainer = trainer_for(
        model, tmp_path, [sample] * 4, [watch], lr=0.01, logging_steps=2, num_train_epochs=2,
        eval_strategy="epoch", eval_samples=[sample],
    )  # fmt: skip
    callback = MoSCallback.add_to(trainer)
    assert MoSCallback.add_to(trainer) is callback and trainer.callback_handler.callbacks[0] is callback
    trainer.train()

    curved = ("hyperbolic", "spherical")
    expected = {f"mos/curvature/{space}_{kind}" for space in curved for kind in ("mean", "min", "max")}
    expected |= {f"mos/share/{space}" for space in ("hyperbolic", "spherical", "euclidean", "max")}
    expected |= {"mos/entropy", "mos/aux_loss"}
    for entry in trainer.state.log_history:
        found = {key for key in entry if key.startswith("mos/")}
        assert found == (expected if "loss" in entry else set()), entry
    assert all(expected <= watch.logged[step] for step in (2, 4, 6, 8))
    first = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert sum(first[f"mos/share/{space}"] for space in ("hyperbolic", "spherical", "euclidean")) == pytest.approx(1)
    assert 0 < first["mos/entropy"] <= torch.tensor(4.0).log().item() + 1e-6 and first["mos/aux_loss"] >= 0.9
    assert first["mos/curvature/hyperbolic_min"] <= first["mos/curvature/hyperbolic_mean"] < 0
    assert first["mos/curvature/spherical_max"] > 0

    assert json.loads(json.dumps(callback.history)) == callback.history
    assert [entry["step"] for entry in callback.history] == [2, 4, 6, 8]
    last = callback.history[-1]
    assert set(last["share"]) == set(router_owners(model))
    assert len(last["curvature"]) == (4 if family == "bert" else 6)
    assert all(sum(share) == pytest.approx(1) for share in last["share"].values())
    layer = getattr(*ffn_of(layers_of(model)[0])[-1])  # reads the FFN's 64
    (name,) = (name for name, module in model.named_modules() if module is layer)
    assert_close(torch.tensor(last["curvature"][name]), layer.curvature.detach() * 64, rtol=1e-5, atol=0)
    weights = torch.tensor([owner.mos_aux_weight.item() for owner in router_owners(model).values()])
    assert_close(weights, torch.full_like(weights, 5.0 / len(weights)))
    assert hooks(model) == before


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_adapter_that_the_forward_passes_over_is_said_once(tmp_path, checkpointing):
    model = adapted()
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: torch.nn.functional.linear(x, mlp.down_proj.weight @ mlp.up_proj.weight)  # as a fused one
    options = {"gradient_accumulation_steps": 2, "gradient_checkpointing": checkpointing}
    trainer = trainer_for(model, tmp_path, [SAMPLE] * 6, [MoSCallback()], **options)
    with pytest.warns(UserWarning, match="got no gradient in the first step") as caught:
        trainer.train()
    (message,) = [str(w.message) for w in caught if "got no gradient" in str(w.message)]
    assert message.startswith("10 of the adapter's 20 trainable parameters") and "layers.1.mlp" in message


@pytest.mark.filterwarnings("error:.*got no gradient")
@pytest.mark.parametrize("frozen", ["mos_curvature", "layers.0", "mos_"])
def test_what_is_frozen_needs_no_gradient(tmp_path, frozen):
    model = adapted()
    model.lm_head.requires_grad_(True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and frozen not in name)
    options = {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    trainer_for(model, tmp_path, [SAMPLE] * 2, [MoSCallback()], **options).train()


@pytest.fixture
def fresh():
    """accelerate's state as in a new process."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture
def accumulating(fresh):
    """accelerate's state, in which two batches are accumulated."""
    return Accelerator(cpu=True, gradient_accumulation_steps=2)


def test_a_gradient_without_accelerates_factor_is_said_once(accumulating):
    model = adapted().train()
    with torch.no_grad():
        model(ids())
    model.eval()(ids())
    model.train()
    with pytest.warns(UserWarning, match="accelerate accumulates 2 batches.*MoSCallback.add_to") as caught:
        model(ids())
        model(ids())
    assert len([w for w in caught if "accumulates" in str(w.message)]) == 1


@pytest.mark.filterwarnings("error:accelerate scales")
def test_on_a_cpu_fp16_is_not_scaled(fresh):
    assert Accelerator(cpu=True, mixed_precision="fp16").scaler is None
    adapted().train()(ids())


@pytest.mark.filterwarnings("error:accelerate accumulates")
def test_a_gradient_that_has_its_factor_needs_no_word(accumulating):
    model = adapted().train()
    set_factor(model, 1 / 2)
    model(ids())
    adapted(router_aux_loss_coef=0.0).train()(ids())


def test_a_model_without_an_adapter_is_refused(tmp_path):
    message = "LlamaForCausalLM has no MoS adapter: call apply_mos"
    trainer = trainer_for(tiny(dtype=torch.float32), tmp_path, [SAMPLE], [])
    with pytest.raises(ValueError, match=message):
        MoSCallback.add_to(trainer)
    with pytest.raises(TypeError, match="LlamaForCausalLM is no Trainer"):
        MoSCallback.add_to(trainer.model)
    assert not any(isinstance(callback, MoSCallback) for callback in trainer.callback_handler.callbacks)
    trainer.add_callback(MoSCallback())
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_frozen_adapter_is_refused(tmp_path):
    save_adapter(adapted(), tmp_path / "adapter")
    model = tiny(dtype=torch.float32)
    load_adapter(model, tmp_path / "adapter")
    trainer = Trainer(model, TrainingArguments(str(tmp_path), use_cpu=True), callbacks=[MoSCallback()])
    with pytest.raises(ValueError, match="is_trainable=True"):
        trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)


def test_an_adapter_may_come_between_the_trainer_and_its_training_or_be_inactive(tmp_path):
    model = tiny(dtype=torch.float32)
    trainer = trainer_for(model, tmp_path / "later", [SAMPLE], [MoSCallback()])
    apply_mos(model, mos(model))
    trainer.train()

    from peft import get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft_setup import config

    model = get_peft_model(tiny(dtype=torch.float32), config())
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter([])
    model.base_model.model.lm_head.requires_grad_(True)
    trainer = trainer_for(model, tmp_path / "inactive", [SAMPLE])
    MoSCallback.add_to(trainer)
    trainer.train()


def test_tensorboard_gets_the_keys(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer = trainer_for(adapted(), tmp_path / "out", [SAMPLE] * 3, report_to_folder=tmp_path / "tensorboard")
    MoSCallback.add_to(trainer)
    trainer.train()
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    logged = {key: value for key, value in trainer.state.log_history[0].items() if key.startswith("mos/")}
    assert len(logged) == 12
    for key, value in logged.items():
        points = events.Scalars(f"train/{key}")
        assert [point.step for point in points] == [1, 2, 3] and points[0].value == pytest.approx(value, rel=1e-6), key


def test_wandb_gets_the_keys(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    trainer = trainer_for(adapted(), tmp_path, [SAMPLE] * 3)
    trainer.add_callback(WandbCallback)
    MoSCallback.add_to(trainer)
    logged = []
    monkeypatch.setattr(wandb.Run, "log", lambda self, values, *args, **kwargs: logged.append(values))
    trainer.train()
    wandb.finish()
    measured = [{key for key in values if key.startswith("train/mos/")} for values in logged]
    assert [len(keys) for keys in measured if keys] == [12, 12, 12]


def test_it_comes_before_every_reporter(tmp_path):
    """All reporters log what they are handed, after the trainer's own callbacks."""
    trainer = trainer_for(adapted(), tmp_path, [SAMPLE])
    for reporter in (Watch(), Watch()):
        trainer.add_callback(reporter)
    MoSCallback.add_to(trainer)
    assert isinstance(trainer.callback_handler.callbacks[0], MoSCallback)
    trainer.train()
    reporters = [c for c in trainer.callback_handler.callbacks if isinstance(c, Watch)]
    assert len(reporters) == 2 and all("mos/entropy" in reporter.logged[1] for reporter in reporters)


def test_the_report_of_a_trainers_folder(tmp_path):
    from mos_kernels.__main__ import main
    from mos_kernels.run_report.log import read_run

    trainer = trainer_for(
        adapted(), tmp_path, [SAMPLE] * 4, [MoSCallback()], eval_strategy="epoch", eval_samples=[SAMPLE]
    )
    trainer.train()
    run = read_run(tmp_path)
    assert [step for step, _ in run.curve("loss")] == [1, 2, 3, 4] and len(run.curve("eval_loss")) == 1
    assert run.adapter.num_experts == 8 and run.settings["model"] == "LlamaForCausalLM"
    assert [sorted(e["curvature"]) for e in run.entries if "curvature" in e] == [sorted(
        name.removesuffix(".mos_curvature") for name in adapter_parameters(trainer.model) if "curvature" in name
    )] * 5  # fmt: skip
    assert main(["report", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").read_text().count('class="panel"') == 6


def test_given_as_a_plain_callback_the_history_has_the_keys(tmp_path):
    trainer = trainer_for(adapted(), tmp_path, [SAMPLE] * 2, [MoSCallback()], logging_strategy="epoch")
    trainer.train()
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert "mos/entropy" in entry and "mos/curvature/spherical_mean" in entry


@pytest.mark.parametrize("history_file", ["history.jsonl", None])
def test_a_second_training_begins_a_history_of_its_own(history_file, tmp_path):
    callback = MoSCallback(history_file)
    trainer = trainer_for(adapted(), tmp_path, [SAMPLE] * 2, [callback])
    for _ in range(2):
        trainer.train()
        assert [entry["step"] for entry in callback.history] == [1, 2]


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_measured_values_are_those_of_the_tokens_of_the_logged_step(tmp_path, use_reentrant):
    model = adapted(router_aux_loss_coef=0.0)
    callback = MoSCallback()
    before = routing_report(model, SAMPLE["input_ids"].unsqueeze(0))
    checkpointing = {} if use_reentrant is None else {"gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    options = {"gradient_accumulation_steps": 2, "gradient_checkpointing": use_reentrant is not None, **checkpointing}
    trainer_for(model, tmp_path, [SAMPLE] * 2, [callback], **options).train()
    (entry,) = callback.history
    assert entry["share"] == {row["name"]: pytest.approx(row["share"]) for row in before}
    assert not any(owner._forward_hooks for owner in router_owners(model).values())


class Interrupted(BaseException):
    """As KeyboardInterrupt, of which no hook hears."""


@pytest.mark.parametrize("where", ["forward", "loss", "backward"])
@pytest.mark.parametrize("error", [RuntimeError, Interrupted])
def test_a_measured_step_that_fails_leaves_no_hooks_and_compilation_on(tmp_path, where, error):
    model, compiled = adapted(), []
    before = hooks(model)

    def fail(*_):
        raise error

    def inductor(graph, _):
        compiled.append(graph)
        return graph.forward

    trainer = trainer_for(model, tmp_path, [SAMPLE] * 2, [MoSCallback()])
    if where == "loss":
        trainer.compute_loss = lambda model, inputs, **_: fail(model(**inputs))
    elif where == "forward":
        handle = layers_of(model)[1].register_forward_hook(fail)
    else:
        handle = model.lm_head.register_full_backward_hook(fail)
        model.lm_head.requires_grad_(True)
    with pytest.raises(error):
        trainer.train()
    if where != "loss":
        handle.remove()
    assert hooks(model) == before and "forward" not in vars(model)
    torch.compile(lambda x: x + 1, backend=inductor)(torch.ones(1))
    assert len(compiled) == 1, "compilation is on"


@every_family
def test_curvature_comes_back_to_float32(tmp_path, family):
    model = adapted(family)
    curvatures = [p for name, p in model.named_parameters() if "mos_curvature" in name]
    for parameter in curvatures:
        parameter.data = parameter.data.bfloat16()
    trainer_for(model, tmp_path, [sample_for(family)], [MoSCallback()]).train()
    assert all(parameter.dtype == torch.float32 for parameter in curvatures)
    assert any(parameter.abs().sum() > 0 for parameter in curvatures)


def test_parameter_groups():
    model = adapted("bert")
    model.classifier.requires_grad_(True)
    groups = {group["name"]: group for group in mos_param_groups(model, 1e-3, 0.1, curvature_lr=2e-2)}
    assert list(groups) == ["lora", "router", "curvature", "other", "other_no_decay"]
    assert {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()} == {
        "lora": (1e-3, 0.1), "router": (1e-3, 0.0), "curvature": (2e-2, 0.0), "other": (1e-3, 0.1),
        "other_no_decay": (1e-3, 0.0),
    }  # fmt: skip
    assert {name: len(group["params"]) for name, group in groups.items()} == {
        "lora": 8, "router": 4, "curvature": 4, "other": 1, "other_no_decay": 1,
    }  # fmt: skip
    grouped = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    torch.optim.AdamW(groups.values())
    assert [group["name"] for group in mos_param_groups(adapted(learn_curvature=False), 1e-3)] == ["lora", "router"]
    with pytest.raises(ValueError, match="nothing|no parameter"):
        mos_param_groups(tiny().requires_grad_(False), 1e-3)


@pytest.mark.parametrize("family, scope", [("llama", "ffn"), ("llama", "linear"), ("bert", "ffn"), ("gpt2", "ffn")])
def test_routing_report_counts_by_hand(family, scope):
    model = adapted(family, torch.float64, router_scope=scope)
    inputs = {name: [] for name in router_owners(model)}
    handles = [
        owner.register_forward_hook(lambda owner, args, output, name=name: inputs[name].append(args[0]))
        for name, owner in router_owners(model).items()
    ]
    model(ids())
    for handle in handles:
        handle.remove()
    report = routing_report(model, ids())
    assert [row["name"] for row in report] == list(inputs)
    for row in report:
        owner = model.get_submodule(row["name"])
        weight = getattr(owner, "mos_router", None)
        logits = (inputs[row["name"]][0] @ (owner.weight if weight is None else weight).T).flatten(0, -2)
        chosen = torch.zeros_like(logits).scatter_(-1, logits.topk(4).indices, 1.0)
        gates = logits.masked_fill(chosen == 0, -torch.inf).softmax(-1)
        share = chosen.mean(0) / 4
        assert row["tokens"] == 14 and row["spaces"] == list(owner.config.expert_spaces)
        assert row["share"] == pytest.approx(share.tolist(), abs=1e-6)
        assert row["mean_gate"] == pytest.approx(gates.mean(0).tolist(), abs=1e-6)
        assert row["entropy"] == pytest.approx(torch.distributions.Categorical(gates).entropy().mean().item(), abs=1e-5)
        assert row["aux_loss"] == pytest.approx(8 * (share * logits.softmax(-1).mean(0)).sum().item(), abs=1e-5)
        assert row["name"] in str(report)


@pytest.mark.parametrize("training", [False, True])
def test_routing_report_leaves_padding_out_and_the_model_alone(training):
    model = adapted(lora_dropout=0.5).train(training)
    frozen = model.model.layers[0].mlp.down_proj
    frozen.training = False
    before = hooks(model)
    modes = {name: module.training for name, module in model.named_modules()}
    tokens = ids()
    padded = torch.cat([tokens, torch.zeros(2, 3, dtype=torch.long)], 1)
    mask = (padded != 0).long()
    alone, left_out = routing_report(model, tokens), routing_report(model, input_ids=padded, attention_mask=mask)
    counted = routing_report(model, padded)
    for a, b, c in zip(alone, left_out, counted, strict=True):
        assert b["tokens"] == 14 and c["tokens"] == 20
        assert b["share"] == pytest.approx(a["share"], abs=1e-6) and b["share"] != pytest.approx(c["share"], abs=1e-6)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert hooks(model) == before
    assert all(p.grad is None for p in model.parameters())


def test_routing_report_without_routers():
    with pytest.raises(ValueError, match="call apply_mos"):
        routing_report(tiny(), ids())


def test_routing_report_of_an_offloaded_model_says_what_to_do():
    from accelerate import cpu_offload

    model = adapted()
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="remove_hook_from_submodules"):
        routing_report(model, ids())


def test_vocabulary_covers_the_samples():
    assert SAMPLE["input_ids"].max() < VOCABULARY
