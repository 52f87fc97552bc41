"""Adapter files in peft's format: adapter_config.json, adapter_model.safetensors and a model card.

Tensors are named `base_model.model.<path>.mos_lora_A` and so on; a block's router is `<block>.mos_router.weight`. Other
trained modules, such as a classification head, are saved whole and listed in modules_to_save, as peft does.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Container, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

import mos_kernels
from mos_kernels.config import MoSConfig
from mos_kernels.huggingface.apply import install, remove_mos
from mos_kernels.huggingface.atomic import CONFIG_NAME, WEIGHTS_NAME, write_folder
from mos_kernels.huggingface.card import adapter_card, classes_to_load
from mos_kernels.huggingface.modules import (
    adapter_parameters,
    mos_modules,
    own_adapter_parameters,
    plain_name,
    refuse_parallel,
    unwrap,
)
from mos_kernels.huggingface.plan import PlannedLinear, adapter_shapes, make_plan
from mos_kernels.huggingface.state import adapter_state, require_adapted, tensors_of
from mos_kernels.huggingface.targets import refuse_peft
from mos_kernels.layer import ADAPTER_PARAMETERS, MoSLayer, offload_hook, parameter_shapes
from mos_kernels.sharded import gathered, refuse_zero3, spread_like, whole, whole_shape, write_once

PICKLE_NAME = "adapter_model.bin"
PEFT_TYPE = "MOSELORA"
PREFIX = "base_model.model."
HEAD_WEIGHTS = ("score.weight", "classifier.weight", "classifier.out_proj.weight")
"""How the name of a classifier's weight (classes, width) ends."""

_MOS_FIELDS = frozenset(field.name for field in dataclasses.fields(MoSConfig))
_WHERE_FIELDS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
_OTHER_FIELDS = """peft_type peft_version mos_kernels_version base_model_name_or_path revision task_type inference_mode
auto_mapping modules_to_save"""


def save_adapter(model: nn.Module, folder: str | os.PathLike) -> None:
    """Write the adapter of `model`, and every other module that was trained or loaded with it, to `folder`.

    Modules that are frozen now, but were trained, are saved too. Forwards with gradients, copies of the model,
    MoSCallback and mos_param_groups note which modules are trainable. This fails in one case: the model runs compiled
    in a training loop of your own, and is frozen before its first save.

    Files are replaced whole, the configuration last. An interrupted save leaves the old files, or a folder without
    adapter_config.json. If parameters are sharded (FSDP2, ZeRO-3), every process must call this: it gathers them, the
    first process writes, and all processes return after that. Raises ValueError without an adapter, with an adapter of
    peft, with weights on the meta device, or if the file could not be loaded: a linear has lost its adapter, or a
    parameter is pruned, parametrised, or tied to another one.
    """
    model = unwrap(model)
    state = adapter_state(model)
    if state is None and hasattr(model, "peft_config"):
        raise ValueError("the adapter was put on by peft: call model.save_pretrained(folder), whose files are the same")
    if state is None:
        raise ValueError(f"{type(model).__name__} has no MoS adapter: call apply_mos(model, config) first")
    refuse_peft(model)  # its parameters would be saved as modules of the base
    require_adapted(model, state.linears)
    _require_parameters(model, state.linears)
    modules = state.modules_to_save()
    saved = tensors_of(model, [*modules, *named_by_ending(model, modules)])
    parameters = {**adapter_parameters(model), **saved}
    offloaded = [name for name, tensor in parameters.items() if tensor.is_meta]
    if offloaded:
        raise ValueError(f"{offloaded[0]!r} is on the meta device (offloaded?): bring its values back before saving")
    tensors = {PREFIX + name: tensor for name, tensor in gathered(parameters).items()}

    own = {"peft_type": PEFT_TYPE, "task_type": None, "mos_kernels_version": mos_kernels.__version__}
    config = {**state.config.to_dict(), **own, **about_base(model), "modules_to_save": modules or None}
    card = adapter_card(config["base_model_name_or_path"], class_of(model), state.config, classes_to_load(model))
    write_once(parameters.values(), lambda: write_folder(Path(folder), tensors, config, card))


def _require_parameters(model: nn.Module, linears: Iterable[str]) -> None:
    """ValueError if a tensor of the adapter on these linears would not be saved, or would be saved for two of them."""
    by_name = {plain_name(name): module for name, module in model.named_modules(remove_duplicate=False)}
    adapted = mos_modules(model) | {name: by_name[name] for name in linears if name in by_name}
    names: dict[int, str] = {}
    for place, module in adapted.items():
        for key, parameter in own_adapter_parameters(module).items():
            name = f"{place}.{key}"
            if key not in module._parameters:
                raise ValueError(
                    f"{name!r} is no parameter now: if it is pruned or parametrised, call "
                    "torch.nn.utils.prune.remove or torch.nn.utils.parametrize.remove_parametrizations before"
                )
            other = names.setdefault(id(parameter), name)
            if other != name:
                raise ValueError(
                    f"{name!r} and {other!r} are one tensor since apply_mos, and a file names each tensor once: "
                    "give each its own (nn.Parameter(tensor.detach().clone())), or share the modules before apply_mos"
                )


