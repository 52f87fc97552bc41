"""The adapted linears of an FFN block on the few tokens of decoding, in fewer launches than one after the other.

Launches are most of what decoding costs beside the weights. One shrink reads x for the router and the linears that
read x, one launch is bridge and expand of gate and up projection, and gates are made from the logits where they are
used.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from mos_kernels.backends import load_backend, resolve_backend
from mos_kernels.call import LinearTensors, Plan, autocast_dtype
from mos_kernels.ffn_node import is_called_plainly, routing_of
from mos_kernels.functional import check_device, check_input
from mos_kernels.kept import is_plain
from mos_kernels.layer import MoSConv1D, MoSLayer, MoSLinear, MoSRouter
from mos_kernels.sharded import is_dtensor
from mos_kernels.steps import linear_forward, pair_forward


class Linear(NamedTuple):
    """A linear without its router, and how it runs."""

    tensors: LinearTensors
    plan: Plan

    @classmethod
    def of(cls, layer: MoSLayer, x: Tensor) -> Linear:
        """x: what the linear reads, or another input of its dtype on its device."""
        kappa, A, prepared = layer._factors(x, None, "triton")
        tensors = LinearTensors(x, layer._dense_weight, layer.bias, A, layer.mos_lora_B, kappa)
        return cls(tensors, Plan(layer.config, "triton", False, prepared=prepared))

    def reading(self, x: Tensor) -> Linear:
        return self._replace(tensors=self.tensors._replace(x=x))

    def fits(self) -> bool:
        """Whether its tensors have the shapes that its configuration asks for, and the weight x's dtype."""
        t, config = self.tensors, self.plan.config
        (d_out, d_in), E, r = t.weight.shape, config.num_experts, config.r
        return (
            t.weight.dtype == t.x.dtype
            and tuple(t.A.shape) == ((r, d_in) if config.share_a else (E, r, d_in))
            and tuple(t.B.shape) == (d_out, E, r)
            and tuple(t.kappa.shape) == (E,)
            and (t.added is None or tuple(t.added.shape) == (d_out,))
        )

    def is_like(self, other: Linear) -> bool:
        def kinds(linear: Linear) -> list:
            t = linear.tensors
            return [linear.plan.config, t.weight.shape, *(None if u is None else u.dtype for u in (t.A, t.added))]

        return kinds(self) == kinds(other)


class Decoding(NamedTuple):
    """An FFN block's router and adapted linears on x (..., d_in), without a backward."""

    router: Tensor
    inputs: tuple[Linear, ...]  # one or two, which read x
    last: Linear

    @classmethod
    def of(cls, router: nn.Module, linears: tuple[nn.Module, ...], x: Tensor, backend: str = "auto") -> Decoding | None:
        """None where the modules have to be called one by one. linears: those that read x, and the last."""
        if not is_plain(x) or x.dim() == 0 or autocast_dtype(x) != x.dtype:
            return None
        if resolve_backend(backend, x) != "triton":
            return None
        few, tokens = load_backend("triton").shares_launches, x.shape[:-1].numel()
        if (
            type(router) is not MoSRouter
            or any(type(linear) not in (MoSLinear, MoSConv1D) for linear in linears)
            or not all(few(tokens, linear.config) for linear in linears)
            or any(module.training or not is_called_plainly(module) for module in (router, *linears))
            or any(routing_of(linear) != routing_of(router) or linear.mos_router is not None for linear in linears)
            or any(is_dtensor(linear.mos_lora_B) for linear in linears)
        ):
            return None
        *inputs, last = (Linear.of(linear, x) for linear in linears)
        made = cls(router.weight, tuple(inputs), last)
        return made if made._fits(x) else None

    def _fits(self, x: Tensor) -> bool:
        """Whether the tensors go together. Where they do not, the modules' own calls say what is wrong."""
        first, linears = self.inputs[0], (*self.inputs, self.last)
        if tuple(self.router.shape) != (first.plan.config.num_experts, x.shape[-1]):
            return False
        if any(linear.tensors.weight.shape[1] != x.shape[-1] for linear in self.inputs):
            return False
        if not all(linear.fits() for linear in linears) or not all(first.is_like(other) for other in self.inputs):
            return False
        tensors = [t for linear in linears for t in (*linear.tensors, *(linear.plan.prepared or ())) if t is not None]
        return all(t.device == x.device and not is_dtensor(t) for t in (self.router, *tensors))

    def read(self) -> tuple[list[Tensor], Tensor]:
        """The outputs (..., d_out) of the linears that read x, and the router's logits, in the kernels' form."""
        tensors, plans = zip(*self.inputs, strict=True)
        if len(tensors) == 2:
            return pair_forward(tensors, [plan.prepared for plan in plans], self.router, plans[0])
        y, saved = linear_forward(tensors[0]._replace(router=self.router), plans[0])
        return [y], saved.logits

    def write(self, hidden: Tensor, logits: Tensor) -> Tensor:
        """The last linear's output (..., d_out) on hidden (..., d_hidden), which the logits of `read` route.

        Raises ValueError for a hidden that does not fit.
        """
        (tensors, plan), before = self.last.reading(hidden), self.last.tensors.x
        check_input(hidden, tensors.weight, tensors.weight.shape[1])
        check_device(tensors)
        if hidden.shape[:-1] != before.shape[:-1]:
            shapes = tuple(before.shape[:-1]), tuple(hidden.shape[:-1])
            raise ValueError("the block reads tokens {}, its last linear {}: both must be the same".format(*shapes))
        return linear_forward(tensors, plan, logits)[0]
