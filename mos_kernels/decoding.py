"""The adapted linears of an FFN block on the few tokens of decoding, in fewer launches than one after the other.

Launches are most of what decoding costs beside the weights. One shrink reads x for the router and the linears that
read x, one launch is bridge and expand of gate and up projection, and gates are made from the logits where they are
used.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mos_kernels.backends import load_backend, resolve_backend
from mos_kernels.config import MoSConfig
from mos_kernels.functional import autocast_dtype, check_device, check_input
from mos_kernels.kept import is_plain
from mos_kernels.layer import MoSConv1D, MoSLayer, MoSLinear, MoSRouter
from mos_kernels.sharded import is_dtensor
from mos_kernels.steps import Operands, linear_forward, pair_forward


class Decoding(NamedTuple):
    """An FFN block's router and adapted linears on x (..., d_in), without a backward."""

    x: Tensor
    router: Tensor
    inputs: tuple[Operands, ...]  # one or two, which read x, and their configuration
    config: MoSConfig
    last: Operands
    last_config: MoSConfig

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
            or not all(map(_runs_its_own_forward, (router, *linears)))
            or any(_routing(linear) != _routing(router) or linear.mos_router is not None for linear in linears)
            or any(is_dtensor(linear.mos_lora_B) for linear in linears)
        ):
            return None
        *inputs, last = linears
        made = cls(
            x, router.weight, tuple(_operands(linear, x, backend) for linear in inputs), inputs[0].config,
            _operands(last, x, backend), last.config,
        )  # fmt: skip
        alike = len(inputs) == 1 or (inputs[0].config == inputs[1].config and _are_alike(*made.inputs))
        return made if alike and made._fits() else None

    def _fits(self) -> bool:
        """Whether the tensors go together. Where they do not, the modules' own calls say what is wrong."""
        x, E = self.x, self.config.num_experts
        if tuple(self.router.shape) != (E, x.shape[-1]) or any(o.weight.shape[1] != x.shape[-1] for o in self.inputs):
            return False
        linears = [*((o, self.config) for o in self.inputs), (self.last, self.last_config)]
        if any(o.weight.dtype != x.dtype or not _are_shaped(o, config) for o, config in linears):
            return False
        tensors = [self.router, *(t for o, _ in linears for t in (*o[:-1], *(o.prepared or ())) if t is not None)]
        return all(t.device == x.device and not is_dtensor(t) for t in tensors)

    def read(self) -> tuple[list[Tensor], Tensor]:
        """The outputs (..., d_out) of the linears that read x, and the router's logits, in the kernels' form."""
        if len(self.inputs) == 2:
            return pair_forward(self.x, self.inputs, self.router, self.config)
        *factors, prepared = self.inputs[0]
        y, _, _, logits, _ = linear_forward(
            self.x, *factors, None, self.router, None, 0.0, prepared, self.config, "triton", False
        )  # fmt: skip
        return [y], logits

    def write(self, hidden: Tensor, logits: Tensor) -> Tensor:
        """The last linear's output (..., d_out) on hidden (..., d_hidden), which the logits of `read` route.

        Raises ValueError for a hidden that does not fit.
        """
        weight = self.last.weight
        check_input(hidden, weight, weight.shape[1])
        check_device(hidden, weight=weight)
        if hidden.shape[:-1] != self.x.shape[:-1]:
            shapes = tuple(self.x.shape[:-1]), tuple(hidden.shape[:-1])
            raise ValueError("the block reads tokens {}, its last linear {}: both must be the same".format(*shapes))
        *factors, prepared = self.last
        return linear_forward(
            hidden, *factors, None, None, None, 0.0, prepared, self.last_config, "triton", False, logits
        )[0]  # fmt: skip


def _runs_its_own_forward(module: nn.Module) -> bool:
    """Whether calling the module, in eval mode, would run its forward and nothing else.

    What replaces a method of the class, or of nn.Module, is not seen.
    """
    everywhere, own = nn.modules.module, vars(module)
    return not (
        module.training
        or module._forward_hooks
        or module._forward_pre_hooks
        or everywhere._global_forward_hooks
        or everywhere._global_forward_pre_hooks
        or module._compiled_call_impl is not None
        or "forward" in own
        or "_call_impl" in own
    )


def _routing(module: MoSLayer | MoSRouter) -> tuple[int, int, bool]:
    config = module.config
    return config.num_experts, config.num_experts_per_tok, config.norm_topk_prob


def _operands(linear: MoSLayer, x: Tensor, backend: str) -> Operands:
    kappa, A, prepared = linear._factors(x, None, backend)
    return Operands(linear._dense_weight, linear.bias, A, linear.mos_lora_B, kappa, prepared)


def _are_shaped(o: Operands, config: MoSConfig) -> bool:
    (d_out, d_in), E, r = o.weight.shape, config.num_experts, config.r
    return (
        tuple(o.A.shape) == ((r, d_in) if config.share_a else (E, r, d_in))
        and tuple(o.B.shape) == (d_out, E, r)
        and tuple(o.kappa.shape) == (E,)
        and (o.bias is None or tuple(o.bias.shape) == (d_out,))
    )


def _are_alike(first: Operands, second: Operands) -> bool:
    def dtype(t: Tensor | None) -> torch.dtype | None:
        return None if t is None else t.dtype

    return (
        first.weight.shape == second.weight.shape
        and first.A.dtype == second.A.dtype
        and dtype(first.bias) == dtype(second.bias)
    )
