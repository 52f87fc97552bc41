"""The state of an adapter on its model: the configuration, and the modules of the model that belong to the adapter.

Modules may be trained whole beside an adapter: a head, the embeddings of new tokens, norms. Whether they are trainable
at the moment does not say which they are, since a model may be frozen for inference or for averaged copies.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from mos_kernels.config import MoSConfig
from mos_kernels.huggingface.modules import PreHook, adapter_parameters, own_adapter_parameters, plain_name
from mos_kernels.huggingface.targets import refuse_peft
from mos_kernels.layer import MoSLayer
from mos_kernels.sharded import is_dtensor, spread_like

_STATE = "_mos_adapter"
_OVER = (
    "it was put over the adapter of apply_mos, which peft then froze. model = model.unload() takes it off; then apply "
    "or load the adapter below again to train it. A model has adapters of peft or of apply_mos, not of both"
)


class AdapterState(PreHook):
    """The state that apply_mos puts on a model. It is a forward pre-hook of the model and notes what is trained.

    config: the adapter's configuration. linears: the names of the linears that got it. trainable_before: the parameters
    that were trainable before apply_mos. trained: the names of the model's own tensors that belong to the adapter; they
    were trainable in a forward with gradients, or loaded with it. before: the earlier values of those that were loaded,
    on the CPU (or sharded as the model). trains: whether the adapter was trainable in the latest forward.

    Copies and pickles of the model have a copy of this. They share the tensors in `before`.
    """

    def __init__(self, model: nn.Module, config: MoSConfig, linears: tuple[str, ...], trainable_before: frozenset[str]):
        stale = adapter_state(model)  # of an adapter that was removed from parts of the model
        if stale is not None:
            stale.detach(model)
            trainable_before = stale.trainable_before
        self.config, self.linears, self.trainable_before = config, linears, trainable_before
        self.trained: set[str] = set()
        self.trains = True
        self.before: dict[str, Tensor] = {}
        self._model = weakref.ref(model)
        self._unchanged = Unchanged()
        self.attach(model)
        setattr(model, _STATE, self)

    def __call__(self, module: nn.Module, args: tuple) -> None:
        if torch.compiler.is_compiling():
            return
        self._unchanged.require_adapted(module, self.linears)
        if torch.is_grad_enabled():
            refuse_peft(module, _OVER)  # get_peft_model does not check for our layers
            self._warn_if_frozen(module)
            self.note()

    def _warn_if_frozen(self, module: nn.Module) -> None:
        trains = any(p.requires_grad for part in module.modules() for p in own_adapter_parameters(part).values())
        if self.trains and module.training and not trains and adapter_parameters(module):
            warnings.warn(
                "the Mixture-of-Space adapter takes no part in this training: something froze its parameters, as peft "
                "does for any of its methods, prompt tuning included",
                stacklevel=2,
            )
        self.trains = trains

    def note(self) -> None:
        """Add the parameters that are trainable now to `trained`."""
        self.trained.update(_trainable(self._model()))

    def modules_to_save(self) -> list[str]:
        """The names of the modules that were trained beside the adapter, in the model's order."""
        self.note()
        owners = {name.rpartition(".")[0] for name in self.trained}
        if "" in owners:
            rootless = next(name for name in self.trained if "." not in name)
            raise ValueError(
                f"the parameter {rootless!r}, trained beside the adapter, belongs to no submodule, and modules_to_save "
                "cannot name it: move it into a module, or freeze it before the first forward"
            )
        # all names of a shared module, since peft gives each name a copy
        names = (plain_name(name) for name, _ in self._model().named_modules(remove_duplicate=False))
        return [name for name in dict.fromkeys(names) if name in owners]

    def replace(self, values: Mapping[str, Tensor]) -> None:
        """Load the modules that come with an adapter, and undo those that an earlier adapter brought.

        values: by name, on the device and with the sharding of the model's own tensors.
        """
        own = tensors_of(self._model(), list({name.rpartition(".")[0] for name in (*self.before, *values)}))
        returning = {n: t for n, t in self.before.items() if n not in values and n in own and own[n].shape == t.shape}
        for name in values:
            if name not in self.before:
                tensor = own[name].detach()
                self.before[name] = tensor.clone() if is_dtensor(tensor) else tensor.to("cpu", copy=True)
        with torch.no_grad():
            for name, value in values.items():
                own[name].copy_(value)
            for name, value in returning.items():
                own[name].copy_(value if is_dtensor(value) else spread_like(value, own[name]))
                if isinstance(own[name], nn.Parameter):
                    own[name].requires_grad_(False)
        left = self.trained - values.keys() - returning.keys()
        self.before = {name: value for name, value in self.before.items() if name in values}
        self.trained = left | values.keys()
        if left:
            warnings.warn(
                "tensors of the base were trained in place beside the adapter, and are left as they are: "
                f"{', '.join(sorted(left)[:4])} ({len(left)} tensors). Their values before training were not kept: "
                "load the base anew to get them",
                stacklevel=3,
            )

    def remove(self) -> None:
        """Restore the model as it was before the adapter, and remove this state."""
        try:
            self.replace({})
        finally:  # its warning may be an error
            for name, parameter in self._model().named_parameters():
                parameter.requires_grad_(plain_name(name) in self.trainable_before)
            self.detach(self._model())
            delattr(self._model(), _STATE)

    def __deepcopy__(self, memo: dict) -> AdapterState:
        self.note()
        twin = memo[id(self)] = AdapterState.__new__(AdapterState)
        vars(twin).update(vars(self), trained=set(self.trained), before=dict(self.before), _unchanged=Unchanged())
        twin._model = weakref.ref(copy.deepcopy(self._model(), memo))
        return twin

    def __getstate__(self) -> dict:
        self.note()
        return {**vars(self), "_model": self._model()}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__({**state, "_model": weakref.ref(state["_model"])})


