"""What on a model is ours: its adapters, routers and their parameters, by name."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from mos_kernels.layer import ADAPTER_PARAMETERS, MoSAdapter, MoSRouter
from mos_kernels.sharded import refuse_fsdp1


class PreHook:
    """A forward pre-hook of a module, which copies and pickles of the module have too.

    It is found by its number: a handle would take the other hooks along wherever a part of the module is copied.
    """

    def attach(self, module: nn.Module, **options) -> None:
        self._number = module.register_forward_pre_hook(self, **options).id

    def detach(self, module: nn.Module) -> None:
        for hooks in (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs):
            hooks.pop(self._number, None)

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        RemovableHandle.next_id = max(RemovableHandle.next_id, self._number + 1)  # or the next hook takes its place


@contextlib.contextmanager
def forward_through(module: nn.Module, around: Callable) -> Iterator[None]:
    """Let a call of the module's forward be around(forward, ...); inside accelerate's wrapper, where it has one."""
    name = "_old_forward" if "_old_forward" in vars(module) else "forward"
    forward, is_own = getattr(module, name), name in vars(module)

    @functools.wraps(forward)
    def replaced(*args, **kwargs):
        return around(forward, *args, **kwargs)

    setattr(module, name, replaced)
    try:
        yield
    finally:
        if is_own:
            setattr(module, name, forward)
        else:
            delattr(module, name)


def own_adapter_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters that this very module owns, by their names in it."""
    if isinstance(module, MoSRouter):
        return {"weight": module.weight}
    if isinstance(module, MoSAdapter):
        return {name: p for name in ADAPTER_PARAMETERS if (p := getattr(module, name)) is not None}
    return {}


def mos_modules(model: nn.Module, inactive: bool = False) -> dict[str, MoSAdapter | MoSRouter]:
    """The adapters and routers of a model, by name; of peft's several, those that are active, or all."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, (MoSAdapter, MoSRouter))}
    idle = set() if inactive else _inactive(model)
    return {name: module for name, module in found.items() if module not in idle}


def _inactive(model: nn.Module) -> set[nn.Module]:
    idle = set()
    for module in model.modules():
        active, named = vars(module).get("_active_adapter"), module._modules.get("mos_adapter", module)
        if active is not None and isinstance(named, nn.ModuleDict):
            idle |= {named[name] for name in named if name not in ([active] if isinstance(active, str) else active)}
    return idle


def active_names(model: nn.Module) -> list[str]:
    """The names of the active adapters of a model with adapters of peft's, or of transformers' own."""
    active = getattr(model, "active_adapters", [])
    active = active() if callable(active) else active
    return [active] if isinstance(active, str) else list(active)


def mos_adapters(model: nn.Module) -> dict[str, MoSAdapter]:
    """The adapters of the linears among `mos_modules`."""
    return {name: module for name, module in mos_modules(model).items() if isinstance(module, MoSAdapter)}


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter of the adapter on `model` (with peft: of those that are active), by name; empty without one."""
    own = {id(p) for module in mos_modules(model).values() for p in own_adapter_parameters(module).values()}
    return {name: p for name, p in model.named_parameters() if id(p) in own}


def router_owners(model: nn.Module, inactive: bool = False) -> dict[str, nn.Module]:
    """The modules that route, by name: MoSRouters and linears with a router of their own; `inactive` as above."""
    return {
        name: module
        for name, module in mos_modules(model, inactive).items()
        if isinstance(module, MoSRouter) or module.mos_router is not None
    }


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's, the data-parallel and DeepSpeed's wrappers."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif _is_parallel(model):
            model = model.module
        else:
            refuse_fsdp1(model)
            return model


def refuse_parallel(model: nn.Module) -> None:
    """ValueError for a model that is in a wrapper which would not see, or not train, what is put on it now."""
    while hasattr(model, "_orig_mod"):  # compiles anew
        model = model._orig_mod
    if _is_parallel(model):
        raise ValueError(
            f"the model is in {type(model).__name__}: put the adapter on the model itself, before it is wrapped "
            f"(the model is wrapper.module: adapt that, and wrap it anew)"
        )


def _is_parallel(model: nn.Module) -> bool:
    return isinstance(model, (nn.DataParallel, DistributedDataParallel)) or type(model).__name__ == "DeepSpeedEngine"
