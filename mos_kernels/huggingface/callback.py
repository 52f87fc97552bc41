"""Training with transformers' Trainer: optimizer groups, the factors on the load-balancing gradient, the logs."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path

import torch
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import IntervalStrategy, has_length

from mos_kernels.config import SPACES
from mos_kernels.huggingface.modules import mos_adapters, mos_modules, router_owners
from mos_kernels.huggingface.routing_report import measured_routing
from mos_kernels.run_report.log import HISTORY, append_line, complete_lines, write_lines

_SETTINGS = (
    "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate",
    "lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "max_grad_norm", "bf16", "fp16",
    "gradient_checkpointing", "torch_compile", "seed",
)  # fmt: skip
"""The training arguments that the history names."""

UNCOMPILED_EVERY = 10
"""Of a compiled model's steps, one in this many at most runs uncompiled to measure its routing."""


def mos_param_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.01,
    *,
    router_lr: float | None = None,
    curvature_lr: float | None = None,
) -> list[dict]:
    """Optimizer groups for the trainable parameters of a model with MoS adapters.

    A and B decay; the routers and the curvature do not, and may have learning rates of their own; of the rest, matrices
    decay and vectors (biases, norms) do not. `curvature_lr` acts on the trained offset θ, which the layer multiplies by
    `curvature_lr_ratio`. Groups without parameters are left out. Raises ValueError where nothing is trainable.
    """
    groups = {
        name: {"name": name, "params": [], "lr": lr if rate is None else rate, "weight_decay": decay}
        for name, rate, decay in (
            ("lora", None, weight_decay),
            ("router", router_lr, 0.0),
            ("curvature", curvature_lr, 0.0),
            ("other", None, weight_decay),
            ("other_no_decay", None, 0.0),
        )
    }
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if "mos_lora_" in name:
            group = "lora"
        elif "mos_router" in name:
            group = "router"
        elif "mos_curvature" in name:
            group = "curvature"
        else:
            group = "other" if parameter.dim() > 1 else "other_no_decay"
        groups[group]["params"].append(parameter)
    groups = [group for group in groups.values() if group["params"]]
    if not groups:
        raise ValueError("no parameter is trainable: call apply_mos, or load_adapter with is_trainable=True, first")
    return groups


