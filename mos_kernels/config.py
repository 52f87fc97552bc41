"""`MoSConfig`: every choice of a Mixture-of-Space adapter, in one frozen and validated dataclass."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

SPACES = ("hyperbolic", "spherical", "euclidean")
"""The order of the experts, whatever the order in which `spaces` was written or read back."""

MAX_RANK, MAX_EXPERTS = 65536, 4096
"""Larger numbers are a typing error or a damaged file: the layer's tensors would fit on no machine."""

_SIGN = {"hyperbolic": -1.0, "spherical": 1.0, "euclidean": 0.0}


def default_spaces() -> dict[str, int]:
    return {"hyperbolic": 3, "spherical": 3, "euclidean": 2}


def listed(spaces: Mapping[str, int]) -> str:
    """Numbers of experts in words."""
    return ", ".join(f"{count} {space}" for space, count in spaces.items())


@dataclass(frozen=True)
class MoSConfig:
    """Options of a Mixture-of-Space adapter (MoSELoRA, arXiv 2602.14490), such as MoSConfig(r=8).

    The names are those of peft's `LoraConfig` and of transformers' mixture-of-experts models. A bad value raises a
    `ValueError` that names the value and the remedy. Equation numbers are the paper's. Dictionaries are kept in a form
    that cannot be changed in place.

    Attributes:
        r: rank of every expert, at most 65,536.
        lora_alpha: the adapter's output is scaled by `lora_alpha / r`, or `lora_alpha / sqrt(r)` with `use_rslora`;
            from 1e-10 to 1e10.
        lora_dropout: dropout probability on the adapter's input, in [0, 1). The router reads the input without it.
        use_rslora: scale by `lora_alpha / sqrt(r)`.
        init_lora_weights: True: A kaiming-uniform, B zero. "gaussian": A normal(0, 1/r), B zero. False: A
            kaiming-uniform, B random, so that the adapter has an effect from the start (for tests).
        spaces: number of experts by geometry, such as {"hyperbolic": 2, "euclidean": 2}. E is their sum, at most 4,096.
            The experts are always ordered hyperbolic, spherical, euclidean.
        num_experts_per_tok: k, the number of experts that a token uses.
        norm_topk_prob: renormalise the gates of the k experts to sum to 1.
        router_scope: "ffn": one router for each FFN block, reading the block's input. "linear": one for each linear.
        router_aux_loss_coef: coefficient of the load-balancing loss E·Σ f_e P_e, averaged over the model's routers. f_e
            is the share of the assignments that expert e got, P_e its mean probability. The loss is 1.0 at uniform
            routing (Mixtral's own form is k times larger).
        curvature_init: size of the dimensionless curvature κ̂ at the start; the curvature is κ = κ̂ / length_unit².
            Hyperbolic experts start at -κ̂, spherical ones at κ̂. Euclidean experts stay at 0.
        length_unit: "sqrt_dim" (√d_in of each linear) or a positive number.
        learn_curvature: train the curvature, whose sign may change.
        curvature_lr_ratio: how fast the curvature moves: κ̂ is its start plus curvature_lr_ratio·θ, with θ the trained
            parameter. Under Adam the ratio acts as a learning rate of its own.
        curvature_max_grad_norm: bound on the norm of each layer's gradient of θ, per backward. None: exact gradients.
        share_a: True: one A for all experts, as in HydraLoRA. False: one A for each expert.
        activation: nonlinearity of an expert, after B and before the map out of the space: "identity", "tanh", "silu"
            or "gelu".
        mapping: "stereographic" (equations 5 to 8) or "exp_log" (exponential and logarithmic map at the origin).
        domain: for hyperbolic experts under the stereographic mapping. "ball": a token is projected into the ball where
            equation 5 is defined. "raw": equation 5 as printed.
        boundary_eps: relative distance that is kept from poles and equators, from 1e-7 (float32 resolves no smaller
            one) to below 1.
        target_modules: the linears to adapt: name endings, one regular expression, or "all-linear".
        exclude_modules: name endings, or one regular expression, of linears to leave out.
        layers_to_transform: index, or indices, of the layers to adapt. None: all.
        layers_pattern: name of the list of layers that `layers_to_transform` counts.
        rank_pattern: other ranks for some linears, by name or regular expression. In this and the next two, the first
            key that matches a linear counts, so the order of keys matters.
        alpha_pattern: other values of `lora_alpha` for some linears.
        spaces_pattern: other numbers of experts by geometry for some linears, such as
            {"q_proj|k_proj|v_proj|o_proj": {"euclidean": 1}}. They use num_experts_per_tok of their experts, or all if
            they have fewer. A single Euclidean expert (activation "identity") is a plain LoRA.
    """

    r: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    spaces: Mapping[str, int] = field(default_factory=default_spaces)
    num_experts_per_tok: int = 4
    norm_topk_prob: bool = True
    router_scope: str = "ffn"
    router_aux_loss_coef: float = 0.01
    curvature_init: float = 0.3
    length_unit: str | float = "sqrt_dim"
    learn_curvature: bool = True
    curvature_lr_ratio: float = 30.0
    curvature_max_grad_norm: float | None = None
    share_a: bool = True
    activation: str = "identity"
    mapping: str = "stereographic"
    domain: str = "ball"
    boundary_eps: float = 4e-3
    target_modules: str | Sequence[str] = ("gate_proj", "up_proj", "down_proj")
    exclude_modules: str | Sequence[str] | None = None
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    rank_pattern: Mapping[str, int] | None = None
    alpha_pattern: Mapping[str, float] | None = None
    spaces_pattern: Mapping[str, Mapping[str, int]] | None = None

    def __post_init__(self) -> None:
        for name, rule in _RULES.items():
            object.__setattr__(self, name, rule(name, getattr(self, name)))
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} exceeds the {self.num_experts} experts of "
                f"spaces={self.spaces}: lower it or add experts"
            )
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern={self.layers_pattern!r} has no effect without layers_to_transform: give both"
            )
        object.__setattr__(self, "json", json.dumps(self.to_dict()))  # what the registered ops take

    # presets

    @classmethod
    def paper(cls, **overrides) -> MoSConfig:
        """The setting printed in the paper: |κ| = 1 in raw units of length, and no projection into the ball."""
        return cls(**{"curvature_init": 1.0, "length_unit": 1.0, "domain": "raw", **overrides})

    @classmethod
    def hydralora(cls, num_experts: int = 8, **overrides) -> MoSConfig:
        """HydraLoRA (Tian et al., 2024): Euclidean experts that share one A; a softmax mixes all of them."""
        preset = {"spaces": {"euclidean": num_experts}, "num_experts_per_tok": num_experts, "norm_topk_prob": False}
        return cls(**{**preset, "router_aux_loss_coef": 0.0, "learn_curvature": False, **overrides})

    @classmethod
    def mixture_of_lora(cls, num_experts: int = 8, **overrides) -> MoSConfig:
        """Mixture of LoRA experts (the paper's equations 1 and 2): Euclidean experts with an A each, top-k routing."""
        preset = {"spaces": {"euclidean": num_experts}, "num_experts_per_tok": min(4, num_experts), "share_a": False}
        return cls(**{**preset, "learn_curvature": False, **overrides})

    def __eq__(self, other) -> bool:
        return self.json == other.json if type(other) is type(self) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.json)

    def __getattr__(self, name: str):
        if name == "base_model_name_or_path":  # what peft asks of a configuration first
            raise AttributeError(
                "a MoSConfig is no peft configuration: give get_peft_model a MoSPeftConfig (mos_kernels.huggingface), "
                "which has the same fields, or call apply_mos(model, config)"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    # derived from the fields

    @property
    def num_experts(self) -> int:
        """E, the number of experts."""
        return sum(self.spaces.values())

    @property
    def expert_spaces(self) -> tuple[str, ...]:
        """The geometry of each of the E experts, in the layer's order."""
        return tuple(name for name, count in self.spaces.items() for _ in range(count))

    @property
    def curvature_signs(self) -> tuple[float, ...]:
        """The sign of each expert's curvature at the start: -1 hyperbolic, +1 spherical, 0 Euclidean (fixed)."""
        return tuple(_SIGN[name] for name in self.expert_spaces)

    @property
    def scaling(self) -> float:
        """The factor on the adapter's output: α/r, or α/√r with `use_rslora`."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @property
    def is_lora(self) -> bool:
        """Whether the adapter is a single Euclidean expert: a LoRA, without a gate, a router or a curvature."""
        return self.spaces == {"euclidean": 1} and self.activation == "identity"

    def squared_length_unit(self, in_features: int) -> float:
        """length_unit², by which κ̂ is divided, for a linear of width `in_features`."""
        return float(in_features) if self.length_unit == "sqrt_dim" else float(self.length_unit) ** 2

    def for_module(self, name: str) -> MoSConfig:
        """The configuration of the module `name`: the patterns may change its rank, alpha and spaces, as in peft."""
        changes = {}
        patterns = {"r": self.rank_pattern, "lora_alpha": self.alpha_pattern, "spaces": self.spaces_pattern}
        for attribute, pattern in patterns.items():
            for key, value in (pattern or {}).items():
                if re.match(rf"(.*\.)?({key})$", name):
                    changes[attribute] = value
                    break
        if "spaces" in changes:
            changes["num_experts_per_tok"] = min(self.num_experts_per_tok, sum(changes["spaces"].values()))
        return dataclasses.replace(self, **changes) if changes else self

    def to_dict(self) -> dict:
        """A dictionary of plain JSON types; `from_dict` reads it back to an equal configuration."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping) -> MoSConfig:
        """The configuration written by `to_dict`. Unknown names raise `ValueError`, so that no option is dropped."""
        if not isinstance(values, Mapping):
            raise ValueError(f"a configuration maps options to values, and this is {_shown(values)}: give a mapping")
        unknown = sorted(set(values) - {f.name for f in dataclasses.fields(cls)}, key=str)
        if unknown:
            raise ValueError(f"unknown options {unknown}: this version of mos_kernels does not have them")
        return cls(**values)


class FrozenDict(dict):
    """A dict that cannot be changed in place, since a configuration's hash depends on it. `copy()` gives a plain dict.

    It is printed, pickled, copied and compared like a dict.
    """

    def _refuse(self, *_, **__):
        raise TypeError("a configuration's mapping cannot be changed: make another by dataclasses.replace(config, …)")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self):
        return type(self), (dict(self),)


