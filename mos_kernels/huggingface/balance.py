"""The weight of the load-balancing gradient. It is added during backward, so nothing that scales a loss scales it."""

from __future__ import annotations

import warnings

from accelerate import state as accelerate_state
from torch import nn

from mos_kernels.huggingface.modules import router_owners


def set_factor(model: nn.Module, factor: float) -> None:
    """Set the weight of the load-balancing gradient to router_aux_loss_coef / routers times this factor."""
    for owner in router_owners(model).values():
        owner.mos_aux_weight.fill_(owner.aux_coefficient * factor)


def warn_without_factor(model: nn.Module) -> None:
    """Warn if accelerate divides the loss by accumulated batches, or scales it for fp16, and this weight is unchanged.

    Only accelerate's state is read: a forward cannot know how many batches a Trainer, or another loop, accumulates.
    """
    if not accelerate_state.is_initialized():
        return
    steps = accelerate_state.GradientState().num_steps
    state = accelerate_state.AcceleratorState()
    scaled = state.mixed_precision == "fp16" and state.device.type != "cpu"
    owner = next((owner for owner in router_owners(model).values() if owner.config.router_aux_loss_coef > 0), None)
    if (steps > 1 or scaled) and owner is not None and bool(owner.mos_aux_weight == owner.aux_coefficient):
        why = f"accumulates {steps} batches" if steps > 1 else "scales the loss for fp16"
        warnings.warn(
            f"accelerate {why}, but the load-balancing gradient, which is added during backward, does not get that "
            "factor: in a Trainer use MoSCallback.add_to(trainer); in a loop of your own fill mos_aux_weight, as "
            "docs/training.md shows",
            stacklevel=2,
        )
