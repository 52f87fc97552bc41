"""Which linears of a model get an adapter: peft's rules for names, and errors before anything is changed."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from mos_kernels.config import MoSConfig
from mos_kernels.huggingface.modules import plain_name
from mos_kernels.huggingface.past_forward import why_past_forward
from mos_kernels.layer import (
    MoSConv1D,
    MoSLayer,
    MoSLinear,
    MoSRouter,
    MoSWrapped,
    has_own_forward,
    is_dense,
    offload_hook,
)
from mos_kernels.sharded import refuse_fsdp1, refuse_sharded

ALL_LINEAR = "all-linear"
HEADS = ("score", "classifier", "qa_outputs")
"""The names of the heads of transformers' classifiers. They are trained in full, so "all-linear" leaves them out."""

_GATED = ["gate_proj", "up_proj", "down_proj"]
_FUSED = ["gate_up_proj", "down_proj"]
_GPT2 = ["c_fc", "mlp.c_proj"]
_FC = ["fc1", "fc2"]
_BERT = r"(.*\.)?layer\.\d+\.(intermediate|output)\.dense"
_GATED_TYPES = """llama mistral ministral qwen2 qwen3 gemma gemma2 gemma3 gemma3_text gemma3n gemma3n_text olmo olmo2
olmo3 stablelm cohere cohere2 granite smollm3 helium exaone4 ernie4_5 seed_oss qwen2_vl qwen2_5_vl qwen3_vl"""
_BERT_TYPES = "bert roberta xlm-roberta camembert electra mpnet deberta deberta-v2 ernie"
_FFN_TARGETS: dict[str, list[str] | str] = {
    **dict.fromkeys(_GATED_TYPES.split(), _GATED),
    **dict.fromkeys(["phi3", "glm", "glm4"], _FUSED),
    **dict.fromkeys(["gpt2", "gpt_neo", "gpt_bigcode", "starcoder2"], _GPT2),
    **dict.fromkeys(["phi", "opt", "clip", "siglip", "vit", "whisper", "bart", "mbart"], _FC),
    **dict.fromkeys(["gpt_neox", "bloom"], ["dense_h_to_4h", "dense_4h_to_h"]),
    **dict.fromkeys(["gptj", "codegen"], ["fc_in", "fc_out"]),
    **dict.fromkeys(_BERT_TYPES.split(), _BERT),
    "distilbert": ["lin1", "lin2"],
    "modernbert": ["mlp.Wi", "mlp.Wo"],
}
_T5_TYPES = ("t5", "mt5", "umt5", "longt5")


@dataclass(frozen=True)
class Target:
    """A linear to adapt. names: all names under which the module is registered, in the model's order."""

    names: tuple[str, ...]
    module: nn.Module

    @property
    def name(self) -> str:
        """The first of the names, as in files."""
        return plain_name(self.names[0])


def is_linear(module: nn.Module) -> bool:
    """Whether it is an nn.Linear, a Conv1D, or a module like a quantised linear (with widths and without children)."""
    module = base_of(module)
    if isinstance(module, (nn.Linear, Conv1D)):
        return True
    widths = (getattr(module, name, None) for name in ("in_features", "out_features"))
    return all(isinstance(width, int) for width in widths) and next(module.children(), None) is None


def base_of(module: nn.Module) -> nn.Module:
    """The linear in a layer of the peft method; any other module as it is."""
    return module.base_layer if isinstance(module._modules.get("mos_adapter"), nn.ModuleDict) else module


def layer_kind(linear: nn.Module) -> type[MoSLayer]:
    """The layer that adapts this linear. A dense linear and its adapter are one operation; others are wrapped."""
    if offload_hook(linear) is not None or has_own_forward(linear):
        return MoSWrapped
    if is_dense(linear) and type(linear) is nn.Linear:
        return MoSLinear
    return MoSConv1D if is_dense(linear) and type(linear) is Conv1D else MoSWrapped


def has_hooks(module: nn.Module) -> bool:
    """Whether something is to run before or after the module's forward or backward."""
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


