"""`MoSConfig`: every choice of a Mixture-of-Space adapter, in one frozen and validated dataclass."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

SPACES = ("hyperbolic", "spherical", "euclidean")
"""The order of the experts, whatever the order in which `spaces` was written or read back."""

_SIGN = {"hyperbolic": -1.0, "spherical": 1.0, "euclidean": 0.0}
_CHOICES = {
    "router_scope": ("ffn", "linear"),
    "activation": ("identity", "tanh", "silu", "gelu"),
    "mapping": ("stereographic", "exp_log"),
    "domain": ("ball", "raw"),
}


def default_spaces() -> dict[str, int]:
    return {"hyperbolic": 3, "spherical": 3, "euclidean": 2}


@dataclass(frozen=True)
class MoSConfig:
    """Options of a Mixture-of-Space adapter (MoSELoRA, arXiv 2602.14490). Bad values raise `ValueError`.

    Low rank (names and meaning as in peft's `LoraConfig`):
        r: rank of every expert.
        lora_alpha: the adapter's output is scaled by `lora_alpha / r`, or `lora_alpha / sqrt(r)` with `use_rslora`.
        lora_dropout: dropout probability on the adapter's input, in [0, 1).
        init_lora_weights: True: A kaiming-uniform, B zero. "gaussian": A normal(0, 1/r), B zero. False: B random too,
            so that the adapter starts with an effect (for tests).
        share_a: one A for all experts (HydraLoRA's asymmetry), or one A per expert.

    Experts and routing (names as in transformers' MoE models):
        spaces: number of experts by geometry; always ordered hyperbolic, spherical, euclidean. E is their sum.
        num_experts_per_tok: k, the experts a token uses.
        norm_topk_prob: renormalise the k kept routing weights to sum to 1.
        router_scope: "ffn": one router per FFN block, reading the block's input; "linear": one router per linear.
        router_aux_loss_coef: coefficient of the load-balancing loss E·Σ f_e P_e, which is 1.0 at uniform routing
            (Mixtral's own form is k times larger), averaged over the model's routers.

    Geometry:
        curvature_init: |κ̂| at the start, dimensionless: κ = κ̂ / length_unit². Euclidean experts stay at 0.
        length_unit: "sqrt_dim" (√d_in of each linear) or a positive number.
        learn_curvature: train κ; it may cross zero.
        curvature_lr_ratio: κ = (κ̂_init + curvature_lr_ratio·θ) / length_unit² with θ the trained offset, which under
            Adam acts as a learning rate of its own.
        curvature_max_grad_norm: bound on the norm of each layer's gradient in θ, per backward; None: exact gradients.
        activation: φ between expert and lift: "identity", "tanh", "silu" or "gelu".
        mapping: "stereographic" (the paper's) or "exp_log" (exponential and logarithmic map at the origin).
        domain: for hyperbolic experts under the stereographic mapping: "ball" projects tokens into the ball where the
            inverse projection is defined, "raw" is equation 5 as printed.
        boundary_eps: distance kept from poles and equators, relative, in (0, 1).

    Where it is applied (as in peft): target_modules (a list of name endings, one regular expression, or "all-linear"),
    exclude_modules, layers_to_transform, layers_pattern, rank_pattern, alpha_pattern.

    spaces_pattern: as rank_pattern, other numbers of experts by geometry for some linears, such as
        {"q_proj|k_proj|v_proj|o_proj": {"euclidean": 1}}. They use num_experts_per_tok of their experts, or all where
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
        object.__setattr__(self, "spaces", _ordered_spaces("spaces", self.spaces))
        _require_int("r", self.r, 1)
        _require_int("num_experts_per_tok", self.num_experts_per_tok, 1)
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} exceeds the {self.num_experts} experts of "
                f"spaces={dict(self.spaces)}: lower it or add experts"
            )
        for name in ("use_rslora", "norm_topk_prob", "learn_curvature", "share_a"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be True or False")
        _require_number("lora_alpha", self.lora_alpha, lambda v: v > 0, "positive")
        _require_number("lora_dropout", self.lora_dropout, lambda v: 0 <= v < 1, "in [0, 1)")
        _require_number("router_aux_loss_coef", self.router_aux_loss_coef, lambda v: v >= 0, "0 or positive")
        _require_number("curvature_init", self.curvature_init, lambda v: 0 <= v <= 1e10, "from 0 to 1e10")
        _require_number("curvature_lr_ratio", self.curvature_lr_ratio, lambda v: 0 < v <= 1e10, "positive, to 1e10")
        _require_number("boundary_eps", self.boundary_eps, lambda v: 0 < v < 1, "in (0, 1)")
        if self.curvature_max_grad_norm is not None:
            _require_number(
                "curvature_max_grad_norm", self.curvature_max_grad_norm, lambda v: v > 0, "positive or None"
            )
        if self.length_unit != "sqrt_dim":
            if isinstance(self.length_unit, str):
                raise ValueError(f"length_unit={self.length_unit!r} must be 'sqrt_dim' or a positive number")
            sensible = "'sqrt_dim' or a number from 1e-10 to 1e10"  # κ̂ / length_unit² is a float32
            _require_number("length_unit", self.length_unit, lambda v: 1e-10 <= v <= 1e10, sensible)
        if not isinstance(self.init_lora_weights, bool) and self.init_lora_weights != "gaussian":
            raise ValueError(f"init_lora_weights={self.init_lora_weights!r} must be True, False or 'gaussian'")
        if self.mapping == "exp/log":
            object.__setattr__(self, "mapping", "exp_log")
        if self.activation == "relu":
            raise ValueError(
                "activation='relu' is not offered: its derivative is zero at B = 0, and the layer never learns; "
                f"use one of {_CHOICES['activation']}"
            )
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {choices}")
        self._check_targets()
        object.__setattr__(self, "json", json.dumps(self.to_dict(), sort_keys=True))  # what the registered ops take

    def _check_targets(self) -> None:
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            value = getattr(self, name)
            if value is None or isinstance(value, str):
                if value == "" or (value is None and name == "target_modules"):
                    raise ValueError(
                        f"{name}={value!r} names nothing: give name endings, a regular expression or 'all-linear'"
                    )
                if isinstance(value, str):
                    _require_regex(name, value)
                continue
            if not isinstance(value, (Sequence, set, frozenset)):
                raise ValueError(f"{name}={value!r} must be a string or a list of strings")
            value = tuple(sorted(value)) if isinstance(value, (set, frozenset)) else tuple(value)
            if not value or not all(isinstance(item, str) and item for item in value):
                raise ValueError(f"{name}={value!r} must be a string or a non-empty list of non-empty strings")
            object.__setattr__(self, name, value)
        layers = self.layers_to_transform
        if layers is not None:
            if not isinstance(layers, (int, Sequence)) or isinstance(layers, str):
                raise ValueError(f"layers_to_transform={layers!r} must be a layer's index or a list of them")
            layers = layers if isinstance(layers, int) else tuple(layers)
            for index in (layers,) if isinstance(layers, int) else layers:
                _require_int("layers_to_transform", index, 0)
            object.__setattr__(self, "layers_to_transform", layers)
        if self.layers_pattern is not None and layers is None:
            raise ValueError(
                f"layers_pattern={self.layers_pattern!r} has no effect without layers_to_transform: give both"
            )
        for name, check in (
            ("rank_pattern", lambda key, v: _require_int(key, v, 1)),
            ("alpha_pattern", lambda key, v: _require_number(key, v, lambda a: a > 0, "positive")),
            ("spaces_pattern", _ordered_spaces),
        ):
            pattern = getattr(self, name)
            if pattern is None:
                continue
            if not isinstance(pattern, Mapping):
                raise ValueError(f"{name}={pattern!r} must map module names to what they have")
            values = dict(pattern)
            for key, value in pattern.items():
                if not isinstance(key, str):
                    raise ValueError(f"{name} has the key {key!r}, which must be a module name or a regular expression")
                _require_regex(name, key)
                checked = check(f"{name}[{key!r}]", value)
                values[key] = value if checked is None else checked
            object.__setattr__(self, name, values)

    # presets

    @classmethod
    def paper(cls, **overrides) -> MoSConfig:
        """The setting printed in the paper: |κ| = 1 in raw units of length, equation 5 without a domain."""
        return cls(**{"curvature_init": 1.0, "length_unit": 1.0, "domain": "raw", **overrides})

    @classmethod
    def hydralora(cls, num_experts: int = 8, **overrides) -> MoSConfig:
        """HydraLoRA (Tian et al., 2024): Euclidean experts behind one A, all of them mixed by a softmax."""
        preset = {"spaces": {"euclidean": num_experts}, "num_experts_per_tok": num_experts, "norm_topk_prob": False}
        return cls(**{**preset, "router_aux_loss_coef": 0.0, "learn_curvature": False, **overrides})

    @classmethod
    def mixture_of_lora(cls, num_experts: int = 8, **overrides) -> MoSConfig:
        """Mixture of LoRA experts (the paper's eqs 1 and 2): Euclidean experts with an A each, top-k routed."""
        preset = {"spaces": {"euclidean": num_experts}, "num_experts_per_tok": min(4, num_experts), "share_a": False}
        return cls(**{**preset, "learn_curvature": False, **overrides})

    def __hash__(self) -> int:
        return hash(self.json)

    def __getattr__(self, name: str):
        if name == "base_model_name_or_path":  # what peft asks of a configuration first
            raise AttributeError(
                "a MoSConfig is no peft configuration: give get_peft_model a MoSPeftConfig (mos_kernels.huggingface), "
                "which has the same fields, or call apply_mos(model, config)"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    # what follows from the fields

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
        """Whether the adapter is one Euclidean expert, whose gate is 1: a LoRA, with neither router nor curvature."""
        return self.spaces == {"euclidean": 1} and self.activation == "identity"

    def squared_length_unit(self, in_features: int) -> float:
        """length_unit², by which κ̂ is divided, for a linear of width `in_features`."""
        return float(in_features) if self.length_unit == "sqrt_dim" else float(self.length_unit) ** 2

    def for_module(self, name: str) -> MoSConfig:
        """This configuration with what the patterns give to the module `name` (as in peft): rank, alpha and spaces."""
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
        """The configuration written by `to_dict`. Unknown names raise `ValueError`: an option is never dropped."""
        unknown = sorted(set(values) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"unknown options {unknown}: this version of mos_kernels does not have them")
        return cls(**values)


def _plain(value):
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _ordered_spaces(name: str, value) -> dict[str, int]:
    """Numbers of experts by geometry, in the order of SPACES and without zeros; ValueError for anything else."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{name}={value!r} must map {SPACES} to numbers of experts")
    unknown = sorted(set(value) - set(SPACES), key=str)
    if unknown:
        raise ValueError(f"{name} has unknown geometries {unknown}: use {SPACES}")
    for space, count in value.items():
        _require_int(f"{name}[{space!r}]", count, 0)
    ordered = {space: value[space] for space in SPACES if value.get(space, 0)}
    if not ordered:
        raise ValueError(f"{name}={dict(value)} holds no experts: give a geometry a positive number")
    return ordered


def _require_int(name: str, value, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name}={value!r} must be an integer of at least {minimum}")


def _require_number(name: str, value, accept, wanted: str) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if not is_number or not accept(value):
        raise ValueError(f"{name}={value!r} must be {wanted}")


def _require_regex(name: str, value: str) -> None:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"{name}={value!r} is not a valid regular expression: {error}") from None