class MoSCallback(TrainerCallback):
    """What transformers' Trainer does not do by itself for a MoS adapter.

    The load-balancing gradient is injected in backward, past the factors that a trainer puts on the loss: at every step
    the callback sets its weight to router_aux_loss_coef / routers, divided by the step's accumulation steps (counting a
    shorter last group of an epoch, where the dataloader has a length) and times the fp16 scaler's scale. It puts
    curvatures that a trainer has cast back to float32, and adds to the training logs

        mos/curvature/<space>_{mean,min,max}   dimensionless, κ̂ = κ·length_unit², over experts and layers
        mos/share/<space>, mos/share/max       share of the top-k assignments, 1/E at uniform routing for the maximum
        mos/entropy, mos/aux_loss              entropy of a token's gates in nats; E·Σ f·P, 1 at uniform routing

    A step whose routing is measured runs uncompiled: of a compiled model that is one in ten at most, and the logs in
    between have no routing.

    `history` keeps, for each logged step, {"step", "curvature": {linear: [κ̂ of each expert]}, "share": {router: [share
    of each expert]}, "entropy": {router: nats}}, in plain JSON types. It is also appended, with all other logs, to
    `history_file` in the output_dir, from where a resumed run takes it up and `python -m mos_kernels report` draws it.

    Reporters (TensorBoard, W&B) run before callbacks that are given to the Trainer: `MoSCallback.add_to(trainer)` puts
    it first, so that they get the keys too.
    """

    def __init__(self, history_file: str | None = HISTORY):
        """history_file: its name in the output_dir; None: no file."""
        self.history: list[dict] = []
        self.history_file = history_file
        self._path: Path | None = None
        self._measuring: contextlib.ExitStack | None = None
        self._statistics: dict | None = None
        self._step_in_epoch: int | None = None
        self._next_measured = 0

    @classmethod
    def add_to(cls, trainer: Trainer, callback: MoSCallback | None = None) -> MoSCallback:
        """Put `callback` (default: the one that is there, or a new one) in front of the trainer's others; return it.

        ValueError where the trainer's model has no adapter.
        """
        if trainer.model is not None:
            _require_adapter(trainer.model)
        there = next((c for c in trainer.callback_handler.callbacks if isinstance(c, cls)), None)
        if there is not None:
            trainer.callback_handler.callbacks.remove(there)
        callback = callback or there or cls()
        trainer.callback_handler.callbacks.insert(0, callback)
        return callback

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        _require_adapter(model)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError(
                f"no parameter of {type(model).__name__} is trainable: load the adapter with is_trainable=True"
            )
        self._stop_measuring()
        self._statistics = None
        self._step_in_epoch = None
        self._next_measured = 0
        for layer in mos_adapters(model).values():
            if layer.mos_curvature is not None and layer.mos_curvature.dtype != torch.float32:
                layer.mos_curvature.data = layer.mos_curvature.data.float()
        self._open_history(args, state, model)

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        resumed = self._step_in_epoch is None and not args.ignore_data_skip
        steps = _steps_per_epoch(args, train_dataloader)
        self._step_in_epoch = state.global_step % steps if resumed and steps else 0

    def on_step_begin(self, args, state, control, model=None, optimizer=None, train_dataloader=None, **kwargs):
        accumulated = args.gradient_accumulation_steps
        is_last = self._step_in_epoch + 1 == _steps_per_epoch(args, train_dataloader)
        if is_last:
            accumulated = len(train_dataloader) % accumulated or accumulated
        self._step_in_epoch += 1
        scaler = getattr(optimizer, "scaler", None)
        scale = 1.0 if scaler is None else scaler.get_scale()
        _set_aux_weights(model, scale / (accumulated * max(args.n_gpu, 1)))

        step = state.global_step + 1
        is_logged = {
            IntervalStrategy.STEPS: step % max(state.logging_steps, 1) == 0,
            IntervalStrategy.EPOCH: is_last,
        }.get(args.logging_strategy, False)
        is_logged |= step == 1 and args.logging_first_step
        if is_logged and step >= self._next_measured:
            self._next_measured = step + (UNCOMPILED_EVERY if _is_compiled(args, model) else 1)
            self._measuring = contextlib.ExitStack()
            self._statistics = self._measuring.enter_context(measured_routing(model))

    def on_step_end(self, args, state, control, **kwargs):
        self._stop_measuring()

    def on_log(self, args, state, control, logs=None, model=None, **kwargs):
        if logs is None or "loss" not in logs:  # evaluation and the summary at the end log too
            if logs and "train_runtime" not in logs:
                self._keep(state, logs)
            return
        curvature = _dimensionless_curvature(model)
        routing = {name: summary for name, s in (self._statistics or {}).items() if (summary := s.summary())}
        self._statistics = None
        values = {**_curvature_logs(model, curvature), **_routing_logs(model, routing)}
        logs.update(values)
        if state.log_history:
            state.log_history[-1].update(values)
        measured = {key: {name: summary[key] for name, summary in routing.items()} for key in ("share", "entropy")}
        self.history.append({"step": state.global_step, "curvature": curvature, **measured})
        self._keep(state, logs, self.history[-1])

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self._stop_measuring()
        _set_aux_weights(model, 1.0)

    def _open_history(self, args, state, model) -> None:
        """Start the file with the settings, or cut it off after the step from which training is resumed."""
        self._path = None
        curvature = _dimensionless_curvature(model)  # where parameters are sharded, all processes ask
        if self.history_file is None or not state.is_world_process_zero:
            return
        self._path = Path(args.output_dir) / self.history_file
        self._path.parent.mkdir(parents=True, exist_ok=True)
        entries = complete_lines(self._path) if state.global_step > 0 and self._path.is_file() else []
        entries = [entry for entry in entries if entry["step"] <= state.global_step]
        kept = ("step", "curvature", "share", "entropy")
        self.history = [{k: e[k] for k in kept} for e in entries if "loss" in e and "share" in e]
        if not entries:
            adapter = next((layer.config.to_dict() for layer in mos_adapters(model).values()), None)
            settings = {"model": type(model).__name__, **{name: getattr(args, name, None) for name in _SETTINGS}}
            first = {"step": state.global_step, "adapter": adapter, "settings": settings, "curvature": curvature}
            entries = [json.loads(json.dumps(first, default=str))]
        write_lines(self._path, entries)

    def _keep(self, state, logs: dict, measured: dict | None = None) -> None:
        if self._path is not None:
            numbers = {key: float(value) for key, value in logs.items() if isinstance(value, (int, float))}
            append_line(self._path, {**numbers, **(measured or {}), "step": state.global_step})

    def _stop_measuring(self) -> None:
        if self._measuring is not None:
            self._measuring.close()
            self._measuring = None


