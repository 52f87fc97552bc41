"""AdaLoRA (Zhang et al., 2023): peft's adapter, with its rank schedule and its allocation called at each step."""

from __future__ import annotations

import math

from peft import AdaLoraConfig, AdaLoraModel
from transformers import TrainerCallback

from mos_kernels.finetune import Method

FIELDS = (
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"
)  # fmt: skip
"""The fields of MoSConfig that have an effect in peft's AdaLoraConfig; r is the rank that is left on average."""


def schedule(r: int, steps: int) -> dict[str, int]:
    """AdaLoraConfig's ranks and phases: from half as much rank again, after 10% of the steps, to r at 70%."""
    if steps < 4:
        raise ValueError(f"--method adalora allocates ranks over at least 4 steps, and this run has {steps}")
    phases = {"tinit": steps // 10, "tfinal": math.ceil(0.3 * steps), "total_step": steps}
    return {"target_r": r, "init_r": math.ceil(1.5 * r), **phases}


class RankAllocation(TrainerCallback):
    """Calls `update_and_allocate` where the gradients of a step are still there; other models pass by.

    A checkpoint has no place for what allocation remembers: runs of AdaLoRA are trained in one piece, without any.
    """

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if isinstance(getattr(model, "base_model", None), AdaLoraModel):
            model.base_model.update_and_allocate(state.global_step + 1)


def _config(config: dict, steps: int) -> AdaLoraConfig:
    return AdaLoraConfig(**{k: v for k, v in config.items() if k != "r"}, **schedule(config["r"], steps))


METHODS = {"adalora": Method(FIELDS, _config)}
