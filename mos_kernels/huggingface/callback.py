"""Training with transformers' Trainer: optimizer groups, the weight of the load-balancing gradient, and the logs."""

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
from mos_kernels.huggingface.blocks import restore_forwards
from mos_kernels.huggingface.history import HistoryFile, curvature_logs, dimensionless_curvature, routing_logs
from mos_kernels.huggingface.modules import adapter_parameters, forward_through, mos_modules
from mos_kernels.huggingface.routing_report import measured_routing
from mos_kernels.huggingface.state import prepare_training
from mos_kernels.run_report.log import HISTORY

UNCOMPILED_EVERY = 10
"""At most one in this many steps of a compiled model runs uncompiled, to measure its routing."""


def mos_param_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.01,
    *,
    router_lr: float | None = None,
    curvature_lr: float | None = None,
) -> list[dict]:
    """Optimizer groups for the trainable parameters of a model with MoS adapters.

    A and B have weight decay. The routers and the curvature have none, and may have learning rates of their own. Of the
    other parameters, matrices decay and vectors (biases, norms) do not. `curvature_lr` is the learning rate of θ, which
    the layer multiplies by `curvature_lr_ratio`. Groups without parameters are left out. Raises ValueError if no
    parameter is trainable, or if something has replaced an adapted linear.
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
    prepare_training(model)
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
    """Adds to transformers' Trainer what a MoS adapter needs: `MoSCallback.add_to(trainer)`.

    The load-balancing gradient is added during backward, so a trainer's factors on the loss do not apply to it. At
    every step the callback sets its weight to router_aux_loss_coef / routers, divided by the accumulated batches of the
    step, and multiplied by the fp16 loss scale. The last step of an epoch may have fewer batches; they are counted if
    the dataloader has a length. After the first step, the callback warns of adapter parameters without a gradient.

    The callback puts the forwards of FFN blocks back that Liger replaces in the trainer's constructor
    (use_liger_kernel=True): the adapter computes these blocks itself.

    It adds these keys to the training logs:

        mos/curvature/<space>_{mean,min,max}   dimensionless, κ̂ = κ·length_unit², over experts and layers
        mos/share/<space>, mos/share/max       share of the top-k assignments, 1/E at uniform routing for the maximum
        mos/entropy, mos/aux_loss              entropy of a token's gates in nats; E·Σ f·P, 1 at uniform routing

    To measure routing, the first forward with gradients of a batch runs uncompiled. Of a compiled model, at most one
    step in ten is measured, and the logs of other steps have no routing.

    `history` has an entry for each logged step, in plain JSON types: {"step", "curvature": {linear: [κ̂ of each
    expert]}, "share": {router: [share of each expert]}, "entropy": {router: nats}}. The entry is also appended, with
    all other logs, to `history_file` in the output_dir. A resumed run continues that file, and
    `python -m mos_kernels report` draws it.

    `add_to` puts the callback before the reporters (TensorBoard, W&B), so that they get the keys. Callbacks that are
    passed to the Trainer would run after them.
    """

    def __init__(self, history_file: str | None = HISTORY):
        """history_file: the name of the history file in the output_dir. None: no file."""
        self.history: list[dict] = []
        self.history_file = history_file
        self._file = HistoryFile()
        self._is_measured_step = False
        self._measuring: contextlib.ExitStack | None = None
        self._begin()

    def _begin(self) -> None:
        self._statistics: dict | None = None
        self._step_in_epoch: int | None = None
        self._next_measured = 0
        self._has_stepped = False

    @classmethod
    def add_to(cls, trainer: Trainer, callback: MoSCallback | None = None) -> MoSCallback:
        """Put `callback` before all other callbacks of the trainer, and return it.

        callback: by default the MoSCallback that the trainer has, or a new one. Raises ValueError if the trainer's
        model has no adapter, and TypeError for what is no trainer, such as a model.
        """
        if not hasattr(trainer, "callback_handler"):
            raise TypeError(f"{type(trainer).__name__} is no Trainer: pass one of transformers or of TRL")
        if trainer.model is not None:
            _require_adapter(trainer.model)
            restore_forwards(trainer.model)
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
                f"no parameter of {type(model).__name__} is trainable: load the adapter with is_trainable=True, or do "
                "not freeze the model after the adapter was put on"
            )
        restore_forwards(model)
        prepare_training(model)
        self._stop_measuring()
        self._begin()
        resumed = self._file.open(self.history_file, args, state, model)
        earlier = [entry for entry in self.history if entry["step"] <= state.global_step]
        self.history = earlier if resumed is None else resumed

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
        # with DeepSpeed and these optimizers, parameters have no gradients after backward
        kept = type(optimizer).__name__ != "DeepSpeedOptimizerWrapper" and not re.search("lomo|layerwise", args.optim)
        if not self._has_stepped and kept:
            _warn_of_missing_gradients(model)
        self._has_stepped = True

    def on_step_end(self, args, state, control, **kwargs):
        self._stop_measuring()

    def on_prediction_step(self, args, state, control, **kwargs):
        self._stop_measuring()  # for a step that ended before its forward

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
        """Measure the routing of the batch's forward, which then runs uncompiled.

        No callback is called after an exception, so the first forward with gradients ends the measurement itself. There
        are two exceptions: models whose backward must run uncompiled too, and replicas of DataParallel, which would
        call the forward of the original model.
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
    """Whether backward runs compiled layers again. They must then be compiled or uncompiled as in forward."""
    marks = ("gradient_checkpointing", "_checkpoint_wrapped_module")
    return any(getattr(module, mark, False) for module in model.modules() for mark in marks) and any(
        module._compiled_call_impl is not None for module in model.modules() if module is not model
    )


def _warn_of_missing_gradients(model: nn.Module) -> None:
    """Warn of the trainable adapter parameters that got no gradient in the first step."""
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
