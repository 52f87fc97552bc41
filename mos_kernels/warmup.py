"""Compile every kernel that a model will launch, before it is needed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mos_kernels.backends import load_backend, resolve_backend
from mos_kernels.ffn import bound_form, decoding_of
from mos_kernels.functional import mos_linear, mos_route
from mos_kernels.layer import MoSAdapter, MoSLayer, MoSRouter, device_and_dtype


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
        training = [module for module in (block.mos_router, *linears) if module.training]
        try:
            for module in training:
                module.training = False  # not .eval(), which drops what freeze_for_inference computed
            with torch.no_grad():
                weight = linears[0].weight
                x = torch.zeros(DECODE_TOKENS, linears[0].in_features, dtype=weight.dtype, device=weight.device)
                decoding = decoding_of(block, form, x)
                if decoding is not None:
                    _, logits = decoding.read()
                    decoding.write(x.new_zeros(DECODE_TOKENS, decoding.last.tensors.weight.shape[1]), logits)
        finally:
            for module in training:
                module.training = True


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
    with torch.random.fork_rng(devices):
        for tokens in (DECODE_TOKENS, DECODE_TOKENS + 1):
            for differentiable, masked in ((True, False), (True, True), (False, False)):
                x = torch.zeros(tokens, module.in_features, dtype=dtype, device=device)
                with torch.set_grad_enabled(differentiable):
                    y = _forward(module, base, x, differentiable, masked)
                if differentiable:
                    y.sum().backward()
                elif isinstance(module, MoSAdapter):  # what is kept of the parameters has the inputs' dtype
                    with torch.no_grad():
                        _forward(module, base, x, False, False, kept=True)


def _forward(
    module: nn.Module, base: nn.Module, x: Tensor, differentiable: bool, masked: bool, kept: bool = False
) -> Tensor:
    def stand_in(t: Tensor | None, needs_grad: bool = True) -> Tensor | None:
        return None if t is None else t.detach().requires_grad_(differentiable and needs_grad)

    config, x = module.config, stand_in(x)
    aux = module.mos_aux_weight if module.training and config.router_aux_loss_coef > 0 else None
    mask = torch.ones(x.shape[0], dtype=torch.bool, device=x.device) if masked else None
    if isinstance(module, MoSRouter):
        weight, inference = stand_in(module.weight), not differentiable
        return mos_route(x, weight, config=config, aux_weight=aux, token_mask=mask, inference=inference)
    own = module.mos_router is not None
    gates = None if own else stand_in(torch.zeros(x.shape[0], config.num_experts, device=x.device))
    weight, bias, base_output = base._base(x)
    weight = None if weight is None else stand_in(weight, False).to(x.dtype)
    A, prepared = stand_in(module.mos_lora_A), None
    if kept:
        steps = load_backend(resolve_backend("auto", x))
        y_dtype = x.dtype if base_output is None else base_output.dtype
        A, prepared = steps.operand(A, x.dtype), steps.prepare(module.mos_lora_B, y_dtype, config)
    return mos_linear(
        x, weight, stand_in(bias, False), A, stand_in(module.mos_lora_B),
        stand_in(module.curvature), config=config, prepared=prepared, base_output=base_output, gates=gates,
        router=stand_in(module.mos_router), aux_weight=aux if own else None,
        token_mask=mask if own else None,
        dropout_p=config.lora_dropout if module.training else 0.0, inference=not differentiable,
    )  # fmt: skip
