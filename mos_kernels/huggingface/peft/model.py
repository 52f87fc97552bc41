"""The peft method MOSELORA: its registration, and the tuner that puts `MoSPeftLayer`s and routers on a model.

As in apply_mos, a plan says which linears get adapters and which FFN blocks get a router, before the model is changed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from pathlib import Path

import torch
from accelerate import init_empty_weights
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import NoMatchingPeftModuleError, register_peft_method
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from mos_kernels.ffn import FFNForm
from mos_kernels.huggingface.atomic import CONFIG_NAME, WEIGHTS_NAME
from mos_kernels.huggingface.attention_mask import follow_attention_mask, forget_attention_mask
from mos_kernels.huggingface.blocks import add_router, recognise, remove_router
from mos_kernels.huggingface.files import PREFIX as FILE_PREFIX
from mos_kernels.huggingface.files import read_tensors, require_finite, require_fit, require_shapes, without_idle
from mos_kernels.huggingface.modules import plain_name, router_owners
from mos_kernels.huggingface.peft.config import MOSELORA, MoSPeftConfig
from mos_kernels.huggingface.peft.layer import WHY_NO_MERGE, MoSPeftLayer, MoSPeftRouter, MoSTunerLayer
from mos_kernels.huggingface.plan import Plan, PlannedBlock, adapter_shapes, make_plan
from mos_kernels.huggingface.state import Unchanged
from mos_kernels.huggingface.targets import ffn_target_modules, is_all_linear, is_target, layer_index
from mos_kernels.layer import ADAPTER_PARAMETERS, MoSLayer, MoSRouter

PREFIX = "mos_"


class MoSPeftModel(BaseTuner):
    """The tuner of `MoSPeftConfig`; see peft's documentation of `BaseTuner` for its methods."""

    prefix = PREFIX
    tuner_layer_cls = MoSTunerLayer
    target_module_mapping: dict[str, list[str]] = {}

    def __init__(self, model: nn.Module, peft_config: PeftConfig | dict[str, PeftConfig], *args, **kwargs) -> None:
        # else it is transformers' own, or that of a caller that injects in the same way
        self._in_peft_model = isinstance(peft_config, dict)
        super().__init__(model, peft_config, *args, **kwargs)
        self._unchanged = Unchanged()

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """As in peft. An error leaves the model without the adapter.

        If `config` was read from a folder and was not changed since, the weights in the folder must fit this adapter.
        """
        config = self.peft_config[adapter_name]
        if state_dict is not None:  # its names say which linears to adapt; the router of a block belongs to none
            named = {name.removeprefix(FILE_PREFIX): value for name, value in state_dict.items()}
            state_dict = {name: value for name, value in named.items() if not name.endswith(".mos_router.weight")}
        try:
            plan = _plan(model, config, adapter_name, state_dict)
        except BaseException:
            if not any(adapter_name in layer.mos_adapter for _, layer in _named_layers(model)):  # peft has listed it
                del self.peft_config[adapter_name]
            raise
        self._planned = {plain_name(name): linear for linear in plan.linears for name in linear.target.names}
        if is_all_linear(config.target_modules):
            config.target_modules = list(self._planned)
        trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        targeted = list(self.targeted_module_names)
        try:
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
            _require_adapted(plan, adapter_name, model)
            for block in plan.blocks:
                self._add_router(block, adapter_name, config, low_cpu_mem_usage)
            owners = router_owners(model, inactive=True).items()
            plan.share_balance(owner for name, owner in owners if name.endswith(f".{adapter_name}"))
            follow_attention_mask(model)
        except BaseException:
            _withdraw(model, adapter_name, self.active_adapters)
            self.targeted_module_names = targeted
            for parameter, requires_grad in trained:
                parameter.requires_grad_(requires_grad)
            raise
        finally:
            del self._planned
        config.forget_folder()

    @staticmethod
    def _check_target_module_exists(peft_config: PeftConfig, key: str):
        found = BaseTuner._check_target_module_exists(peft_config, plain_name(key))
        is_excluded = not isinstance(found, (bool, type(None)))
        return found if found or is_excluded else BaseTuner._check_target_module_exists(peft_config, key)

    def _create_and_replace(
        self, peft_config, adapter_name, target, target_name, parent, current_key, **optional_kwargs
    ) -> None:
        planned = self._planned.get(plain_name(current_key))
        if planned is None:
            if isinstance(target, MoSPeftRouter):  # a regular expression matched the router of another adapter
                return
            raise ValueError(f"{current_key!r} is adapted by peft's rules for target_modules, but not by those here")
        if isinstance(target, MoSPeftLayer):
            target.update_layer(adapter_name, planned.config)
            return
        layer = MoSPeftLayer(target, adapter_name, planned.config, self._in_peft_model)
        for name in planned.target.names:
            self.model.set_submodule(name, layer)

    def _add_router(self, planned: PlannedBlock, adapter_name: str, config: PeftConfig, on_meta: bool) -> None:
        with init_empty_weights() if on_meta else contextlib.nullcontext():
            router = planned.build()
        routers = planned.block._modules.get("mos_router")
        if routers is None:
            routers = MoSPeftRouter(planned.reads_input)
        routers.update_layer(adapter_name, router, self.active_adapters, config.inference_mode)
        _bind(planned.block, planned.form, routers)

    def _replace_module(self, parent, child_name, new_module, child) -> None:
        setattr(parent, child_name, new_module)

    def delete_adapter(self, adapter_name: str) -> None:
        was_active = adapter_name in self.active_adapters
        super().delete_adapter(adapter_name)  # it skips modules whose names begin with the prefix
        for layer in self.model.modules():
            if isinstance(layer, MoSPeftRouter):
                layer.delete_adapter(adapter_name)
            if was_active and isinstance(layer, MoSTunerLayer):  # else nothing changes which parameters train
                layer.set_adapter(self.active_adapters)

    def unload(self) -> nn.Module:
        """The base model, with plain linears, the blocks' own forwards, and without routers."""
        _put_back(self.model)
        self.targeted_module_names = []
        return super().unload()

    def _check_merge_allowed(self) -> None:
        raise NotImplementedError(WHY_NO_MERGE)

    def add_weighted_adapter(self, *args, **kwargs) -> None:
        raise NotImplementedError(
            "Mixture-of-Space adapters cannot be added up: each routes tokens to experts of its own. Export each as a "
            "LoRA (mos_kernels.huggingface.export_lora), and call add_weighted_adapter on those"
        )

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs):
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "a Mixture-of-Space adapter is one for the whole batch: call set_adapter, and run a batch by adapter, "
                "instead of passing adapter_names"
            )
        if not torch.compiler.is_compiling():  # in forward and generate of a PeftModel
            self._unchanged.require_adapted(self.model, map(plain_name, self.targeted_module_names))
        yield

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        key = plain_name(key) if _is_own(key, adapter_name) else key  # peft looks up other modules by their full names
        inner = f".mos_adapter.{adapter_name}."
        return key.replace(inner, ".") if inner in key else super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        by_transformers = tuple(f".{parameter}.{adapter_name}" for parameter in ADAPTER_PARAMETERS)
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        # peft looks for them under the modules' names, which checkpoint_wrapper leaves out of a state dict
        own = (name for name in state_dict if name.endswith(by_transformers) or _is_own(name, adapter_name))
        found |= {name: state_dict[name] for name in own}
        # a module that the model holds under several names is in the file once, as in the plan of a model
        every, first = ({plain_name(n) for n, _ in model.named_parameters(remove_duplicate=r)} for r in (False, True))
        return {n: t for n, t in found.items() if not _is_own(n, adapter_name) or plain_name(n) not in every - first}

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict) -> dict[str, Tensor]:
        """As in peft. ValueError, before a value is loaded, for missing, unknown, misshapen or non-finite tensors."""
        named = ((name.replace("_checkpoint_wrapped_module.", ""), p) for name, p in
                 model.named_parameters(remove_duplicate=False))  # fmt: skip
        own = {name: p for name, p in named if _is_own(name, adapter_name)}  # by the names that load_state_dict takes
        in_file = {
            cls._remove_adapter_name_from_key(name, adapter_name).removeprefix(FILE_PREFIX): name for name in own
        }
        tensors = without_idle(state_dict, config.to_mos_config())
        found = {in_file.get(name.removeprefix(FILE_PREFIX), name): tensor for name, tensor in tensors.items()}
        first: dict[int, str] = {}
        for name, parameter in own.items():  # of several names of one tensor, the file has the first
            if (other := first.setdefault(id(parameter), name)) in found:
                found.setdefault(name, found[other])
        base = {name.removeprefix(FILE_PREFIX) for name in model.state_dict()}
        base -= {name.removeprefix(FILE_PREFIX) for name in _embeddings(model)}
        others = [name for name in found if name not in own and f".modules_to_save.{adapter_name}." not in name]
        foreign = {name for name in others if ".mos_" in name or name.removeprefix(FILE_PREFIX) in base}
        where, checked = f"the file for {adapter_name!r}", {n: t for n, t in found.items() if n in own or n in foreign}
        require_shapes(where, checked, {name: tuple(parameter.shape) for name, parameter in own.items()})
        require_finite(where, found, {name: torch.float64 for name in found if name not in own})
        return found