def adapter_state(model: nn.Module) -> AdapterState | None:
    """The state that apply_mos put on this module, or None."""
    return getattr(model, _STATE, None)


def adapter_states(model: nn.Module) -> list[AdapterState]:
    """The states on `model` and on its parts, since apply_mos may have been given a part; each one once."""
    return [vars(module)[_STATE] for module in model.modules() if _STATE in vars(module)]


class Unchanged:
    """`require_adapted` for every forward. It takes some ten microseconds while a model's modules are the same."""

    def __init__(self):
        self._links: list[list] = []
        """Three lists: the `_modules` of a module around an adapted linear, a name in it, and what has this name."""

    def require_adapted(self, model: nn.Module, linears: Iterable[str]) -> None:
        """ValueError if one of these linears of `model` has no adapter now, nor a module inside it."""
        if self._links and list(map(dict.get, *self._links[:2])) == self._links[2]:
            return
        require_adapted(model, linears, within=True)
        links: dict[tuple[int, str], tuple] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            if _is_adapted(module):
                parent = model
                for name in path.split("."):
                    links[id(parent), name] = parent._modules, name, parent._modules[name]
                    parent = parent._modules[name]
        self._links = [list(column) for column in zip(*links.values(), strict=True)]

    def __getstate__(self) -> dict:
        return {"_links": []}


taken_off: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""The linears that remove_mos put back; of a part, while the state of the whole model stays."""


def require_adapted(model: nn.Module, linears: Iterable[str], within: bool = False) -> None:
    """ValueError if one of these linears of `model` has no adapter now. A linear that is gone is no error.

    within: a module inside the one that has the linear's name may have the adapter, or remove_mos took it off.
    """
    modules = {plain_name(name): module for name, module in model.named_modules(remove_duplicate=False)}
    for name in linears:
        module = modules.get(name)
        if module is None or (within and module in taken_off):
            continue
        if not any(map(_is_adapted, module.modules() if within else [module])):
            raise ValueError(
                f"{name!r} has lost its adapter: something has replaced the linear since apply_mos, load_adapter or "
                "get_peft_model, as resize_token_embeddings does. Do that before"
            )


def _is_adapted(module: nn.Module) -> bool:
    return isinstance(module, MoSLayer) or isinstance(module._modules.get("mos_adapter"), nn.ModuleDict)  # under peft


def require_all_adapted(model: nn.Module, within: bool = False) -> None:
    """`require_adapted` for the adapters of apply_mos on `model` and its parts, and for those of peft."""
    for state in adapter_states(model):
        require_adapted(state._model(), state.linears, within)
    tuner = getattr(model, "base_model", None)
    if getattr(tuner, "prefix", None) == "mos_":
        require_adapted(tuner.model, map(plain_name, tuner.targeted_module_names), within)


def prepare_training(model: nn.Module) -> None:
    """Note what is trainable now, for every adapter on `model`. ValueError if a linear has lost its adapter."""
    require_all_adapted(model)
    for state in adapter_states(model):
        state.note()


def tensors_of(model: nn.Module, modules: list[str]) -> dict[str, Tensor]:
    """The parameters and persistent buffers of the named modules, by `plain_name`, without those of the adapter.

    Names match as in peft. A name that matches nothing is no error, since peft lists the heads of all classifiers.
    """
    adapter = adapter_parameters(model)
    found = {}
    for entry in modules:
        for name, module in model.named_modules():
            if f".{plain_name(name)}".endswith(f".{entry}"):
                tensors = module.state_dict(keep_vars=True).items()
                found |= {plain_name(f"{name}.{key}"): tensor for key, tensor in tensors}
    return {name: tensor for name, tensor in found.items() if name not in adapter}


def _trainable(model: nn.Module) -> list[str]:
    """The names of the trainable parameters that are not the adapter's; a tied one has several."""
    found = []
    for place, module in model.named_modules(remove_duplicate=False):
        trainable = [(name, p) for name, p in module._parameters.items() if p is not None and p.requires_grad]
        if trainable:  # few modules are, and this runs at every forward
            own = {id(p) for p in own_adapter_parameters(module).values()}
            found += [plain_name(f"{place}.{name}").lstrip(".") for name, p in trainable if id(p) not in own]
    return found