def _require_adapter(model: nn.Module) -> None:
    if not mos_modules(model, inactive=True):
        raise ValueError(
            f"MoSCallback: {type(model).__name__} has no MoS adapter: call apply_mos(model, config), load_adapter or "
            "get_peft_model(model, MoSPeftConfig(...)) before, or train without the callback"
        )


def _is_compiled(args, model: nn.Module) -> bool:
    return args.torch_compile or any(
        hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in model.modules()
    )


def _set_aux_weights(model: nn.Module, factor: float) -> None:
    for owner in router_owners(model).values():
        owner.mos_aux_weight.fill_(owner.aux_coefficient * factor)


def _steps_per_epoch(args, train_dataloader) -> int | None:
    """Optimizer steps in an epoch, or None where the dataloader has no length."""
    if not has_length(train_dataloader):
        return None
    return max(math.ceil(len(train_dataloader) / args.gradient_accumulation_steps), 1)


def _dimensionless_curvature(model: nn.Module) -> dict[str, list[float]]:
    """κ̂ of every expert, by layer; a LoRA has none."""
    layers = {name: layer for name, layer in mos_adapters(model).items() if not layer.config.is_lora}
    if not layers:
        return {}
    with torch.no_grad():
        scaled = [
            (layer.curvature.double() * layer.config.squared_length_unit(layer.in_features)).cpu()
            for layer in layers.values()
        ]
    return {name: values.tolist() for name, values in zip(layers, scaled, strict=True)}


def _curvature_logs(model: nn.Module, curvature: dict[str, list[float]]) -> dict[str, float]:
    by_space: dict[str, list[float]] = {space: [] for space in SPACES}
    for name, values in curvature.items():
        for space, value in zip(model.get_submodule(name).config.expert_spaces, values, strict=True):
            by_space[space].append(value)
    logs = {}
    for space, values in by_space.items():
        if values and space != "euclidean":
            logs[f"mos/curvature/{space}_mean"] = sum(values) / len(values)
            logs[f"mos/curvature/{space}_min"] = min(values)
            logs[f"mos/curvature/{space}_max"] = max(values)
    return logs


def _routing_logs(model: nn.Module, routing: dict[str, dict]) -> dict[str, float]:
    if not routing:
        return {}
    logs = dict.fromkeys((f"mos/share/{space}" for space in SPACES), 0.0)
    for name, summary in routing.items():
        for space, share in zip(model.get_submodule(name).config.expert_spaces, summary["share"], strict=True):
            logs[f"mos/share/{space}"] += share / len(routing)
    logs["mos/share/max"] = max(max(summary["share"]) for summary in routing.values())
    for key in ("entropy", "aux_loss"):
        logs[f"mos/{key}"] = sum(summary[key] for summary in routing.values()) / len(routing)
    return logs
