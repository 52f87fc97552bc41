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
    refuse_parallel,
    unwrap,
)
from mos_kernels.huggingface.plan import Plan, make_plan
from mos_kernels.huggingface.state import AdapterState, adapter_state
from mos_kernels.huggingface.targets import frozen_heads, refuse_offloaded
from mos_kernels.layer import MoSConv1D, MoSLayer, MoSRouter, MoSWrapped, offload_hook
from mos_kernels.sharded import refuse_sharded, refuse_zero3


class AppliedMoS(list):
    """The names of the adapted linears. `report()`, also printed, says who routes each of them."""

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
        """What a token uses of the adapter, in percent of all that it uses: base plus activated."""
        return 100 * self.activated / (self.base + self.activated)


def apply_mos(model: nn.Module, config: MoSConfig) -> AppliedMoS:
    """Put an adapter on the linears that `config` names, and freeze everything else, in place.

    FFN blocks of a known form get one router each (router_scope="ffn"); a linear outside of one gets its own, and the
    returned list's `report()` says so. Works on the meta device, and on a model that torch.compile has wrapped. The
    load-balancing coefficient is divided by the number of routers. Everything is planned and built before the model
    changes, so an error leaves it as it was.

    Returns the names of the adapted linears. Raises ValueError or TypeError where `config` asks for what the model does
    not have: an entry that matches nothing, 3-D expert parameters, a module that is no plain linear, a second adapter.
    So does a model in DataParallel, DistributedDataParallel or a DeepSpeed engine: adapt it first.
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
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
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
        AdapterState(model, plan.config, frozenset(trainable))
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
    """Take the adapter off: plain linears that share the base's parameters, the blocks' own forwards, no routers.

    Modules that load_adapter loaded beside it, such as a head, have again what they had before. What was trainable
    before apply_mos is trainable again. Returns the names of the restored linears; ValueError where the model has no
    adapter. Warns where a module was trained in place beside it, which stays as it is.
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
    for module in model.modules():  # the adapter may have been applied to a part of the model
        state = adapter_state(module)
        if state is not None:
            state.remove()
    return [names[0] for names in places.values()]


def activated_parameters(model: nn.Module) -> ParameterCount:
    """How many parameters the base and the adapter have, and how many of the adapter's a token uses.

    Of what each expert has of its own (B, curvature, and A with share_a=False), num_experts_per_tok of num_experts are
    used; shared A and the routers always are.
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
    if hasattr(old, "_is_hf_initialized"):  # else transformers' init_weights would draw the base's weights anew
        new._is_hf_initialized = old._is_hf_initialized
    for name in names:
        model.set_submodule(name, new)
    if hasattr(old, "_hf_hook") and not hasattr(new, "_hf_hook"):  # accelerate's, which moves inputs between devices
        from accelerate.hooks import add_hook_to_module

        # a base that goes on running keeps its own: a hook remembers where one input came from
        if offload_hook(old) is None:
            add_hook_to_module(new, copy.copy(old._hf_hook) if isinstance(new, MoSWrapped) else old._hf_hook)


def _plain(layer: MoSLayer) -> nn.Module:
    if not isinstance(layer, MoSConv1D):  # MoSWrapped gives back the very base
        return layer.to_linear()
    with torch.device("meta"):
        conv1d = Conv1D(layer.nf, layer.nx)
    conv1d.weight, conv1d.bias = layer.weight, layer.bias
    return conv1d.train(layer.training)