def _require_adapted(plan: Plan, adapter_name: str, model: nn.Module) -> None:
    adapted = {layer.base_layer for _, layer in _named_layers(model) if adapter_name in layer.mos_adapter}
    for linear in plan.linears:
        if linear.target.module not in adapted:
            raise ValueError(f"{linear.name!r} is adapted by the rules here for target_modules, but not by peft's")


def _is_own(name: str, adapter_name: str) -> bool:
    """Whether a tensor of the model belongs to the adapter."""
    return name.rpartition(".")[0].endswith((f".mos_adapter.{adapter_name}", f".mos_router.{adapter_name}"))


def _plan(model: nn.Module, config: MoSPeftConfig, adapter_name: str, state_dict: dict[str, Tensor] | None) -> Plan:
    """Where the adapter goes. Errors if the model, or the folder that `config` was read from, does not fit."""
    folder = config.read_from
    modules = _modules_to_adapt(model, config)
    parts = {part for name, _ in modules for part in name.split(".")}
    if adapter_name in parts or adapter_name.startswith(PREFIX):
        raise ValueError(
            f"adapter_name {adapter_name!r} is part of a tensor's name in this model, and peft tells the tensors of "
            "adapters apart by it: choose another name"
        )
    if "." in adapter_name or hasattr(MoSPeftRouter(model), adapter_name):
        raise ValueError(f"adapter_name {adapter_name!r} cannot be the name of a torch module: choose another name")
    if config.target_modules is None:
        with contextlib.nullcontext() if state_dict is None else contextlib.suppress(ValueError):
            config.target_modules = _default_targets(model, config, modules)
    elif isinstance(config.target_modules, list):
        config.target_modules = _without_excluded(model, config, modules)
    chosen = config.to_mos_config()
    if state_dict is not None:
        names = [plain_name(name).removesuffix(".mos_lora_A") for name in state_dict if name.endswith(".mos_lora_A")]
        everywhere = {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
        chosen = dataclasses.replace(chosen, target_modules=names, **everywhere)
        config.target_modules = config.target_modules or names
    try:
        plan = make_plan(model, chosen, modules)
    except ValueError as error:
        if is_all_linear(chosen.target_modules) or any(is_target(chosen, name) for name, _ in modules):
            raise
        raise NoMatchingPeftModuleError(str(error)) from None
    if folder is not None:
        _refuse_misfit(model, config, plan, folder)
    return plan


def _modules_to_adapt(model: nn.Module, config: MoSPeftConfig) -> list[tuple[str, nn.Module]]:
    """The modules that may get an adapter, under every name. An adapted linear counts as its base."""
    found, skipped = [], []
    for name, module in model.named_modules(remove_duplicate=False):
        if any(name.startswith(inner) for inner in skipped):
            continue
        if isinstance(module, (MoSLayer, MoSRouter)):
            raise ValueError(f"the model has an adapter of apply_mos, at {name!r}: call remove_mos(model) first")
        is_ours = isinstance(module, MoSTunerLayer)
        if isinstance(module, BaseTunerLayer) and not is_ours:
            raise ValueError(
                f"the model has another peft method's adapter, at {name!r} ({type(module).__name__}): unload it first"
            )
        if is_ours or isinstance(module, AuxiliaryTrainingWrapper):
            skipped.append(name + ".")
        if isinstance(module, (MoSPeftRouter, AuxiliaryTrainingWrapper)):
            continue
        if any(f".{saved}." in f".{name}." for saved in config.modules_to_save or []):
            continue
        found.append((name, module.base_layer if isinstance(module, MoSPeftLayer) else module))
    return found


def _refuse_misfit(model: nn.Module, config: MoSPeftConfig, plan: Plan, folder: Path) -> None:
    """ValueError unless the weights in `folder` are exactly those that peft will load."""
    if not (folder / CONFIG_NAME).is_file():
        return  # the folder is gone, so nothing will be loaded from it
    if getattr(model, "_checkpoint_conversion_mapping", None):
        return  # tensors are renamed during loading
    found, embeddings = read_tensors(folder / WEIGHTS_NAME), _embeddings(model)
    plain = {name: name.replace(".base_layer.", ".") for name in found}  # of a head that is to be adapted
    found = {plain[name] if plain[name] in embeddings else name: tensor for name, tensor in found.items()}
    tensors = without_idle(found, config.to_mos_config())
    embeddings = {name: tensor for name, tensor in embeddings.items() if name in tensors}
    require_fit(folder, tensors, adapter_shapes(plan), embeddings | _saved_whole(model, config.modules_to_save or []))


def _saved_whole(model: nn.Module, entries: list[str]) -> dict[str, Tensor]:
    """The tensors of the modules that peft copies for each adapter (modules_to_save)."""
    found, skipped = {}, ()
    for name, module in model.named_modules():
        if name.startswith(skipped) or not any(name.endswith(entry) for entry in entries):
            continue
        if isinstance(module, AuxiliaryTrainingWrapper):
            skipped += (name + ".",)
            module = module.original_module
        found |= {f"{name}.{key}": tensor for key, tensor in module.state_dict(keep_vars=True).items()}
    return found


def _embeddings(model: nn.Module) -> dict[str, Tensor]:
    """The embeddings, which peft saves with an adapter if the vocabulary was resized."""
    modules = []
    for side in ("input", "output"):
        with contextlib.suppress(AttributeError, NotImplementedError):
            modules.append(getattr(model, f"get_{side}_embeddings")())
    return {
        f"{name}.{key}": tensor
        for name, module in model.named_modules()
        if any(module is embedding for embedding in modules) and not isinstance(module, AuxiliaryTrainingWrapper)
        for key, tensor in module.state_dict(keep_vars=True).items()
    }


def _default_targets(model: nn.Module, config: MoSPeftConfig, modules: list[tuple[str, nn.Module]]) -> list[str] | str:
    """The FFN linears of the model. Entries that match nothing under the other options are left out."""
    known = ffn_target_modules(model)
    layers = config.layers_to_transform
    if isinstance(known, str) and layers is not None:  # it needs a list: name each linear
        layers = [layers] if isinstance(layers, int) else layers
        every = dataclasses.replace(config.to_mos_config(), target_modules=known, layers_to_transform=None)
        named = [plain_name(name) for name, _ in modules if is_target(every, name)]
        return [name for name in named if layer_index(name, config.layers_pattern) in layers] or known
    if isinstance(known, str):
        return known
    return [entry for entry in known if _chooses(config, entry, modules)] or known


def _without_excluded(model: nn.Module, config: MoSPeftConfig, modules: list[tuple[str, nn.Module]]) -> list[str]:
    """target_modules without the entries of which exclude_modules or modules_to_save leaves nothing."""
    kept = {name for name, _ in modules}
    taken = [(name, module) for name, module in model.named_modules() if name not in kept]
    every = dataclasses.replace(config, exclude_modules=None, modules_to_save=None)
    left = [
        entry
        for entry in config.target_modules
        if _chooses(config, entry, modules) or not _chooses(every, entry, [*modules, *taken])
    ]
    return left or config.target_modules


def _chooses(config: MoSPeftConfig, entry: str, modules: list[tuple[str, nn.Module]]) -> bool:
    own = dataclasses.replace(config.to_mos_config(), target_modules=[entry])
    return any(is_target(own, name) for name, _ in modules)


def _named_layers(model: nn.Module) -> list[tuple[str, MoSPeftLayer]]:
    modules = model.named_modules(remove_duplicate=False)
    return [(name, module) for name, module in modules if isinstance(module, MoSPeftLayer)]


def _routed_blocks(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module._modules.get("mos_router"), MoSPeftRouter)]