def in_features(linear: nn.Module) -> int:
    """The width of a linear's input."""
    return linear.nx if isinstance(linear, Conv1D) else linear.in_features


def out_features(linear: nn.Module) -> int:
    """The width of a linear's output."""
    return linear.nf if isinstance(linear, Conv1D) else linear.out_features


def ffn_target_modules(model: nn.Module) -> list[str] | str:
    """`target_modules` for the FFN blocks of `model`, by its config.model_type. ValueError for an unknown type."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type in _T5_TYPES:
        return ["wi_0", "wi_1", "wo"] if getattr(model.config, "is_gated_act", False) else ["wi", "wo"]
    if model_type not in _FFN_TARGETS:
        raise ValueError(
            f"no FFN linears are known for model type {model_type!r}: name them in target_modules; the model has "
            f"linears ending in {_linear_endings(model)}"
        )
    known = _FFN_TARGETS[model_type]
    return known if isinstance(known, str) else list(known)


def find_targets(
    model: nn.Module, config: MoSConfig, modules: list[tuple[str, nn.Module]] | None = None
) -> list[Target]:
    """The linears that `config` names, in the model's order. The model is not changed.

    modules: the modules to choose from, with every name of each. None: all modules of a model without an adapter.
    Raises ValueError or TypeError if an entry of target_modules, or an index in layers_to_transform, matches nothing,
    or if a match is not a linear that can be adapted. Warns if an entry of exclude_modules matches nothing.
    """
    if modules is None:
        _refuse_adapted(model)
        modules = list(model.named_modules(remove_duplicate=False))
    if config.layers_to_transform is not None and isinstance(config.target_modules, str):
        raise ValueError(
            f"layers_to_transform={config.layers_to_transform} has no effect when target_modules is the string "
            f"{config.target_modules!r}: give a list of name endings"
        )
    if is_all_linear(config.target_modules):
        heads = _heads(model)
        matched = [
            (name, module)
            for name, module in modules
            if is_linear(module)
            and not _ends_with_any(name, config.exclude_modules)
            and not any(module is head for head in heads)
        ]
    else:
        _refuse_3d_parameters(model, config)
        matched = [(name, module) for name, module in modules if name and is_target(config, name)]
    _require_matches(model, config, *([plain_name(name) for name, _ in found] for found in (matched, modules)))
    for name, module in matched:
        _require_plain_linear(name, module, model, config)

    names: dict[nn.Module, list[str]] = {module: [] for _, module in matched}
    for name, module in modules:
        if module in names:
            names[module].append(name)
    targets = [Target(tuple(found), module) for module, found in names.items()]
    _require_patterns(config, targets)
    if config.exclude_modules:
        _warn_of_idle_exclusions(model, config.exclude_modules)
    return targets


def _warn_of_idle_exclusions(model: nn.Module, excluded: str | Sequence[str]) -> None:
    known = [name for name, _ in (*model.named_modules(remove_duplicate=False), *model.named_parameters())]
    for entry in [excluded] if isinstance(excluded, str) else [[ending] for ending in excluded]:
        if not any(_ends_with_any(name, entry) for name in known):
            warnings.warn(f"exclude_modules={entry!r} matches nothing in {type(model).__name__}", stacklevel=4)


def is_target(config: MoSConfig, name: str) -> bool:
    """Whether target_modules, exclude_modules and layers_to_transform select the module `name`, as in peft.

    A full name in target_modules is selected whatever its layer.
    """
    if _ends_with_any(name, config.exclude_modules) or not _ends_with_any(name, config.target_modules):
        return False
    if isinstance(config.target_modules, str) or plain_name(name) in map(plain_name, config.target_modules):
        return True
    return _in_layers(config, name)


def layer_index(name: str, layers_pattern) -> int | None:
    """The index of the layer of the module `name`: the first number in the name, or the first after a pattern."""
    if not layers_pattern:
        found = re.match(r".*?\.[^.]*\.(?P<index>\d+)\.", name)
    else:
        patterns = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern
        matches = (re.match(rf"(?:^|.*?\.)(?:{pattern})\.(?P<index>\d+)\.", name) for pattern in patterns)
        found = next((match for match in matches if match), None)
    return int(found["index"]) if found else None


def _in_layers(config: MoSConfig, name: str) -> bool:
    layers = config.layers_to_transform
    if layers is None or layers == ():
        return True
    return layer_index(name, config.layers_pattern) in ((layers,) if isinstance(layers, int) else layers)


def _ends_with(name: str, ending: str) -> bool:
    return name == ending or name.endswith("." + ending)


def _ends_with_any(name: str, endings) -> bool:
    """endings: None, one regular expression for the whole name, or a list of name endings. See `plain_name`."""
    if endings is None:
        return False
    plain = plain_name(name)
    if isinstance(endings, str):
        return any(re.fullmatch(endings, name) for name in (name, plain))
    return any(_ends_with(plain, plain_name(ending)) for ending in endings)


def is_all_linear(target_modules: str | Sequence[str]) -> bool:
    """Whether it is "all-linear", in upper or lower case, as in peft."""
    return isinstance(target_modules, str) and target_modules.lower() == ALL_LINEAR


def _heads(model: nn.Module) -> list[nn.Module]:
    """The modules of the model's head: its output embeddings, or else its classifier."""
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if output is not None:
        return [output]
    return [module for head in classifier_heads(model).values() for module in head.modules()]


