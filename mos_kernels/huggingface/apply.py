"""Putting a Mixture-of-Space adapter on a model, and taking it off again."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from mos_kernels.config import MoSConfig
from mos_kernels.huggingface.attention_mask import follow_attention_mask, forget_attention_mask
from mos_kernels.huggingface.blocks import add_router, remove_router
from mos_kernels.huggingface.modules import (
    adapter_parameters,
    mos_modules,
    own_adapter_parameters,
    plain_name,
    refuse_parallel,
    unwrap,
)
from mos_kernels.huggingface.plan import Plan, make_plan
from mos_kernels.huggingface.state import AdapterState, adapter_states, taken_off
from mos_kernels.huggingface.targets import frozen_heads, refuse_offloaded
from mos_kernels.layer import MoSConv1D, MoSLayer, MoSRouter, MoSWrapped, offload_hook
from mos_kernels.sharded import refuse_sharded, refuse_zero3


class AppliedMoS(list):
    """The names of the adapted linears. `report()`, also printed, says which router each of them uses."""

    def __init__(self, names: Iterable[str], report: str):
        super().__init__(names)
        self._report = report

    def report(self) -> str:
        return self._report

    def __str__(self) -> str:
        return self._report


class ParameterCount(NamedTuple):
    """Numbers of parameters; see `activated_parameters`."""

    base: int
    adapter: int
    activated: int

    @property
    def percent(self) -> float:
        """100 · activated / (base + activated): the adapter's share of the parameters that a token uses, in percent."""
        return 100 * self.activated / (self.base + self.activated)


def apply_mos(model: nn.Module, config: MoSConfig) -> AppliedMoS:
    """Put an adapter on the linears that `config` names, in place, and freeze everything else.

        apply_mos(model, MoSConfig(r=8, target_modules=ffn_target_modules(model)))

    With router_scope="ffn", each FFN block of a known form gets one router. A linear outside such a block gets its own
    router, and `report()` of the returned list says so. The load-balancing coefficient is divided by the number of
    routers. The model may be on the meta device, or wrapped by torch.compile. An error leaves the model unchanged.

    Returns the names of the adapted linears. Raises ValueError or TypeError if an entry of `config` matches nothing, or
    matches 3-D expert parameters or a module that is not a linear. Also if the model has an adapter, or is wrapped in
    DataParallel, DistributedDataParallel or a DeepSpeed engine: put the adapter on it before.
    """
    refuse_parallel(model)
    model = unwrap(model)
    plan = make_plan(model, config)
    install(model, plan)
    heads = [
        f"  {name} is frozen: {name}.requires_grad_(True) trains it, and save_adapter then keeps it with the adapter"
        for name in frozen_heads(model)
    ]
    return AppliedMoS([linear.name for linear in plan.linears], "\n".join([plan.report(), *heads]))