def _plain(value):
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


# A rule for every field: (name, value) -> the value to keep. For a bad value, a ValueError that names what is wanted.

Rule = Callable[[str, object], object]


def _shown(value) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        text = f"<{type(value).__name__} of over 4,300 digits>"
    return text if len(text) <= 300 else f"{text[:300]}…"


def _refuse(name: str, value, wanted: str):
    raise ValueError(f"{name}={_shown(value)} must be {wanted}")


def _one_of(*choices, **because: str) -> Rule:
    """because: for values that users may expect, why they are not offered."""

    def rule(name, value):
        if isinstance(value, str) and value in because:
            raise ValueError(f"{name}={value!r} is not offered: {because[value]}; use one of {choices}")
        if not any(value is choice or isinstance(value, str) and value == choice for choice in choices):
            _refuse(name, value, f"one of {choices}")
        return value

    return rule


def _integer(least: int, most: float = math.inf) -> Rule:
    wanted = f"an integer of at least {least}" if most == math.inf else f"an integer from {least} to {most}"

    def rule(name, value):
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            _refuse(name, value, wanted)
        return value

    return rule


def _number(accepts: Callable[[float], bool], wanted: str, *others) -> Rule:
    """others: values that are allowed instead of a number."""

    def rule(name, value):
        if any(value is other or isinstance(value, str) and value == other for other in others):
            return value
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
        if not is_number or not accepts(value):
            _refuse(name, value, wanted)
        return float(value) + 0.0  # 16 and 16.0 are one configuration, and so are 0.0 and -0.0

    return rule


