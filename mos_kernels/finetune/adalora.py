"""AdaLoRA (Zhang et al., 2023) in the finetune command: peft's adapter, with its rank allocation called each step."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import nn
from transformers import TrainerCallback

ADALORA_FIELDS = (
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"
)  # fmt: skip
"""The fields of MoSConfig that have an effect in peft's AdaLoraConfig; r is the rank that is left on average."""

ALLOCATION = "rank_allocation.pt"


def schedule(r: int, steps: int) -> dict[str, int]:
    """AdaLoraConfig's ranks and phases: from half as much rank again, after 10% of the steps, to r at 70%."""
    if steps < 4:
        raise ValueError(f"--method adalora allocates ranks over at least 4 steps, and this run has {steps}")
    phases = {"tinit": steps // 10, "tfinal": math.ceil(0.3 * steps), "total_step": steps}
    return {"target_r": r, "init_r": math.ceil(1.5 * r), **phases}


class RankAllocation(TrainerCallback):
    """Calls `update_and_allocate` where the gradients of a step are still there; its state goes into checkpoints."""

    def __init__(self, model: nn.Module) -> None:
        self._adalora = model.base_model

    def on_optimizer_step(self, args, state, control, **kwargs):
        self._adalora.update_and_allocate(state.global_step + 1)

    def save(self, folder: str | Path) -> None:
        """Write what the next allocation starts from."""
        allocator = self._adalora.rankallocator
        averages = {name: getattr(allocator, name) for name in ("ipt", "exp_avg_ipt", "exp_avg_unc")}
        pattern = allocator.peft_config.rank_pattern
        torch.save({"averages": averages, "rank_pattern": pattern}, Path(folder) / ALLOCATION)

    def load(self, folder: str | Path) -> None:
        """Go on from what `save` wrote."""
        state = torch.load(Path(folder) / ALLOCATION, weights_only=True)
        allocator = self._adalora.rankallocator
        for name, values in state["averages"].items():
            setattr(allocator, name, values)
        allocator.peft_config.rank_pattern = state["rank_pattern"]
