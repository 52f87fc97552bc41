"""The adapter's options on the command line: one for every field of `MoSConfig`, none of them accepted and ignored."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import types
import typing
from collections.abc import Iterable, Mapping

from mos_kernels.config import MoSConfig
from mos_kernels.finetune.adalora import ADALORA_FIELDS

METHODS = ("mos", "hydralora", "mixture_of_lora", "lora", "dora", "adalora", "frozen")
PRESETS = ("default", "paper", "hydralora", "mixture_of_lora")

LORA_FIELDS = (
    "r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
)  # fmt: skip
"""The fields of MoSConfig that peft's LoraConfig has too, with the same meaning."""

PEFT_FIELDS = {"lora": LORA_FIELDS, "dora": LORA_FIELDS, "adalora": ADALORA_FIELDS}

_CURVED_ONLY = (
    "curvature_init", "length_unit", "learn_curvature", "curvature_lr_ratio", "curvature_max_grad_norm", "mapping",
    "domain", "boundary_eps",
)  # fmt: skip

_HELP = {
    "use_rslora": "scale by lora_alpha / sqrt(r) instead",
    "target_modules": "linears to adapt: several name endings, one regular expression, or all-linear",
    "exclude_modules": "linears to leave out, in the same notation",
    "layers_to_transform": "indices of the layers to adapt",
    "layers_pattern": "name of the list of layers, where layers_to_transform is given",
    "rank_pattern": "rank by module name or regular expression, as JSON or name=number,...",
    "alpha_pattern": "lora_alpha by module name or regular expression, as JSON or name=number,...",
}


class OptionError(ValueError):
    """An option with a bad value, without effect here, or that does not fit the others."""


def add_adapter_arguments(parser: argparse.ArgumentParser, more_methods: Iterable[str] = ()) -> None:
    """Add --method, --preset, --num-experts and an option for every field of `MoSConfig`."""
    group = parser.add_argument_group("adapter")
    group.add_argument(
        "--method", choices=(*METHODS, *more_methods), default="mos", help="default mos; frozen: head alone"
    )
    group.add_argument("--preset", choices=PRESETS, help="MoSConfig's preset for --method mos (default: default)")
    group.add_argument("--num-experts", type=int, help="experts of hydralora and mixture_of_lora (default 8)")
    config = parser.add_argument_group("MoSConfig", "for lora, dora and adalora, the options that peft has too")
    hints, helps, defaults = typing.get_type_hints(MoSConfig), _docstring_helps(), MoSConfig()
    for field in dataclasses.fields(MoSConfig):
        default = "the model's FFN linears" if field.name == "target_modules" else _shown(getattr(defaults, field.name))
        text = f"{_HELP.get(field.name) or helps[field.name]} (default {default})".replace("%", "%%")
        config.add_argument("--" + field.name.replace("_", "-"), default=None, help=text, **_parsing(hints[field.name]))


def given_options(args: argparse.Namespace) -> dict:
    """The fields of `MoSConfig` that were given on the command line, in Python types."""
    names = [field.name for field in dataclasses.fields(MoSConfig) if getattr(args, field.name) is not None]
    return {name: _value(name, getattr(args, name)) for name in names}


def adapter_config(
    method: str, preset: str | None, num_experts: int | None, given: Mapping, more_methods: Mapping | None = None
) -> MoSConfig | dict | None:
    """What --method, --preset, --num-experts and the options given make together.

    Returns a `MoSConfig`, a dict of the fields that apply for peft's methods and for `more_methods` (`Method` by name),
    or None for frozen. `target_modules` is left at its default (MoSConfig) or out (dict) where it was not given. Bad
    values, and options without effect, raise `OptionError`.
    """
    try:
        return _adapter_config(method, preset, num_experts, given, more_methods or {})
    except OptionError:
        raise
    except ValueError as error:  # MoSConfig's own checks
        raise OptionError(error) from None