def _regex(name: str, value: str) -> str:
    try:
        re.compile(value)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{name}={_shown(value)} is not a valid regular expression: {error}") from None
    return value


def _spaces(name: str, value) -> FrozenDict:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name}={_shown(value)} must map {SPACES} to numbers of experts")
    if unknown := sorted(set(value) - set(SPACES), key=str):
        raise ValueError(f"{name} has unknown geometries {unknown}: use {SPACES}")
    for space, count in value.items():
        _integer(0, MAX_EXPERTS)(f"{name}[{space!r}]", count)
    ordered = {space: value[space] for space in SPACES if value.get(space, 0)}
    if not ordered:
        raise ValueError(f"{name}={dict(value)} holds no experts: give a geometry a positive number")
    if sum(ordered.values()) > MAX_EXPERTS:
        raise ValueError(f"{name}={ordered} holds {sum(ordered.values())} experts: give at most {MAX_EXPERTS}")
    return FrozenDict(ordered)


def _names(optional: bool) -> Rule:
    def rule(name, value):
        if value is None and optional:
            return None
        if value is None or value == "":
            raise ValueError(f"{name}={value!r} names nothing: give name endings, a regular expression or 'all-linear'")
        if isinstance(value, str):
            return _regex(name, value)
        if not isinstance(value, (Sequence, set, frozenset)):
            _refuse(name, value, "a string or a list of strings")
        names = tuple(value)
        if not names or not all(isinstance(item, str) and item for item in names):
            _refuse(name, value, "a string or a non-empty list of non-empty strings")
        return tuple(sorted(names)) if isinstance(value, (set, frozenset)) else names

    return rule


