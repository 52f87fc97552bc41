"""Compile every kernel that a model will launch, before it is needed."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mos_kernels.backends import resolve_backend
from mos_kernels.ffn import bound_form, decoding_of
from mos_kernels.layer import MoSAdapter, MoSLayer, MoSRouter, device_and_dtype, evaluating


def warmup(model: nn.Module, dtype: torch.dtype | None = None) -> int:
    """Run each distinct adapted linear and router of `model` once in every launch bucket, on zeros.

    And the linears of each FFN block as they share launches in decoding.

    After this, no length of input compiles anything. dtype: the inputs', where it is not the weights' (autocast).
    Parameters, gradients, buffers and random state stay as they are. Returns the number of distinct modules; 0 where
    the backend has nothing to compile.
    """
    seen = set()
    for module, base in _adapted(model):
        if isinstance(module, MoSAdapter):
            device, x_dtype = device_and_dtype(base)
            shape, bias = tuple(module.mos_lora_B.shape), getattr(base, "bias", None) is not None
        else:
            device, x_dtype, shape, bias = module.weight.device, torch.get_default_dtype(), module.weight.shape, False
        x_dtype = dtype or x_dtype
        if resolve_backend("auto", torch.empty(0, dtype=x_dtype, device=device)) != "triton":
            continue
        key = type(base), module.config.json, shape, module.in_features, x_dtype, device, bias, module.training
        if key not in seen:
            seen.add(key)
            _run(module, base, x_dtype, device)
    if seen:
        _run_blocks(model)
    return len(seen)


def _run_blocks(model: nn.Module) -> None:
    """The linears of each distinct FFN block together, where they share launches in eval mode on few tokens."""
    from mos_kernels.backends.triton.launch import DECODE_TOKENS

    seen = set()
    for block in model.modules():
        form = bound_form(block)
        linears = [] if form is None else [getattr(block, name) for name in form.linears]
        if not linears or not all(isinstance(linear, MoSLayer) for linear in linears):
            continue
        kinds = [
            (type(m), m.config.json, tuple(map(_kind, m.parameters(recurse=False))))
            for m in (block.mos_router, *linears)
        ]
        if tuple(kinds) in seen:
            continue
        seen.add(tuple(kinds))
        with torch.no_grad(), evaluating(block.mos_router, *linears):
            weight = linears[0].weight
            x = torch.zeros(DECODE_TOKENS, linears[0].in_features, dtype=weight.dtype, device=weight.device)
            decoding = decoding_of(block, form, x)
            if decoding is not None:
                _, logits = decoding.read()
                decoding.write(x.new_zeros(DECODE_TOKENS, decoding.last.tensors.weight.shape[1]), logits)


def _kind(t: Tensor) -> tuple:
    return tuple(t.shape), t.dtype, t.device


def _adapted(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Adapters that have kernels, with the layer that has their base, and routers."""
    for module in model.modules():
        several = module._modules.get("mos_adapter")
        if isinstance(module, (MoSLayer, MoSRouter)):
            found = [module]
        else:
            found = several.values() if isinstance(several, nn.ModuleDict) else []
        yield from ((adapter, module) for adapter in found if not adapter.config.is_lora)


def _run(module: nn.Module, base: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    from mos_kernels.backends.triton.launch import DECODE_TOKENS

    devices = [device] if device.type == "cuda" else []
    modes = [(False, True, False), (False, False, False)]  # training, with gradients, masked
    if module.training:
        modes = [(True, True, False), (True, True, True), *modes]
    autocast = torch.autocast(device.type, dtype, enabled=dtype in (torch.bfloat16, torch.float16))
    with torch.random.fork_rng(devices), autocast:
        for tokens in (DECODE_TOKENS, DECODE_TOKENS + 1):
            for training, differentiable, masked in modes:
                x = torch.zeros(tokens, module.in_features, dtype=dtype, device=device, requires_grad=differentiable)
                with torch.set_grad_enabled(differentiable):
                    y = _output(_twin(module, training, masked), base, x)
                if differentiable:
                    y.sum().backward()


def _twin(module: nn.Module, training: bool, masked: bool) -> nn.Module:
    """A copy that shares the module's values, and neither its gradients nor what it keeps of them."""
    twin = copy.copy(module)
    parameters = {name: None if p is None else p.detach().requires_grad_() for name, p in module._parameters.items()}
    vars(twin).update(training=training, token_mask=_AllReal() if masked else None, _parameters=parameters)
    return twin


class _AllReal:
    """A mask in which every token is real."""

    def of(self, x: Tensor) -> Tensor:
        return torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)


def _output(twin: nn.Module, base: nn.Module, x: Tensor) -> Tensor:
    if isinstance(twin, MoSRouter):
        return type(twin).forward(twin, x)  # not through a wrapper of accelerate's, which is bound to the module
    gates = None
    if twin.mos_router is None:
        gates = torch.zeros(x.shape[0], twin.config.num_experts, device=x.device, requires_grad=x.requires_grad)
    return twin._adapt(x, gates, "auto", *(None if t is None else t.detach() for t in base._base(x)))