def about_base(model: nn.Module) -> dict:
    """The entries of an adapter's configuration about its base model."""
    kind, base = class_of(model), getattr(getattr(model, "config", None), "_name_or_path", None)
    return {
        "auto_mapping": {"base_model_class": kind.__name__, "parent_library": kind.__module__},
        "base_model_name_or_path": base or None,
        "inference_mode": True,
    }


def load_adapter(model: nn.Module, folder: str | os.PathLike, is_trainable: bool = False) -> list[str]:
    """Put the adapter in `folder` on `model`. If the model has an equal adapter, only the tensors are loaded.

    Values are copied into parameters on the model's device, whatever the device or dtype they were saved from. With
    `is_trainable`, the adapter and the modules saved with it are trainable; otherwise they are frozen. With FSDP2,
    apply or load an adapter before fully_shard; after that, every process can load another one. If modules of the model
    are overwritten, such as a head, their earlier values are kept on the CPU. remove_mos, or another load_adapter, puts
    them back. Returns the names of the adapted linears.

    Everything is checked before the model is changed: FileNotFoundError for a missing folder or file, ValueError for
    files that are damaged, of another method, of another architecture, or not finite. Nothing is unpickled.
    """
    outer, model = model, unwrap(model)
    folder = Path(folder)
    config, modules = _read_config(folder)
    tensors = without_idle(read_tensors(folder / WEIGHTS_NAME), config)

    applied = adapter_state(model)
    if applied is None:
        refuse_parallel(outer)
        plan = make_plan(model, config)
        shapes, linears = adapter_shapes(plan), plan.linears
    else:
        _require_equal(applied.config, config)
        shapes, linears = {name: whole_shape(p) for name, p in adapter_parameters(model).items()}, []
    tensors = without_base(folder, tensors, model)
    endings = named_by_ending(model, modules)
    modules += [name for name in endings if any(tensor.startswith(f"{name}.") for tensor in tensors)]
    extra = tensors_of(model, modules)
    refuse_meta(linears, adapter_parameters(model) | extra)
    require_fit(folder, tensors, shapes, extra)
    require_untied(folder, model, extra, tensors)
    if applied is None:
        install(model, plan)
    else:
        refuse_zero3(adapter_parameters(model).values())
    try:
        own, extra = adapter_parameters(model), tensors_of(model, modules)
        targets = own | extra
        values = {name: spread_like(tensors[name], target) for name, target in targets.items()}
        adapter_state(model).replace({name: values[name] for name in extra})
    except BaseException:
        if applied is None:
            remove_mos(model)
        raise
    with torch.no_grad():
        for name, target in own.items():
            target.copy_(values[name])
    for name, target in targets.items():
        if isinstance(target, nn.Parameter):
            fixed = name.endswith("mos_curvature") and not config.learn_curvature
            target.requires_grad_(is_trainable and not fixed)
    adapter_state(model).trains = is_trainable
    return [plain_name(name) for name, module in model.named_modules() if isinstance(module, MoSLayer)]


def refuse_damaged(folder: Path) -> None:
    """Raise the errors of `load_adapter` that do not depend on the model. Missing weights are no error."""
    if not (folder / WEIGHTS_NAME).is_file() and not (folder / PICKLE_NAME).is_file():
        return
    config, _ = _read_config(folder)
    found = without_idle(read_tensors(folder / WEIGHTS_NAME), config)
    tensors = {name: tensor for name, tensor in found.items() if is_adapter(name)}
    _require_floating(folder, tensors, {})
    require_finite(folder, found, {name: torch.float64 for name in found if name not in tensors})
    for name, tensor in tensors.items():
        module, _, kind = name.removesuffix(".weight").rpartition(".")
        own, shape = config.for_module(module), tuple(tensor.shape)
        if name.endswith(".mos_router.weight"):  # the router of a block has the experts of the block's linears
            own = _with_experts(config, shape[0] if shape else 0)
        routed = dataclasses.replace(own, router_scope="linear")
        if shape != parameter_shapes(routed, d_in=shape[-1], d_out=shape[0]).get(kind):
            raise ValueError(
                f"{folder}: {name} has shape {shape}, which r={own.r} and {own.num_experts} experts do not have"
            )