def _adapter_config(
    method: str, preset: str | None, num_experts: int | None, given: Mapping, more_methods: Mapping
) -> MoSConfig | dict | None:
    if preset is not None and method != "mos":
        raise OptionError(f"--preset {preset} is for --method mos, and the method is {method}: drop it")
    builder = preset if method == "mos" and preset else method
    if num_experts is not None and builder not in ("hydralora", "mixture_of_lora"):
        raise OptionError(
            "--num-experts is for hydralora and mixture_of_lora: give --spaces hyperbolic=N,spherical=N,euclidean=N"
            if method == "mos"
            else f"--num-experts has no effect with --method {method}: drop it"
        )
    if method == "frozen":
        _refuse(given, "trains no adapter", method)
        return None
    if method in ("lora", "dora", "adalora", *more_methods):
        fields = more_methods[method].fields if method in more_methods else PEFT_FIELDS[method]
        _refuse([name for name in given if name not in fields], f"takes {_flags(fields)} alone", method)
        config = MoSConfig(**given)  # for its checks
        return {name: getattr(config, name) for name in fields if name != "target_modules" or name in given}
    if builder in ("hydralora", "mixture_of_lora"):
        make = getattr(MoSConfig, builder)
        config = make(**given) if num_experts is None else make(num_experts, **given)
    else:
        config = MoSConfig.paper(**given) if builder == "paper" else MoSConfig(**given)
    _refuse_without_effect(config, given)
    return config


def _refuse(names, why: str, method: str) -> None:
    if names:
        raise OptionError(f"{_flags(names)}: no effect with --method {method}, which {why}: drop the option")


def _refuse_without_effect(config: MoSConfig, given: Mapping) -> None:
    curved = set(config.spaces) - {"euclidean"}
    reasons = {name: "every expert is Euclidean" for name in _CURVED_ONLY if not curved}
    if curved and not config.learn_curvature:
        reasons |= dict.fromkeys(("curvature_lr_ratio", "curvature_max_grad_norm"), "the curvature is not learned")
    if curved and config.mapping == "exp_log":
        reasons["domain"] = "the exponential map is defined everywhere"
    for name, reason in reasons.items():
        if name in given:
            raise OptionError(f"{_flags([name])}: no effect here, where {reason}: drop the option")


def _flags(names) -> str:
    return ", ".join("--" + name.replace("_", "-") for name in names)


# parsing


def _parsing(hint) -> dict:
    """argparse's arguments for a field of this type."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if any(_is_a(option, Mapping) for option in options):
        return {"type": _mapping, "metavar": "NAME=N,..."}
    if any(typing.get_origin(option) is not None for option in options):  # a sequence, or one item
        return {"nargs": "+", "type": int if int in options else str, "metavar": "N" if int in options else "NAME"}
    if bool in options:
        return {
            "type": lambda text: {"true": True, "false": False}.get(text.lower(), text),
            "metavar": "true|false|NAME",
        }
    if str in options and float in options:
        return {"type": _number_or_name, "metavar": "NUMBER|NAME"}
    kind = next(option for option in options if option is not type(None))
    return {"type": kind, "metavar": {int: "N", float: "X"}.get(kind, "NAME")}


def _is_a(hint, kind: type) -> bool:
    return isinstance(typing.get_origin(hint), type) and issubclass(typing.get_origin(hint), kind)


def _number_or_name(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _mapping(text: str) -> dict:
    """{"hyperbolic": 3} or hyperbolic=3,spherical=3. A name given twice is an error."""
    if text.lstrip().startswith("{"):
        try:
            pairs = json.loads(text, object_pairs_hook=lambda pairs: pairs)
        except json.JSONDecodeError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is not valid JSON: {error}") from None
    else:
        pairs = []
        for item in filter(None, text.split(",")):
            name, sign, number = item.rpartition("=")
            try:
                pairs.append((name.strip(), int(number) if number.strip().lstrip("-").isdecimal() else float(number)))
            except ValueError:
                sign = ""
            if not sign:
                raise argparse.ArgumentTypeError(f"{item!r} in {text!r} is not NAME=NUMBER")
    if len({name for name, _ in pairs}) < len(pairs):
        raise argparse.ArgumentTypeError(f"{text!r} gives a name twice")
    return dict(pairs)


def _value(name: str, value):
    if not isinstance(value, list):
        return value
    if name in ("target_modules", "exclude_modules", "layers_pattern") and len(value) == 1:
        # a lone plain name is a list of one name ending; "all-linear" and regular expressions stay strings, as in peft
        return value[0] if value[0] == "all-linear" or not re.fullmatch(r"[\w.\-]+", value[0]) else value
    return value


def _docstring_helps() -> dict[str, str]:
    """The description of each field, from the docstring of `MoSConfig`."""
    entries = re.findall(r"^ {8}(\w+): ((?:.+\n?)(?: {12}.+\n?)*)", MoSConfig.__doc__, re.MULTILINE)
    return {name: " ".join(text.split()).rstrip(".") for name, text in entries}


def _shown(value) -> str:
    return ",".join(f"{name}={count}" for name, count in value.items()) if isinstance(value, Mapping) else str(value)
