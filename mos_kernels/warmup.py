"""Compile every kernel that a model will launch, before it is needed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mos_kernels import ops
from mos_kernels.backends import load_backend, resolve_backend
from mos_kernels.call import Adapted
from mos_kernels.ffn import FFNForm, bound_form, why_not_one
from mos_kernels.ffn_node import as_one
from mos_kernels.functional import mos_linear, mos_route
from mos_kernels.layer import MoSAdapter, MoSLayer, MoSRouter, device_and_dtype


def warmup(model: nn.Module, dtype: torch.dtype | None = None) -> int:
    """Run each distinct adapted linear and router of `model` once in every launch bucket, on zeros.

    And each distinct FFN block that is one operation.

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
        _run_blocks(model, dtype)
    return len(seen)


def _run_blocks(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Each distinct FFN block that is one operation, in training and in inference."""
    from mos_kernels.backends.triton.launch import DECODE_TOKENS

    seen = set()
    for block in model.modules():
        form = bound_form(block)
        if form is None or why_not_one(block, form) is not None:
            continue
        kinds = (repr(form), *map(repr, block.children()), *map(_kind, block.parameters()))
        if kinds in seen:
            continue
        seen.add(kinds)
        first = getattr(block, form.inputs[0])
        base = getattr(first, "base_layer", first)
        width = base.nx if hasattr(base, "nx") else base.in_features
        device, base_dtype = device_and_dtype(base)
        for tokens in (DECODE_TOKENS, DECODE_TOKENS + 1):
            _run_block(block, form, torch.zeros(tokens, width, dtype=base_dtype, device=device), dtype or base_dtype)


def _run_block(block: nn.Module, form: FFNForm, x: Tensor, dtype: torch.dtype) -> None:
    adapters = [module for module in block.modules() if isinstance(module, MoSAdapter)]
    kept = [adapter._frozen for adapter in adapters]
    with torch.enable_grad():  # as in training, where nothing is kept
        one = as_one(block, form, x)
    for adapter, before in zip(adapters, kept, strict=True):
        adapter._frozen = before
    if one is None:  # its linears are called one by one
        return
    (tensors, plan), steps = one, load_backend("triton")
    gates = tensors.gates
    if dtype != x.dtype:  # under autocast the router is called by itself
        gates = x.new_zeros(*x.shape[:-1], plan.config.num_experts, dtype=torch.float32)
    plan = plan._replace(prepared=(None,) * (1 + len(tensors.reads)))

    def leaf(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.detach().requires_grad_()

    def linear(t: Adapted) -> Adapted:
        wide = (None if base is None else base.detach().to(dtype) for base in t[:2])
        return Adapted(*wide, *map(leaf, t[2:]))

    given = tensors._replace(
        x=leaf(x.to(dtype)), gates=leaf(gates), router=leaf(tensors.router if gates is None else None),
        aux_weight=tensors.aux_weight if gates is None else None, token_mask=None,
        down=linear(tensors.down), reads=tuple(map(linear, tensors.reads)),
    )  # fmt: skip
    mask = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
    for masked in (None,) if given.aux_weight is None else (None, mask):
        ops.ffn(given._replace(token_mask=masked), plan._replace(differentiable=True)).sum().backward()
    with torch.no_grad():
        plan = plan._replace(differentiable=False)
        ops.ffn(given, plan)
        linears, configs = (given.down, *given.reads), (plan.down_config, *[plan.config] * len(given.reads))
        prepared = tuple(steps.prepare(t.B, dtype, config) for t, config in zip(linears, configs, strict=True))
        down, *reads = (t._replace(A=steps.operand(t.A, dtype)) for t in linears)
        ops.ffn(given._replace(down=down, reads=tuple(reads)), plan._replace(prepared=prepared))


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
