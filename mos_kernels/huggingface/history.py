"""The numbers that MoSCallback adds to the logs, and the file with their history in the Trainer's output_dir."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn
from transformers import TrainerState, TrainingArguments

from mos_kernels.config import SPACES, MoSConfig
from mos_kernels.huggingface.modules import active_names, mos_adapters, mos_modules
from mos_kernels.huggingface.state import adapter_states
from mos_kernels.run_report.log import append_line, complete_lines, write_lines

_SETTINGS = (
    "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate",
    "lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "max_grad_norm", "bf16", "fp16",
    "gradient_checkpointing", "torch_compile", "seed",
)  # fmt: skip
"""The training arguments that are written into the history."""


class HistoryFile:
    """A file of JSON lines in the output_dir: the settings, then all logs with their steps."""

    def __init__(self):
        self._path: Path | None = None

    def open(
        self, name: str | None, args: TrainingArguments, state: TrainerState, model: nn.Module
    ) -> list[dict] | None:
        """Start the file `name`, or cut it off after the step from which training is resumed. name=None: no file.

        Returns the earlier entries of a resumed run; None if this process writes no file.
        """
        self._path = None
        curvature = dimensionless_curvature(model)  # in all processes, since this gathers sharded parameters
        if name is None or not state.is_world_process_zero:
            return None
        self._path = Path(args.output_dir) / name
        self._path.parent.mkdir(parents=True, exist_ok=True)
        entries = complete_lines(self._path) if state.global_step > 0 and self._path.is_file() else []
        entries = [entry for entry in entries if entry["step"] <= state.global_step]
        kept = ("step", "curvature", "share", "entropy")
        measured = [{key: e[key] for key in kept} for e in entries if "loss" in e and "share" in e]
        if not entries:
            config = _adapter_config(model)
            adapter = None if config is None else config.to_dict()
            settings = {"model": type(model).__name__, **{name: getattr(args, name, None) for name in _SETTINGS}}
            first = {"step": state.global_step, "adapter": adapter, "settings": settings, "curvature": curvature}
            entries = [json.loads(json.dumps(first, default=str))]
        write_lines(self._path, entries)
        return measured

    def append(self, step: int, logs: dict, measured: dict | None = None) -> None:
        """Write the numbers of a log, and what was measured for it."""
        if self._path is not None:
            numbers = {key: float(value) for key, value in logs.items() if isinstance(value, (int, float))}
            append_line(self._path, {**numbers, **(measured or {}), "step": step})


def _adapter_config(model: nn.Module) -> MoSConfig | None:
    """The configuration of the whole adapter. The one of a single linear may be changed by the patterns."""
    states = adapter_states(model)
    peft = [config for name, config in getattr(model, "peft_config", {}).items() if name in active_names(model)]
    if states or not peft:
        return states[0].config if states else next((x.config for x in mos_adapters(model).values()), None)
    return peft[0].to_mos_config()


def dimensionless_curvature(model: nn.Module) -> dict[str, list[float]]:
    """κ̂ of every expert, by layer, without the layers that are LoRAs."""
    layers = {name: layer for name, layer in mos_adapters(model).items() if not layer.config.is_lora}
    if not layers:
        return {}
    with torch.no_grad():
        scaled = [
            (layer.curvature.double() * layer.config.squared_length_unit(layer.in_features)).cpu()
            for layer in layers.values()
        ]
    return {name: values.tolist() for name, values in zip(layers, scaled, strict=True)}


def curvature_logs(model: nn.Module, curvature: dict[str, list[float]]) -> dict[str, float]:
    """The keys mos/curvature/*, from the result of `dimensionless_curvature`."""
    by_space: dict[str, list[float]] = {space: [] for space in SPACES}
    adapters = mos_modules(model, inactive=True)  # others may be active by now
    for name, values in curvature.items():
        for space, value in zip(adapters[name].config.expert_spaces, values, strict=True):
            by_space[space].append(value)
    logs = {}
    for space, values in by_space.items():
        if values and space != "euclidean":
            logs[f"mos/curvature/{space}_mean"] = sum(values) / len(values)
            logs[f"mos/curvature/{space}_min"] = min(values)
            logs[f"mos/curvature/{space}_max"] = max(values)
    return logs


def routing_logs(model: nn.Module, routing: dict[str, dict]) -> dict[str, float]:
    """The keys mos/share/*, mos/entropy and mos/aux_loss, from `RouterStatistics.summary` of each router."""
    if not routing:
        return {}
    logs = dict.fromkeys((f"mos/share/{space}" for space in SPACES), 0.0)
    owners = mos_modules(model, inactive=True)
    for name, summary in routing.items():
        for space, share in zip(owners[name].config.expert_spaces, summary["share"], strict=True):
            logs[f"mos/share/{space}"] += share / len(routing)
    logs["mos/share/max"] = max(max(summary["share"]) for summary in routing.values())
    for key in ("entropy", "aux_loss"):
        logs[f"mos/{key}"] = sum(summary[key] for summary in routing.values()) / len(routing)
    return logs