def _with_experts(config: MoSConfig, E: int) -> MoSConfig:
    """`config` with E experts: its spaces, or an entry of its spaces_pattern, that have E experts in total."""
    for spaces in (config.spaces, *(config.spaces_pattern or {}).values()):
        if sum(spaces.values()) == E:
            return dataclasses.replace(config, spaces=spaces, num_experts_per_tok=min(config.num_experts_per_tok, E))
    return config


def require_fit(
    folder: Path, tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], whole: dict[str, Tensor]
) -> None:
    """ValueError unless the tensors of a file have these names and shapes, include those of `whole`, and are finite."""
    require_shapes(folder, tensors, shapes | {name: whole_shape(tensor) for name, tensor in whole.items()})
    require_finite(folder, tensors, _require_floating(folder, tensors, whole))


def is_adapter(name: str) -> bool:
    return name.endswith((*(f".{parameter}" for parameter in ADAPTER_PARAMETERS), ".mos_router.weight"))


def refuse_meta(linears: Iterable[PlannedLinear], tensors: Mapping[str, Tensor]) -> None:
    """ValueError if a tensor, or a linear to adapt, is on the meta device and no hook loads its values."""
    names = [name for name, tensor in tensors.items() if tensor.is_meta]
    for linear in linears:
        base = linear.target.module
        if offload_hook(base) is None and any(tensor.is_meta for tensor in [*base.parameters(), *base.buffers()]):
            names.append(linear.name)
    if names:
        raise ValueError(
            f"{names[0]!r} is on the meta device: load the base (and bring back what is offloaded) before the adapter"
        )


def _read_config(folder: Path) -> tuple[MoSConfig, list[str]]:
    path = folder / CONFIG_NAME
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder: pass the one that save_adapter wrote")
    if not path.is_file():
        if any(folder.glob("model*.safetensors")):
            raise FileNotFoundError(
                f"{path} is missing: {folder} holds a whole model. Put an equal adapter on the base with apply_mos, "
                "load the model's state dict into it, and call save_adapter"
            )
        raise FileNotFoundError(f"{path} is missing: no adapter was saved here, or the save was interrupted")
    values = read_json(path)
    if values.get("peft_type") != PEFT_TYPE:
        found = values.get("peft_type")
        raise ValueError(f"{path} has peft_type {found!r}, not {PEFT_TYPE!r}: it is no MoS adapter; load it with peft")
    unknown = unknown_options(values, _MOS_FIELDS.union(_OTHER_FIELDS.split()))
    try:
        config = MoSConfig.from_dict({**unknown, **{k: v for k, v in values.items() if k in _MOS_FIELDS}})
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{path}: {error}") from None
    modules = values.get("modules_to_save") or []
    if not isinstance(modules, list) or not all(isinstance(name, str) for name in modules):
        raise ValueError(f"{path}: modules_to_save={modules!r} must be a list of module names")
    return config, modules


def unknown_options(values: Mapping, known: Container[str]) -> dict:
    """The unknown options in a file. Options that are off, such as None or False, do not count."""
    return {name: v for name, v in values.items() if name not in known and v not in (None, False, [], {})}


def read_json(path: Path) -> dict:
    """The content of adapter_config.json. ValueError for a damaged file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): the file is damaged, save the adapter again") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__} where an object is expected: it is no adapter's")
    return values


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of an adapter's file, by their names in the model. Errors as in `load_adapter`."""
    if not path.is_file():
        pickled = path.with_name(PICKLE_NAME)
        why = f"; {pickled.name} is there, but pickles are never loaded: save it again as safetensors"
        raise FileNotFoundError(f"{path} is missing{why if pickled.is_file() else ': the adapter has no weights'}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{path} is truncated or damaged ({os.path.getsize(path)} bytes): {error}. Copy or save it again"
        ) from None
    foreign = [name for name in tensors if not name.startswith(PREFIX)]
    if foreign:
        raise ValueError(f"{path} has tensors without the prefix {PREFIX!r}, such as {foreign[0]!r}: no adapter file")
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


def without_idle(tensors: dict[str, Tensor], config: MoSConfig) -> dict[str, Tensor]:
    """The tensors of a file without router and curvature, if the adapter is a single Euclidean expert.

    Files of earlier versions have them. They have no effect, since the gate is 1 and the curvature 0.
    """
    if not config.is_lora or config.spaces_pattern:
        return tensors
    idle = (".mos_curvature", ".mos_router", ".mos_router.weight")
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(idle)}