def _layers(name: str, value):
    index = _integer(0)
    if value is None or isinstance(value, int):
        return value if value is None else index(name, value)
    if not isinstance(value, Sequence) or isinstance(value, str):
        _refuse(name, value, "a layer's index or a list of them")
    return tuple(index(name, item) for item in value)


def _pattern(entries: Rule, wanted: str = "numbers") -> Rule:
    def rule(name, value):
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise ValueError(f"{name}={_shown(value)} must map module names to {wanted}")
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"{name} has the key {key!r}, which must be a module name or a regular expression")
            _regex(name, key)
        return FrozenDict({key: entries(f"{name}[{key!r}]", entry) for key, entry in value.items()})

    return rule


def _mapping(name: str, value):
    return _one_of("stereographic", "exp_log")(name, "exp_log" if value == "exp/log" else value)


# The layer multiplies several of these numbers in float32, whose range ends at 1e38.
_ALPHA = _number(lambda v: 1e-10 <= v <= 1e10, "a number from 1e-10 to 1e10")
_FLAG = _one_of(True, False)

_RULES: dict[str, Rule] = {
    "r": _integer(1, MAX_RANK),
    "lora_alpha": _ALPHA,
    "lora_dropout": _number(lambda v: 0 <= v < 1, "a number in [0, 1)"),
    "use_rslora": _FLAG,
    "init_lora_weights": _one_of(True, False, "gaussian"),
    "spaces": _spaces,
    "num_experts_per_tok": _integer(1, MAX_EXPERTS),
    "norm_topk_prob": _FLAG,
    "router_scope": _one_of("ffn", "linear"),
    "router_aux_loss_coef": _number(lambda v: 0 <= v <= 1e10, "a number from 0 to 1e10"),
    "curvature_init": _number(lambda v: 0 <= v <= 1e10, "a number from 0 to 1e10"),
    "length_unit": _number(lambda v: 1e-10 <= v <= 1e10, "'sqrt_dim' or a number from 1e-10 to 1e10", "sqrt_dim"),
    "learn_curvature": _FLAG,
    "curvature_lr_ratio": _number(lambda v: 0 < v <= 1e10, "a positive number up to 1e10"),
    "curvature_max_grad_norm": _number(lambda v: 0 < v <= 1e10, "None or a positive number up to 1e10", None),
    "share_a": _FLAG,
    "activation": _one_of(
        "identity", "tanh", "silu", "gelu", relu="its derivative is zero at B = 0, and the layer never learns"
    ),
    "mapping": _mapping,
    "domain": _one_of("ball", "raw"),
    "boundary_eps": _number(lambda v: 1e-7 <= v < 1, "a number from 1e-7 to below 1, as float32 holds no closer"),
    "target_modules": _names(optional=False),
    "exclude_modules": _names(optional=True),
    "layers_to_transform": _layers,
    "layers_pattern": _names(optional=True),
    "rank_pattern": _pattern(_integer(1, MAX_RANK)),
    "alpha_pattern": _pattern(_ALPHA),
    "spaces_pattern": _pattern(_spaces, "numbers of experts"),
}
