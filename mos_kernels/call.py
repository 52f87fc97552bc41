"""A call of a layer as two objects: its input tensors, and a plan that says how it is computed.

Every function between the layer and a backend's steps takes these two. Only `ops` flattens them, for autograd and for
torch.library.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from mos_kernels.backends.interface import Prepared
from mos_kernels.config import MoSConfig


class LinearTensors(NamedTuple):
    """The tensors of one linear. The same class holds their gradients, or a bool for each one needed.

    A dense base is given as weight and bias. Any other base (quantised, wrapped, another adapter) is given by its
    output on x, `added`, without a weight. The linear is routed by given gates or by its own router. The fields after
    `router` have no gradient.
    """

    x: Tensor  # (..., d_in)
    weight: Tensor | None  # (d_out, d_in), any strides
    added: Tensor | None  # the bias (d_out,), or without a weight the base's output (..., d_out)
    A: Tensor  # (r, d_in) or (E, r, d_in)
    B: Tensor  # (d_out, E, r)
    kappa: Tensor  # (E,)
    gates: Tensor | None = None  # (..., E)
    router: Tensor | None = None  # (E, d_in)
    aux_weight: Tensor | None = None  # (1,), times the gradient of the router's load-balancing loss
    dropout_state: Tensor | None = None  # what the backend's `draw_dropout` drew
    token_mask: Tensor | None = None  # (...,), False for tokens that load balancing leaves out


class RouteTensors(NamedTuple):
    """The tensors of a router that serves several linears, as in `LinearTensors`."""

    x: Tensor
    router: Tensor
    aux_weight: Tensor | None = None
    token_mask: Tensor | None = None


class Adapted(NamedTuple):
    """The tensors of one linear of an FFN block, as in `LinearTensors`."""

    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    kappa: Tensor


class FFNTensors(NamedTuple):
    """The tensors of an FFN block: `reads`, the one or two linears that read x, and `down`, the last linear.

    The block is routed by `gates` or by its router, as in `LinearTensors`. x, gates, router and the adapters have
    gradients.
    """

    x: Tensor
    gates: Tensor | None
    router: Tensor | None
    aux_weight: Tensor | None
    token_mask: Tensor | None
    down: Adapted
    reads: tuple[Adapted, ...]

    @property
    def flat(self) -> tuple[Tensor | None, ...]:
        return (*self[:5], *self.down, *(tensor for linear in self.reads for tensor in linear))

    @classmethod
    def of(cls, flat: Sequence) -> FFNTensors:
        """The inverse of `flat`. The items may be other objects than tensors, such as gradients."""
        (x, gates, router, aux_weight, token_mask), linears, width = flat[:5], flat[5:], len(Adapted._fields)
        down, *reads = (Adapted(*linears[i : i + width]) for i in range(0, len(linears), width))
        return cls(x, gates, router, aux_weight, token_mask, down, tuple(reads))

    def gradients(
        self, needs: FFNTensors, dx: Any, dgates: Any, drouter: Any, down: Sequence, reads: Sequence[Sequence]
    ) -> FFNTensors:
        """These gradients with the shapes and dtypes of the tensors, where `needs` asks for them; else None.

        down, reads: of each linear dA, dB and dκ.
        """
        return FFNTensors(
            x=_like(self.x, dx, needs.x),
            gates=_like(self.gates, dgates, needs.gates),
            router=_like(self.router, drouter, needs.router),
            aux_weight=None, token_mask=None,
            down=_adapted_gradients(self.down, needs.down, down),
            reads=tuple(_adapted_gradients(*each) for each in zip(self.reads, needs.reads, reads, strict=True)),
        )  # fmt: skip


def _adapted_gradients(linear: Adapted, needs: Adapted, gradients: Sequence) -> Adapted:
    found: list[Any] = [None, None, *map(_like, linear[2:], gradients, needs[2:])]  # none of weight and bias
    return Adapted(*found)


def _like(t: Any, gradient: Any, needed: Any) -> Any:
    return gradient.view(t.shape).to(t.dtype) if needed else None


class FFNPlan(NamedTuple):
    """How a call of an FFN block runs: y = down(φ(g) u), or down(φ(g)) if it is not gated."""

    config: MoSConfig  # of the linears that read x
    down_config: MoSConfig
    backend: str
    activation: str  # "silu", "gelu" or "gelu_tanh"
    gated: bool
    fused: bool  # one linear makes both halves, g and u
    differentiable: bool  # whether a backward may follow
    prepared: tuple[Prepared | None, ...]  # where they are kept, of down and of those that read x
    constants: Any = None  # where it is kept, what the backend's `constants` made of the parameters


class Plan(NamedTuple):
    """How a call runs."""

    config: MoSConfig
    backend: str  # "eager" or "triton"
    differentiable: bool = True  # whether a backward may follow
    dropout_p: float = 0.0
    prepared: Prepared | None = None  # the backend's, of B, where it is kept


Tensors = TypeVar("Tensors", LinearTensors, RouteTensors)


def flattened(tensors: Tensors, plan: Plan) -> tuple[list[Tensor], str]:
    """(the tensors that are not None, a text with their names and the plan): the arguments of a registered op."""
    there = {name: t for name, t in zip(tensors._fields, tensors, strict=True) if t is not None}
    how = f"{plan.backend} {plan.differentiable} {plan.dropout_p} {plan.config.json}"
    return list(there.values()), ",".join(there) + " " + how


def unflattened(kind: type[Tensors], tensors: Sequence[Tensor], text: str) -> tuple[Tensors, Plan]:
    """The inverse of `flattened`."""
    there, plan = _read(text)
    found = dict(zip(there, tensors, strict=True))
    values: list[Any] = [found.get(name) for name in kind._fields]
    return kind(*values), plan


def names(text: str) -> tuple[str, ...]:
    """The names of the tensors that are not None."""
    return _read(text)[0]


@functools.lru_cache(maxsize=256)
def _read(text: str) -> tuple[tuple[str, ...], Plan]:
    there, backend, differentiable, dropout_p, config = text.split(" ", 4)
    plan = Plan(MoSConfig.from_dict(json.loads(config)), backend, differentiable == "True", float(dropout_p))
    return tuple(there.split(",")), plan


def flat(t: Tensor) -> Tensor:
    """(..., width) as (T, width)."""
    return t.reshape(-1, t.shape[-1])


def shaped(y: Tensor, x: Tensor) -> Tensor:
    """y (T, ·) in x's shape. Not a view, since autograd would forbid to change that in place."""
    return _unsafe_view(y, (*x.shape[:-1], y.shape[-1]))


_unsafe_view = torch.ops.aten._unsafe_view.default  # less to look up at each call


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a dense base and its adapter read x: that of autocast if it is on, else that of x."""
    return torch.get_autocast_dtype(x.device.type) if is_autocast(x) else x.dtype


def is_autocast(x: Tensor) -> bool:
    """Whether autocast would cast x. It does not cast float64, and does not exist for the meta device."""
    if not torch._C._is_any_autocast_enabled():
        return False
    return not x.is_meta and x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type)


def without_autocast(x: Tensor):
    """A context in which autocast is off on x's device."""
    if x.is_meta or not (torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type)):
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)