def install(model: nn.Module, plan: Plan) -> None:
    """Carry out a plan."""
    trainable = {plain_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    try:
        layers = [linear.build() for linear in plan.linears]
        routers = [block.build() for block in plan.blocks]
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for linear, layer in zip(plan.linears, layers, strict=True):
            _replace(model, linear.target.names, linear.target.module, layer)
        for block, router in zip(plan.blocks, routers, strict=True):
            add_router(block.block, block.form, router)
        plan.share_balance(owner for owner in (*routers, *layers) if owner.mos_aux_weight is not None)
        follow_attention_mask(model)
        AdapterState(model, plan.config, tuple(linear.name for linear in plan.linears), frozenset(trainable))
    except BaseException:  # such as an interrupt
        _uninstall(model, plan)
        for parameter in trainable.values():
            parameter.requires_grad_(True)
        raise


def _uninstall(model: nn.Module, plan: Plan) -> None:
    """Put back the modules that a plan replaces, however many of them it has replaced."""
    forget_attention_mask(model)
    for block in plan.blocks:
        if "mos_router" in block.block._modules:
            remove_router(block.block)
    for linear in plan.linears:
        for name in linear.target.names:
            model.set_submodule(name, linear.target.module)


def remove_mos(model: nn.Module) -> list[str]:
    """Take the adapter off. The model has plain linears again, with the base's parameters, and no routers.

    Modules that load_adapter loaded beside the adapter, such as a head, get their earlier values back. Parameters that
    were trainable before apply_mos are trainable again. Modules that were trained beside the adapter keep their values,
    with a warning. Returns the names of the restored linears. Raises ValueError if the model has no adapter.
    """
    places: dict[MoSLayer, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, MoSLayer):
            refuse_sharded(name, module)
            refuse_zero3(own_adapter_parameters(module).values())
            refuse_offloaded(name, module)
            places.setdefault(module, []).append(name)
    if not places and hasattr(model, "peft_config"):
        raise ValueError("the adapter was put on by peft: call model.unload(), or delete_adapter")
    if not places:
        raise ValueError(f"{type(model).__name__} has no MoS adapter: there is nothing to remove")
    blocks = [module for module in model.modules() if isinstance(module._modules.get("mos_router"), MoSRouter)]

    plain = {layer: _plain(layer) for layer in places}
    for layer, names in places.items():
        _replace(model, names, layer, plain[layer])
    for block in blocks:
        remove_router(block)
    forget_attention_mask(model)
    taken_off.update(plain.values())
    for state in adapter_states(model):
        state.remove()
    return [plain_name(names[0]) for names in places.values()]


def activated_parameters(model: nn.Module) -> ParameterCount:
    """The numbers of parameters of the base and of the adapter, and how many of the adapter's a token uses.

    A token always uses a shared A and the routers. Of the parameters that each expert has of its own (B, curvature, and
    A with share_a=False), it uses num_experts_per_tok / num_experts.
    """
    adapter = adapter_parameters(model)
    every = mos_modules(model, inactive=True).values()
    own = {id(parameter) for module in every for parameter in own_adapter_parameters(module).values()}
    base = sum(_numel(p) for p in model.parameters() if id(p) not in own)
    activated = 0
    for module in mos_modules(model).values():
        config = module.config
        for name, parameter in own_adapter_parameters(module).items():
            always = name in ("weight", "mos_router") or name == "mos_lora_A" and config.share_a
            used = 1 if always else Fraction(config.num_experts_per_tok, config.num_experts)
            activated += int(parameter.numel() * used)
    return ParameterCount(base, sum(p.numel() for p in adapter.values()), activated)


def _numel(parameter: nn.Parameter) -> int:
    """How many numbers a parameter stands for; those of bitsandbytes' 4-bit weights are packed."""
    shape = getattr(getattr(parameter, "quant_state", None), "shape", None)
    return parameter.numel() if shape is None else shape.numel()


def _replace(model: nn.Module, names: Iterable[str], old: nn.Module, new: nn.Module) -> None:
    if hasattr(old, "_is_hf_initialized"):  # else transformers' init_weights would initialise the base's weights again
        new._is_hf_initialized = old._is_hf_initialized
    for name in names:
        model.set_submodule(name, new)
    if hasattr(old, "_hf_hook") and not hasattr(new, "_hf_hook"):  # accelerate's, which moves inputs between devices
        from accelerate.hooks import add_hook_to_module

        # a base that still runs by itself keeps its hook: a hook remembers where a single input came from
        if offload_hook(old) is None:
            add_hook_to_module(new, copy.copy(old._hf_hook) if isinstance(new, MoSWrapped) else old._hf_hook)


def _plain(layer: MoSLayer) -> nn.Module:
    if not isinstance(layer, MoSConv1D):  # MoSWrapped returns the base module itself
        return layer.to_linear()
    with torch.device("meta"):
        conv1d = Conv1D(layer.nf, layer.nx)
    conv1d.weight, conv1d.bias = layer.weight, layer.bias
    return conv1d.train(layer.training)