def _bind(block: nn.Module, form: FFNForm, routers: MoSPeftRouter) -> None:
    """Pass the gates of all adapters to every adapted linear of the block. Each adapter uses its own."""
    routed = tuple(name for name in form.linears if isinstance(getattr(block, name), MoSPeftLayer))
    add_router(block, dataclasses.replace(form, routed=routed), routers)


def _put_back(model: nn.Module, but: tuple[str, ...] = ()) -> None:
    """Restore the blocks and linears that have none of the adapters in `but`."""
    for block in _routed_blocks(model):
        if block.mos_router.keys().isdisjoint(but):
            remove_router(block)
    for name, layer in _named_layers(model):
        if layer.mos_adapter.keys().isdisjoint(but):
            model.set_submodule(name, layer.base_layer)
    if not _named_layers(model):
        forget_attention_mask(model)


def _withdraw(model: nn.Module, adapter_name: str, active: list[str]) -> None:
    """Remove an adapter that could be put on only a part of the model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the next active adapter, which is the earlier one
        for module in model.modules():
            if isinstance(module, MoSTunerLayer):
                module.delete_adapter(adapter_name)
        for name, wrapper in list(model.named_modules(remove_duplicate=False)):
            if isinstance(wrapper, ModulesToSaveWrapper) and adapter_name in wrapper.modules_to_save:
                wrapper.delete_adapter(adapter_name, [other for other in active if other != adapter_name])
                if not len(wrapper.modules_to_save):
                    model.set_submodule(name, wrapper.original_module)
    _put_back(model, tuple(name for _, layer in _named_layers(model) for name in layer.mos_adapter))
    for block in _routed_blocks(model):
        _bind(block, recognise(block), block.mos_router)


if MOSELORA not in PEFT_TYPE_TO_TUNER_MAPPING:
    register_peft_method(name="moselora", config_cls=MoSPeftConfig, model_cls=MoSPeftModel, prefix=PREFIX)
