"""The forward of an FFN block whose linears share a router: as one operation, or linear by linear with the gates."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mos_kernels import ops
from mos_kernels.backends import resolve_backend
from mos_kernels.backends.eager_ffn import phi
from mos_kernels.call import FFNPlan, FFNTensors, autocast_dtype, is_autocast
from mos_kernels.ffn_kept import looked_up, remembered
from mos_kernels.ffn_node import FFNForm, Observer, Part, Parts, is_called_plainly, parts_of, phi_of, why_not_one
from mos_kernels.functional import require_gates
from mos_kernels.kept import Factors, is_transformed
from mos_kernels.layer import MoSLayer, balancing, dense_weight
from mos_kernels.sharded import is_dtensor

__all__ = ["FFNForm", "as_one", "bound_form", "ffn_forward", "why_not_one"]


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
    hidden = hidden if form.phi is None else phi(hidden, form.phi)
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
    if name not in form.routed:
        return linear(x)
    if isinstance(linear, nn.Linear) and not isinstance(linear, MoSLayer):
        raise ValueError(
            f"{name!r} of a {type(block).__name__} has lost its adapter: something has replaced the linear. Replace it "
            "before the adapter is put on, or call remove_mos(model) and apply the adapter again"
        )
    return linear(x, gates)


def _through(block: nn.Module, names: tuple[str, ...], x: Tensor) -> Tensor:
    for name in names:
        x = getattr(block, name)(x)
    return x


# the one operation


def as_one(block: nn.Module, form: FFNForm, x: Tensor, backend: str = "auto") -> tuple[FFNTensors, FFNPlan] | None:
    """The inputs of the one operation, or None if the linears are called one by one."""
    if torch.compiler.is_compiling() or type(x) not in (Tensor, nn.Parameter):
        return None
    again = looked_up(block, form, x, backend)
    if again is not None:
        return again
    if x.dim() == 0 or x.is_meta:
        return None
    if getattr(block._modules.get("mos_router"), "_standing", None) is not None:
        block.mos_router._standing = None  # it holds parameters, and copies of them
    parts = parts_of(block, form)
    if isinstance(parts, str) or is_transformed():
        return None
    if any(getattr(block, name).training and getattr(getattr(block, name), "p", 0) > 0 for name in form.hidden):
        return None
    if any(part.adapter.training and part.adapter.config.lora_dropout > 0 for part in parts.all):
        return None
    dtype = autocast_dtype(x)
    if not _fits(x, parts, form):
        return None
    backend = resolve_backend(backend, x)
    down, *reads = (part.adapted(dtype, factors) for part, factors in zip(*_factors(parts, x, backend), strict=True))
    gates = aux_weight = mask = None
    observers = [hook for hook in parts.router._forward_hooks.values() if isinstance(hook, Observer)]
    routers = {block.mos_router: 0, parts.router: len(observers)}
    if dtype == x.dtype and all(is_called_plainly(router, observed) for router, observed in routers.items()):
        for observer in observers:
            observer.observe(x)
        aux_weight, mask = balancing(parts.router, x)
        if mask is not None and mask.shape != x.shape[:-1]:
            return None
    else:  # a hook wants to see it, or autocast casts x, but not what the router reads
        gates = block.mos_router(x)
        if not isinstance(gates, Tensor):  # of the peft method, by adapter
            gates = next(gates[name] for name, router in block.mos_router.items() if router is parts.router)
        require_gates(gates, x, parts.router.config)
    tensors = FFNTensors(
        x.to(dtype), gates, parts.router.weight if gates is None else None, aux_weight, mask,
        down[0], tuple(linear for linear, _ in reads),
    )  # fmt: skip
    plan = FFNPlan(
        parts.reads[0].adapter.config, parts.down.adapter.config, backend, phi_of(block, form),
        gated=form.fused or len(reads) == 2, fused=form.fused,
        differentiable=torch.is_grad_enabled() or parts.training,
        prepared=(down[1], *(prepared for _, prepared in reads)),
    )  # fmt: skip
    return tensors, remembered(block, form, parts, tensors, plan)


def _factors(parts: Parts, x: Tensor, backend: str) -> tuple[list[Part], list[Factors]]:
    """The linears, the last of them first, and what a call wants of their parameters."""
    linears = [parts.down, *parts.reads]
    adapters = [part.adapter for part in linears]
    if backend == "eager" or not torch.is_grad_enabled() or any(a.config.curvature_max_grad_norm for a in adapters):
        return linears, [adapter._factors(x, None, backend) for adapter in adapters]
    thetas, maps = [a.mos_curvature for a in adapters], [a.mos_curvature_map for a in adapters]
    kappas = _Curvatures.apply(len(adapters), *thetas, *maps)
    return linears, [Factors(kappa, a.mos_lora_A, None) for kappa, a in zip(kappas, adapters, strict=True)]


class _Curvatures(torch.autograd.Function):
    """κ = offset + gain·θ of several adapters in a launch each way. Their dκ is finite, so a gain of 0 leaves 0."""

    @staticmethod
    def forward(ctx, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        thetas, maps = tensors[:count], tensors[count:]
        ctx.save_for_backward(*maps)
        ctx.dtypes = [theta.dtype for theta in thetas]
        offsets, gains = ([each[i] for each in maps] for i in range(2))
        return tuple(torch._foreach_addcmul(offsets, gains, [theta.float() for theta in thetas]))

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        found = torch._foreach_mul([each[1] for each in ctx.saved_tensors], list(gradients))
        return None, *(t.to(dtype) for t, dtype in zip(found, ctx.dtypes, strict=True)), *[None] * len(found)


def _fits(x: Tensor, parts: Parts, form: FFNForm) -> bool:
    """Whether the tensors go together. Where they do not, the modules' own calls say what is wrong."""
    if any(t is not None and (t.device != x.device or is_dtensor(t)) for t in parts.tensors()):
        return False
    if not x.is_floating_point() or parts.router.weight.shape != (parts.router.config.num_experts, x.shape[-1]):
        return False
    *reads, down = weights = [dense_weight(part.base) for part in parts.all]
    hidden, casts = down.shape[1] * (2 if form.fused else 1), is_autocast(x)
    if any(weight.shape != (hidden, x.shape[-1]) for weight in reads):
        return False
    for part, weight in zip(parts.all, weights, strict=True):
        adapter, config = part.adapter, part.adapter.config
        if not (weight.dtype == x.dtype or casts and weight.is_floating_point()):
            return False
        (d_out, d_in), E, r = weight.shape, config.num_experts, config.r
        if part.base.bias is not None and part.base.bias.shape != (d_out,):
            return False
        if adapter.mos_lora_B.shape != (d_out, E, r) or adapter.mos_curvature.shape != (E,):
            return False
        if adapter.mos_lora_A.shape != ((r, d_in) if config.share_a else (E, r, d_in)):
            return False
    return True
