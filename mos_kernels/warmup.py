"""Compile every kernel that a model will launch, before it is needed."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from mos_kernels import ops
from mos_kernels.backends import resolve_backend
from mos_kernels.ffn import bound_form, why_not_one
from mos_kernels.ffn_node import as_one
from mos_kernels.layer import MoSAdapter, MoSLayer, MoSRouter, device_and_dtype


def warmup(model: nn.Module, dtype: torch.dtype | None = None) -> int:
    """Compile the Triton kernels of `model` before they are needed, by running its parts on zeros.

    Each distinct adapted linear, router and FFN block that is one operation runs once for few tokens and once for many.
    After this, an input of any length compiles nothing.

    dtype: of the inputs, if it differs from that of the weights (autocast). Without it, routers run in the dtype of
    every adapted linear. Parameters, gradients, buffers and random state stay as they are. Returns the number of
    distinct linears and routers; 0 if the backend compiles nothing.
    """
    seen, adapted = set(), list(_adapted(model))
    linears_read = {device_and_dtype(base)[1] for module, base in adapted if isinstance(module, MoSAdapter)}
    for module, base in adapted:
        if isinstance(module, MoSAdapter):
            device, base_dtype = device_and_dtype(base)
            x_dtypes = {base_dtype}
            shape, bias = tuple(module.mos_lora_B.shape), getattr(base, "bias", None) is not None
        else:
            device, shape, bias = module.weight.device, module.weight.shape, False
            x_dtypes = linears_read or {torch.get_default_dtype()}
        x_dtypes = x_dtypes if dtype is None else {dtype}
        warm = [d for d in x_dtypes if resolve_backend("auto", torch.empty(0, dtype=d, device=device)) == "triton"]
        key = type(base), module.config.json, shape, module.in_features, *warm, device, bias, module.training
        if warm and key not in seen:
            seen.add(key)
            for x_dtype in warm:
                output = functools.partial(_output, base=base)
                _run(module, output, module.in_features, x_dtype, device, x_dtype)
    if seen:
        _run_blocks(model, dtype)
    return len(seen)


def _run_blocks(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Run each distinct FFN block that is one operation."""
    seen = set()
    for block in model.modules():
        form = bound_form(block)
        if form is None or why_not_one(block, form) is not None:
            continue
        tensors = ((tuple(p.shape), p.dtype, p.device) for p in block.parameters())
        kinds = (form, block.training, *map(repr, block.children()), *tensors)
        if kinds in seen:
            continue
        seen.add(kinds)
        reads = getattr(block, form.inputs[0])
        device, base_dtype = device_and_dtype(reads)

        def run(twin: nn.Module, x: Tensor, form=form) -> Tensor | None:
            one = as_one(twin, form, x)
            return None if one is None else ops.ffn(*one)

        for x_dtype in {base_dtype, dtype or base_dtype}:
            _run(block, run, reads.in_features, x_dtype, device, dtype or base_dtype)
        if dtype in (None, base_dtype):  # what a block keeps is not used under autocast
            _run(block, run, reads.in_features, base_dtype, device, None)


def _adapted(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """The adapters that have kernels, and the routers; each adapter with the layer that has its base."""
    for module in model.modules():
        several = module._modules.get("mos_adapter")
        if isinstance(module, (MoSLayer, MoSRouter)):
            found = [module]
        else:
            found = several.values() if isinstance(several, nn.ModuleDict) else []
        yield from ((adapter, module) for adapter in found if not adapter.config.is_lora)


def _run(
    module: nn.Module, output: Callable, width: int, x_dtype: torch.dtype, device, dtype: torch.dtype | None
) -> None:
    """Run copies of the module on x of x_dtype, under autocast to dtype. output(copy, x) -> the output, or None."""
    from mos_kernels.backends.triton.launch import DECODE_TOKENS

    devices = [device] if device.type == "cuda" else []
    modes = [(False, True, False), (False, False, False)]  # training, with gradients, masked
    if module.training:
        modes = [(True, True, False), (True, True, True), *modes]
    autocast = torch.autocast(device.type, dtype, enabled=dtype in (torch.bfloat16, torch.float16))
    with torch.random.fork_rng(devices), autocast:
        for tokens in (DECODE_TOKENS, DECODE_TOKENS + 1):
            for training, differentiable, masked in modes:
                x = torch.zeros(tokens, width, dtype=x_dtype, device=device, requires_grad=differentiable)
                with torch.set_grad_enabled(differentiable):
                    y = output(_twin(module, training, masked), x)
                if differentiable and y is not None:
                    y.sum().backward()


def _twin(module: nn.Module, training: bool, masked: bool) -> nn.Module:
    """A copy that shares the module's values, but not its gradients, its hooks or its cached tensors."""
    twin, ours = copy.copy(module), isinstance(module, (MoSAdapter, MoSRouter))
    parameters = {
        name: None if p is None else p.detach().requires_grad_(name.startswith("mos_") or isinstance(module, MoSRouter))
        for name, p in module._parameters.items()
    }
    vars(twin).update(training=training, _parameters=parameters, _forward_hooks={}, _forward_pre_hooks={})
    if ours:
        vars(twin).update(token_mask=_AllReal() if masked else None)
    else:  # a block that is one operation, or what holds its adapters
        vars(twin).update(_modules={n: _twin(child, training, masked) for n, child in module._modules.items()})
    return twin


class _AllReal:
    """A mask in which every token is real."""

    def of(self, x: Tensor) -> Tensor:
        return torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)


def _output(twin: nn.Module, x: Tensor, base: nn.Module) -> Tensor:
    if isinstance(twin, MoSRouter):
        return type(twin).forward(twin, x)  # not through a wrapper of accelerate's, which is bound to the module
    gates = None
    if twin.mos_router is None:
        gates = torch.zeros(x.shape[0], twin.config.num_experts, device=x.device, requires_grad=x.requires_grad)
    return twin._adapt(x, gates, "auto", *(None if t is None else t.detach() for t in base._base(x)))