def classifier_heads(model: nn.Module) -> dict[str, nn.Module]:
    """The heads of a classifier, by name."""
    return {name: head for name in HEADS if isinstance(head := getattr(model, name, None), nn.Module)}


def frozen_heads(model: nn.Module) -> list[str]:
    """The names of a classifier's heads that are frozen. A new head must be trained, since its values are random."""
    heads = classifier_heads(model).items()
    return [name for name, head in heads if not any(parameter.requires_grad for parameter in head.parameters())]


def _refuse_adapted(model: nn.Module) -> None:
    refuse_fsdp1(model)
    refuse_peft(model)
    for name, module in model.named_modules():
        if isinstance(module, (MoSLayer, MoSRouter)):
            raise ValueError(f"the model has a MoS adapter already, at {name!r}: call remove_mos(model) first")


def refuse_peft(model: nn.Module, remedy: str = "unload it first") -> None:
    """ValueError for a model with an adapter of peft. It cannot have one of apply_mos as well."""
    for name, module in model.named_modules():
        # tuner layers of methods that are not part of peft, such as our own, have this attribute
        if type(module).__module__.split(".")[0] == "peft" or hasattr(type(module), "adapter_layer_names"):
            raise ValueError(f"the model has a peft adapter, at {name!r} ({type(module).__name__}): {remedy}")


def _refuse_3d_parameters(model: nn.Module, config: MoSConfig) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3 and "mos_" not in name and is_target(config, name):
            raise ValueError(
                f"target_modules={_shown(config.target_modules)} matches {name!r}, a 3-D parameter of shape "
                f"{tuple(parameter.shape)} (the experts of a mixture-of-experts block in one tensor), which MoS does "
                "not adapt: supported are nn.Linear and Conv1D modules. Leave it out with exclude_modules, or target "
                f"the linears that the model has: {_linear_endings(model)}"
            )


