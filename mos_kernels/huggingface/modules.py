"""The adapters and routers on a model, and their parameters, by name."""

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
    """A forward pre-hook of a module. Copies and pickles of the module have it too.

    It stores its number instead of its handle, since a copy of the handle would also copy the module's other hooks.
    """

    def attach(self, module: nn.Module, **options) -> None:
        self._number = module.register_forward_pre_hook(self, **options).id

    def detach(self, module: nn.Module) -> None:
        for hooks in (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs):
            hooks.pop(self._number, None)

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        RemovableHandle.next_id = max(RemovableHandle.next_id, self._number + 1)  # else the next has this number


@contextlib.contextmanager
def forward_through(module: nn.Module, around: Callable) -> Iterator[None]:
    """A context in which the module's forward is around(forward, ...); inside accelerate's wrapper, if it has one."""
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


_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")
"""What torch.compile(layer) and torch's checkpoint_wrapper(layer) call the layer inside."""


def plain_name(name: str) -> str:
    """The name of a module or tensor as it is without compiled or checkpointed layers: as in files and options."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def own_adapter_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter parameters that belong to this module itself, by their names in it."""
    if isinstance(module, MoSRouter):
        return {"weight": module.weight}
    if isinstance(module, MoSAdapter):
        return {name: p for name in ADAPTER_PARAMETERS if (p := getattr(module, name)) is not None}
    return {}


def mos_modules(model: nn.Module, inactive: bool = False) -> dict[str, MoSAdapter | MoSRouter]:
    """The adapters and routers of a model, by `plain_name`. inactive: include those of inactive adapters under peft."""
    found = {plain_name(name): m for name, m in model.named_modules() if isinstance(m, (MoSAdapter, MoSRouter))}
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
    """The names of the active adapters of a model with adapters of peft or of transformers."""
    active = getattr(model, "active_adapters", [])
    if callable(active):  # transformers' own, which asks for the latest peft
        active = next((vars(m)["_active_adapter"] for m in model.modules() if "_active_adapter" in vars(m)), [])
    return [active] if isinstance(active, str) else list(active)


def mos_adapters(model: nn.Module) -> dict[str, MoSAdapter]:
    """`mos_modules` without the routers of FFN blocks."""
    return {name: module for name, module in mos_modules(model).items() if isinstance(module, MoSAdapter)}


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter of the adapter on `model` (with peft: of the active adapters), by `plain_name`."""
    own = {id(p) for module in mos_modules(model).values() for p in own_adapter_parameters(module).values()}
    return {plain_name(name): p for name, p in model.named_parameters() if id(p) in own}


def router_owners(model: nn.Module, inactive: bool = False) -> dict[str, nn.Module]:
    """The modules that route, by name: MoSRouters, and linears with a router of their own. inactive: as above."""
    return {
        name: module
        for name, module in mos_modules(model, inactive).items()
        if isinstance(module, MoSRouter) or module.mos_router is not None
    }


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of torch.compile, of data parallelism and of DeepSpeed."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif _is_parallel(model):
            model = model.module
        else:
            refuse_fsdp1(model)
            return model


def refuse_parallel(model: nn.Module) -> None:
    """ValueError for a model in a wrapper that would not see, or not train, an adapter that is put on now."""
    while hasattr(model, "_orig_mod"):  # torch.compile compiles again after the change
        model = model._orig_mod
    if _is_parallel(model):
        raise ValueError(
            f"the model is in {type(model).__name__}: put the adapter on the model itself, before it is wrapped "
            f"(the model is wrapper.module: adapt that, and wrap it anew)"
        )


def _is_parallel(model: nn.Module) -> bool:
    return isinstance(model, (nn.DataParallel, DistributedDataParallel)) or type(model).__name__ == "DeepSpeedEngine"