def without_base(where, tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a file without the weights of adapted linears, which peft saves if a head is one of them.

    ValueError if they are not those of the model, up to the precision of either.
    """
    ours = {name: name.replace(".base_layer.", ".") for name in tensors if ".base_layer." in name}
    own = {plain_name(key): tensor for key, tensor in model.state_dict(keep_vars=True).items()} if ours else {}
    for name, plain in ours.items():
        value, found = tensors[name], own.get(plain)
        if found is None or whole_shape(found) != tuple(value.shape):
            continue  # as any other tensor that the model does not have
        if not found.is_meta:
            found = whole(found.detach()).cpu()
            if not (torch.equal(found.to(value.dtype), value) or torch.equal(found, value.to(found.dtype))):
                raise ValueError(
                    f"{where} holds {name!r}, the weights of the base that it was trained on, and this model has "
                    "others: load that base, or the adapter by PeftModel.from_pretrained, which replaces them"
                )
        tensors = {other: tensor for other, tensor in tensors.items() if other != name}
    return tensors


def _require_equal(applied: MoSConfig, loaded: MoSConfig) -> None:
    """ValueError if the configurations differ, except in target_modules and the like, which tensor names check."""
    ours, theirs = applied.to_dict(), loaded.to_dict()
    different = [
        f"{name}={theirs[name]!r} instead of {ours[name]!r}"
        for name in ours
        # as text, since the order of a pattern's keys counts
        if name not in _WHERE_FIELDS and json.dumps(theirs[name]) != json.dumps(ours[name])
    ]
    if different:
        raise ValueError(
            f"the model has a MoS adapter with another configuration (the file has {', '.join(different)}): call "
            "remove_mos(model) first"
        )


def require_shapes(where, tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> None:
    """ValueError unless the tensors have exactly these names and shapes."""
    missing = [name for name in shapes if name not in tensors]
    unexpected = [name for name in tensors if name not in shapes]
    found = {name: tuple(tensors[name].shape) for name in shapes if name in tensors}
    reshaped = [
        f"{name} {shape}, the model asks for {shapes[name]}" for name, shape in found.items() if shape != shapes[name]
    ]
    problems = [
        f"{len(names)} {what} ({', '.join(names[:4])}{', …' if len(names) > 4 else ''})"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
        if names
    ]
    if problems:
        remedy = "Load the base model that it was trained on"
        for name, shape in found.items():
            if name.endswith(HEAD_WEIGHTS) and shape != shapes[name]:
                remedy = f"Load the base model that it was trained on, with num_labels={shape[0]}"
        raise ValueError(
            f"{where} holds an adapter of another architecture than this model's; tensors: {'; '.join(problems)}. "
            f"{remedy}"
        )


def _require_floating(folder: Path, tensors: dict[str, Tensor], extra: dict[str, Tensor]) -> dict[str, torch.dtype]:
    """The dtype that each tensor will be cast to. ValueError for tensors that are not floats of 16 to 64 bits."""
    for name, tensor in tensors.items():
        wanted = extra[name].dtype if name in extra else torch.float32
        if tensor.dtype != wanted and tensor.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{folder}: {name} is {tensor.dtype}, where a float of 16 to 64 bits is expected")
    return {name: tensor.dtype for name, tensor in extra.items()}


def require_finite(where, tensors: dict[str, Tensor], dtypes: dict[str, torch.dtype] | None = None) -> None:
    """ValueError for values that are not finite in the dtype that they are cast to, by default float32."""
    dtypes = dtypes or {}

    def finite(name: str, tensor: Tensor) -> bool:
        # a float64 value may be finite in the file and not after the cast; curvature is always cast to float32
        wanted = dtypes.get(name, torch.float32)
        return not tensor.is_floating_point() or bool(tensor.to(wanted).isfinite().all())

    bad = [name for name, tensor in tensors.items() if not finite(name, tensor)]
    if bad:
        raise ValueError(f"{where}: {len(bad)} tensors have values that are not finite, such as {bad[0]}")


def named_by_ending(model: nn.Module, entries: list[str]) -> list[str]:
    """The modules that peft matches within a word: the entry "classifier" also matches pre_classifier."""
    return [
        name
        for name in dict.fromkeys(plain_name(name) for name, _ in model.named_modules())
        if any(name.endswith(entry) and not f".{name}".endswith(f".{entry}") for entry in entries)
    ]


def require_untied(where, model: nn.Module, whole: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """ValueError if a loaded module shares its parameter with another module, such as a head tied to the embeddings."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(plain_name(name))
    for name, target in whole.items():
        for other in names.get(id(target), []):
            if other not in values or not torch.equal(values[other], values[name]):
                raise ValueError(
                    f"{where}: {name!r} was trained by itself, and in this model it is tied to {other!r}: load the "
                    "base with tie_word_embeddings=False, or the adapter by PeftModel.from_pretrained, which unties it"
                )


def class_of(model: nn.Module) -> type[nn.Module]:
    """The model's class. fully_shard replaces it by a class that it makes."""
    kinds = (kind for kind in type(model).__mro__ if issubclass(kind, nn.Module))
    return next(kind for kind in kinds if not kind.__module__.startswith("torch.distributed."))
