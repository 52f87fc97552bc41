"""What an adapter leaves on its model: the configuration, and which of the model's own modules came with it.

Modules may be trained whole beside an adapter: a head, the embeddings of new tokens, norms. Whether they are trainable
at the moment does not tell, since a model is frozen for inference and by whoever keeps averaged copies.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mos_kernels.config import MoSConfig
from mos_kernels.huggingface.modules import PreHook, adapter_parameters, own_adapter_parameters
from mos_kernels.huggingface.targets import refuse_peft
from mos_kernels.sharded import is_dtensor, spread_like

_STATE = "_mos_adapter"
_OVER = (
    "it was put over the adapter of apply_mos, which peft then froze. model = model.unload() takes it off; apply or "
    "load the adapter below anew to train that one. A model has adapters of one or of the other"
)


class AdapterState(PreHook):
    """What apply_mos leaves on a model. As a forward pre-hook of it, it notes what is trained.

    config: the adapter's. trainable_before: the parameters that were trainable before it. trained: the model's own
    tensors, by name, that belong to the adapter: trainable at some forward with gradients, or loaded with it.
    before: what the model had in place of those that were loaded, on the CPU (or in its parts, where it is sharded).
    trains: whether the adapter was trainable when last seen.

    Copies and pickles of the model have one of their own. They share the tensors in `before`.
    """

    def __init__(self, model: nn.Module, config: MoSConfig, trainable_before: frozenset[str]):
        self.config, self.trainable_before = config, trainable_before
        self.trained: set[str] = set()
        self.trains = True
        self.before: dict[str, Tensor] = {}
        self._model = weakref.ref(model)
        self.attach(model)
        setattr(model, _STATE, self)

    def __call__(self, module: nn.Module, args: tuple) -> None:
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():
            refuse_peft(module, _OVER)  # get_peft_model and model.add_adapter do not ask whose linears they are
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
        """Remember what is trainable now."""
        self.trained.update(_trainable(self._model()))

    def modules_to_save(self) -> list[str]:
        """The modules that own what was trained beside the adapter, in the model's order."""
        self.note()
        owners = {name.rpartition(".")[0] for name in self.trained}
        if "" in owners:
            rootless = next(name for name in self.trained if "." not in name)
            raise ValueError(
                f"the parameter {rootless!r}, trained beside the adapter, belongs to no submodule, and modules_to_save "
                "cannot name it: move it into a module, or freeze it before the first forward"
            )
        # all names of a shared one: peft gives each module its own
        return [name for name, _ in self._model().named_modules(remove_duplicate=False) if name in owners]

    def replace(self, values: Mapping[str, Tensor]) -> None:
        """Write the values of the modules that come with an adapter; what an earlier one brought goes back.

        values: by name, on the device and in the parts of the model's own.
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
                f"trained in place beside the adapter, and left as they are: {', '.join(sorted(left)[:4])} "
                f"({len(left)} tensors). What the base had there was not kept: load the base anew to have it back",
                stacklevel=3,
            )

    def remove(self) -> None:
        """Give the model back what it had before the adapter, and forget the adapter."""
        self.replace({})
        for name, parameter in self._model().named_parameters():
            parameter.requires_grad_(name in self.trainable_before)
        self.detach(self._model())
        delattr(self._model(), _STATE)

    def __deepcopy__(self, memo: dict) -> AdapterState:
        self.note()
        twin = memo[id(self)] = AdapterState.__new__(AdapterState)
        vars(twin).update(vars(self), trained=set(self.trained), before=dict(self.before))
        twin._model = weakref.ref(copy.deepcopy(self._model(), memo))
        return twin

    def __getstate__(self) -> dict:
        self.note()
        return {**vars(self), "_model": self._model()}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__({**state, "_model": weakref.ref(state["_model"])})


def adapter_state(model: nn.Module) -> AdapterState | None:
    """What apply_mos left on this module, or None."""
    return getattr(model, _STATE, None)


def note_trained(model: nn.Module) -> None:
    """Let the adapters on `model` remember what is trainable now; forwards of a compiled model do not."""
    for module in model.modules():
        state = adapter_state(module)
        if state is not None:
            state.note()


def tensors_of(model: nn.Module, modules: list[str]) -> dict[str, Tensor]:
    """The parameters and persistent buffers of the named modules (peft's rule for names), without the adapter's.

    peft names the heads of every classifier; what the model does not have is nothing.
    """
    adapter = adapter_parameters(model)
    found = {}
    for entry in modules:
        matches = [
            (name, module) for name, module in model.named_modules() if name == entry or name.endswith("." + entry)
        ]
        for name, module in matches:
            found |= {f"{name}.{key}": tensor for key, tensor in module.state_dict(keep_vars=True).items()}
    return {name: tensor for name, tensor in found.items() if name not in adapter}


def _trainable(model: nn.Module) -> list[str]:
    """The names of the trainable parameters that are not the adapter's; a tied one has several."""
    found = []
    for place, module in model.named_modules(remove_duplicate=False):
        trainable = [(name, p) for name, p in module._parameters.items() if p is not None and p.requires_grad]
        if trainable:  # as few are: this runs at every forward
            own = {id(p) for p in own_adapter_parameters(module).values()}
            found += [f"{place}.{name}".lstrip(".") for name, p in trainable if id(p) not in own]
    return found
