"""The forward of an FFN block whose linears share a router: as one operation, or linear by linear with the gates."""

from __future__ import annotations

import functools

from torch import Tensor, nn

from mos_kernels import ops
from mos_kernels.ffn_node import FFNForm, as_one, why_not_one

__all__ = ["FFNForm", "bound_form", "ffn_forward", "why_not_one"]


def ffn_forward(block: nn.Module, form: FFNForm, *args, **kwargs) -> Tensor:
    """The block's forward, with one router for all its adapted linears. x (..., d) -> (..., d).

    It runs as one operation unless `why_not_one` gives a reason against that; else it calls the linears one by one.
    """
    (x,) = (*args, *kwargs.values())
    one = as_one(block, form, x)
    if one is not None:
        return _through(block, form.output, ops.ffn(*one))
    gates = block.mos_router(x)
    inputs = [_linear(block, form, name, x, gates) for name in form.inputs]
    if form.fused:
        inputs = inputs[0].chunk(2, -1)
    hidden = _through(block, form.activation, inputs[0])
    if len(inputs) == 2:
        hidden = hidden * inputs[1]
    hidden = _through(block, form.hidden, hidden)
    return _through(block, form.output, _linear(block, form, form.down, hidden, gates))


def bound_form(block: nn.Module) -> FFNForm | None:
    """The form of a block whose forward is `ffn_forward`; None for any other block."""
    bound = vars(block).get("_old_forward" if hasattr(block, "_hf_hook") else "forward")  # under accelerate's wrapper
    return bound.args[1] if isinstance(bound, functools.partial) and bound.func is ffn_forward else None


def _linear(block: nn.Module, form: FFNForm, name: str, x: Tensor, gates: Tensor) -> Tensor:
    linear = getattr(block, name)
    return linear(x, gates) if name in form.routed else linear(x)


def _through(block: nn.Module, names: tuple[str, ...], x: Tensor) -> Tensor:
    for name in names:
        x = getattr(block, name)(x)
    return x
