"""Training with transformers' Trainer: optimizer groups, the factors on the load-balancing gradient, the logs."""

from __future__ import annotations

import contextlib
import math
import re
import warnings
from collections.abc import Callable

import torch
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import IntervalStrategy, has_length

from mos_kernels.huggingface.balance import set_factor
from mos_kernels.huggingface.history import HistoryFile, curvature_logs, dimensionless_curvature, routing_logs
from mos_kernels.huggingface.modules import adapter_parameters, forward_through, mos_modules
from mos_kernels.huggingface.routing_report import measured_routing
from mos_kernels.huggingface.state import note_trained
from mos_kernels.run_report.log import HISTORY

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
    note_trained(model)
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
    shorter last group of an epoch, where the dataloader has a length) and times the fp16 scaler's scale. It warns once
    of adapter parameters that the first step gave no gradient, and adds to the training logs

        mos/curvature/<space>_{mean,min,max}   dimensionless, κ̂ = κ·length_unit², over experts and layers
        mos/share/<space>, mos/share/max       share of the top-k assignments, 1/E at uniform routing for the maximum
        mos/entropy, mos/aux_loss              entropy of a token's gates in nats; E·Σ f·P, 1 at uniform routing

    A forward whose routing is measured runs uncompiled, of each batch the first one with gradients. Of a compiled
    model's steps that is one in ten at most, and the logs in between have no routing.

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
        self._file = HistoryFile()
        self._is_measured_step = False
        self._measuring: contextlib.ExitStack | None = None
        self._statistics: dict | None = None
        self._step_in_epoch: int | None = None
        self._next_measured = 0
        self._has_stepped = False

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
        note_trained(model)
        self._stop_measuring()
        self._statistics = None
        self._step_in_epoch = None
        self._next_measured = 0
        self._has_stepped = False
        resumed = self._file.open(self.history_file, args, state, model)
        self.history = self.history if resumed is None else resumed

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
        set_factor(model, scale / (accumulated * max(args.n_gpu, 1)))

        step = state.global_step + 1
        is_logged = {
            IntervalStrategy.STEPS: step % max(state.logging_steps, 1) == 0,
            IntervalStrategy.EPOCH: is_last,
        }.get(args.logging_strategy, False)
        is_logged |= step == 1 and args.logging_first_step
        self._is_measured_step = is_logged and step >= self._next_measured
        if self._is_measured_step:
            self._next_measured = step + (UNCOMPILED_EVERY if _is_compiled(args, model) else 1)
            self._statistics = {}
            self._measure(args, model)

    def on_substep_end(self, args, state, control, model=None, **kwargs):
        self._stop_measuring()
        if self._is_measured_step:
            self._measure(args, model)

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        # DeepSpeed keeps gradients elsewhere, and these optimizers use them up during backward
        kept = type(optimizer).__name__ != "DeepSpeedOptimizerWrapper" and not re.search("lomo|layerwise", args.optim)
        if not self._has_stepped and kept:
            _warn_of_missing_gradients(model)
        self._has_stepped = True

    def on_step_end(self, args, state, control, **kwargs):
        self._stop_measuring()

    def on_prediction_step(self, args, state, control, **kwargs):
        self._stop_measuring()  # of a step that was cut off before its forward

    def on_log(self, args, state, control, logs=None, model=None, **kwargs):
        if logs is None or "loss" not in logs:  # evaluation and the summary at the end log too
            if logs and "train_runtime" not in logs:
                self._file.append(state.global_step, logs)
            return
        curvature = dimensionless_curvature(model)
        routing = {name: summary for name, s in (self._statistics or {}).items() if (summary := s.summary())}
        self._statistics = None
        values = {**curvature_logs(model, curvature), **routing_logs(model, routing)}
        logs.update(values)
        if state.log_history:
            state.log_history[-1].update(values)
        measured = {key: {name: summary[key] for name, summary in routing.items()} for key in ("share", "entropy")}
        self.history.append({"step": state.global_step, "curvature": curvature, **measured})
        self._file.append(state.global_step, logs, self.history[-1])

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self._stop_measuring()
        set_factor(model, 1.0)

    def _measure(self, args, model: nn.Module) -> None:
        """Add the routing of the batch's forward to the statistics, and run it uncompiled.

        A callback is not told of an exception, so the first forward with gradients itself ends this; not where backward
        must find compilation off too, nor in replicas, which would call the forward of the model that they copy.
        """
        self._measuring = contextlib.ExitStack()
        self._measuring.enter_context(measured_routing(model, self._statistics))
        if not _recomputes_compiled(model) and args.n_gpu <= 1:
            self._measuring.enter_context(forward_through(model, self._watched))

    def _watched(self, forward: Callable, *args, **kwargs):
        try:
            return forward(*args, **kwargs)
        finally:  # a hook would miss interrupts
            if torch.is_grad_enabled():
                self._stop_measuring()

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


def _recomputes_compiled(model: nn.Module) -> bool:
    """Whether backward runs compiled layers again: then they must be as they were in forward."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules()) and any(
        module._compiled_call_impl is not None for module in model.modules() if module is not model
    )


def _warn_of_missing_gradients(model: nn.Module) -> None:
    """Name the trainable adapter parameters that the first step's backward did not reach."""
    trainable = {name: p for name, p in adapter_parameters(model).items() if p.requires_grad}
    missing = [name for name, parameter in trainable.items() if parameter.grad is None]
    if missing:
        warnings.warn(
            f"{len(missing)} of the adapter's {len(trainable)} trainable parameters got no gradient in the first step, "
            f"so they did not train: {', '.join(missing[:4])}{', …' if len(missing) > 4 else ''}. Either the forward "
            "took another branch in this step, or the model does not call these linears (a fused forward may read "
            "their weights), or they are offloaded",
            stacklevel=2,
        )


def _steps_per_epoch(args, train_dataloader) -> int | None:
    """Optimizer steps in an epoch, or None where the dataloader has no length."""
    if not has_length(train_dataloader):
        return None
    return max(math.ceil(len(train_dataloader) / args.gradient_accumulation_steps), 1)