def _require_matches(model: nn.Module, config: MoSConfig, matched: list[str], names: list[str]) -> None:
    if isinstance(config.target_modules, str):
        missing = [] if matched else [config.target_modules]
    else:
        missing = [
            entry for entry in config.target_modules if not any(_ends_with(name, plain_name(entry)) for name in matched)
        ]
    if missing:
        filters = {
            field: getattr(config, field)
            for field in ("exclude_modules", "layers_to_transform", "layers_pattern")
            if getattr(config, field) is not None
        }
        filtered = f" under {', '.join(f'{k}={_shown(v)}' for k, v in filters.items())}" if filters else ""
        is_regex = isinstance(config.target_modules, str)
        hint = " A string is a regular expression for the whole name; a list names its ending." if is_regex else ""
        shown = repr(config.target_modules) if is_regex else _shown(missing)
        raise ValueError(
            f"target_modules {shown} match nothing in {type(model).__name__}{filtered}; it has linears "
            f"ending in {_linear_endings(model)}.{hint}{_ffn_hint(model)}"
        )
    layers = config.layers_to_transform
    if layers is not None:
        found = {layer_index(name, config.layers_pattern) for name in matched}
        absent = sorted(set((layers,) if isinstance(layers, int) else layers) - found)
        if absent:
            there = sorted({layer_index(name, config.layers_pattern) for name in names} - {None})
            raise ValueError(
                f"layers_to_transform={layers}: no target module is in layers {absent}; the model's layers are {there}"
            )


def _require_plain_linear(name: str, module: nn.Module, model: nn.Module, config: MoSConfig) -> None:
    kind = type(module)
    parent, _, child = name.rpartition(".")
    why = "no linear"
    if kind is nn.modules.linear.NonDynamicallyQuantizableLinear:
        why = "whose forward nn.MultiheadAttention never calls, so that an adapter would have no effect"
    elif is_linear(module):
        past_forward = why_past_forward(model.get_submodule(parent), child)
        why = past_forward and f"which an adapter would not reach there: {past_forward}"
    if why:
        if why == "no linear":
            why += ". Supported are nn.Linear and its quantised forms, and transformers' Conv1D"
        others = [ending for ending in _linear_endings(model) if ending != child]
        raise TypeError(
            f"target_modules={_shown(config.target_modules)} matches {name!r}, a {kind.__module__}.{kind.__qualname__}"
            f", {why}. Leave it out with exclude_modules=[{child!r}], or name other linears: {others}"
        )
    if not name:
        raise ValueError("the model is itself a linear: use MoSLinear.from_linear(linear, config)")
    refuse_sharded(name, module)
    if has_hooks(module) and layer_kind(module) is not MoSWrapped:
        raise ValueError(f"{name!r} has hooks, which its replacement would lose: remove them, or add them afterwards")


def refuse_offloaded(name: str, module: nn.Module) -> None:
    """ValueError if accelerate has offloaded the adapter's own weights."""
    if offload_hook(module) is not None:
        raise ValueError(
            f"accelerate offloads the weights of {name!r}, the adapter's included: call "
            "accelerate.hooks.remove_hook_from_submodules(model) first; an adapter that comes after cpu_offload or "
            "dispatch_model is not offloaded"
        )


def _require_patterns(config: MoSConfig, targets: list[Target]) -> None:
    for field in ("rank_pattern", "alpha_pattern", "spaces_pattern"):
        earlier: set[str] = set()
        for key in getattr(config, field) or {}:
            matched = {target.name for target in targets if re.match(rf"(.*\.)?({key})$", target.name)}
            if matched and matched <= earlier:
                warnings.warn(
                    f"the key {key!r} of {field} has no effect: for each of its linears, an earlier key matches and "
                    "counts. Put it first, or drop it",
                    stacklevel=5,
                )
            earlier |= matched
            if not matched:
                endings = list(dict.fromkeys(target.name.rpartition(".")[2] for target in targets))
                raise ValueError(
                    f"{field} has the key {key!r}, which matches none of the {len(targets)} targets, ending in "
                    f"{endings}: correct the key, or name the linear in target_modules too"
                )


def _linear_endings(model: nn.Module) -> list[str]:
    linears = (plain_name(name) for name, module in model.named_modules() if is_linear(module))
    return list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in linears))


def _ffn_hint(model: nn.Module) -> str:
    try:
        targets = ffn_target_modules(model)
    except ValueError:
        return ""
    return f" For the FFN blocks of a {model.config.model_type} model use target_modules={targets!r}"


def _shown(value) -> str:
    return repr(list(value) if isinstance(value, tuple) else value)
