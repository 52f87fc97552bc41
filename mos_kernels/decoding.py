"""The adapted linears of an FFN block on the few tokens of decoding, in fewer launches than one after the other.

Launches are most of what decoding costs beside the weights. One shrink reads x for the router and the linears that
read x, one launch is bridge and expand of gate and up projection, and gates are made from the logits where they are
used.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mos_kernels.adapter import check_input
from mos_kernels.backends import load_backend, resolve_backend
from mos_kernels.layer import MoSConv1D, MoSLayer, MoSLinear, MoSRouter
from mos_kernels.sharded import is_dtensor
from mos_kernels.steps import Operands, linear_forward, pair_forward


class Decoding(NamedTuple):
    """An FFN block's router and adapted linears on x (..., d_in), without a backward."""

    router: MoSRouter
    inputs: tuple[MoSLayer, ...]  # one or two, which read x
    last: MoSLayer
    x: Tensor
    backend: str

    @classmethod
    def of(cls, router: nn.Module, linears: tuple[nn.Module, ...], x: Tensor, backend: str = "auto") -> Decoding | None:
        """None where the modules have to be called one by one. linears: those that read x, and the last."""
        *inputs, last = linears
        if (
            torch.compiler.is_compiling()
            or torch.jit.is_tracing()
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled(x.device.type)
            or torch._C._are_functorch_transforms_active()
            or type(router) is not MoSRouter
            or any(type(linear) not in (MoSLinear, MoSConv1D) for linear in linears)
            or not all(map(_runs_its_own_forward, (router, *linears)))
            or not _fit(router, inputs, last, x)
            or resolve_backend(backend, x) != "triton"
        ):
            return None
        steps, tokens = load_backend("triton"), x.shape[:-1].numel()
        if not all(steps.takes_pairs(tokens, linear.config) for linear in linears):
            return None
        return cls(router, tuple(inputs), last, x, backend)

    def read(self) -> tuple[list[Tensor], Tensor]:
        """The outputs (..., d_out) of the linears that read x, and the router's logits, in the backend's form."""
        x, router, config = self.x, self.router.weight, self.inputs[0].config
        operands = [self._operands(linear, x) for linear in self.inputs]
        if len(operands) == 2:
            return pair_forward(x, operands, router, config, "triton")
        *factors, prepared = operands[0]
        y, _, _, logits, _ = linear_forward(
            x, *factors, None, router, None, 0.0, prepared, config, "triton", False
        )  # fmt: skip
        return [y], logits

    def write(self, hidden: Tensor, logits: Tensor) -> Tensor:
        """The last linear's output (..., d_out) on hidden (..., d_hidden), which the logits of `read` route.

        Raises ValueError for a hidden that does not fit.
        """
        check_input(hidden, self.last._dense_weight, self.last.in_features)
        if hidden.shape[:-1] != self.x.shape[:-1]:
            shapes = tuple(self.x.shape[:-1]), tuple(hidden.shape[:-1])
            raise ValueError("the block reads tokens {}, its last linear {}: both must be the same".format(*shapes))
        *factors, prepared = self._operands(self.last, hidden)
        return linear_forward(
            hidden, *factors, None, None, None, 0.0, prepared, self.last.config, "triton", False, logits
        )[0]  # fmt: skip

    def _operands(self, linear: MoSLayer, x: Tensor) -> Operands:
        kappa, A, prepared = linear._factors(x, x.dtype, self.backend)
        return Operands(linear._dense_weight, linear.bias, A, linear.mos_lora_B, kappa, prepared)


def _runs_its_own_forward(module: nn.Module) -> bool:
    """Whether calling the module, in eval mode, would run the forward of its class and nothing else."""
    everywhere = nn.modules.module
    return not (
        module.training
        or module._forward_hooks
        or module._forward_pre_hooks
        or everywhere._global_forward_hooks
        or everywhere._global_forward_pre_hooks
        or module._compiled_call_impl is not None
        or "forward" in vars(module)
    )


def _fit(router: MoSRouter, inputs: list[MoSLayer], last: MoSLayer, x: Tensor) -> bool:
    """Whether the tensors go together. Where they do not, the modules' own calls say what is wrong."""
    linears, config = (*inputs, last), router.config
    if len(inputs) == 2 and not _are_alike(*inputs):
        return False
    if x.dim() == 0 or any(linear.in_features != x.shape[-1] for linear in (router, *inputs)):
        return False
    if any(_routing(linear.config) != _routing(config) or linear.mos_router is not None for linear in linears):
        return False
    if any(linear.weight.dtype != x.dtype for linear in linears):
        return False
    tensors = (router.weight, *(t for linear in linears for t in (linear.weight, linear.mos_lora_A, linear.mos_lora_B)))
    return all(t.device == x.device and not is_dtensor(t) for t in tensors)


def _routing(config) -> tuple[int, int, bool]:
    return config.num_experts, config.num_experts_per_tok, config.norm_topk_prob


def _are_alike(first: MoSLayer, second: MoSLayer) -> bool:
    return (
        (first.config is second.config or first.config == second.config)
        and first.out_features == second.out_features
        and (first.bias is None) == (second.bias is None)
    )
