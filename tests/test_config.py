"""MoSConfig: every bad value is refused by name, and a configuration survives writing and reading."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import configs

from mos_kernels import MoSConfig
from mos_kernels.config import SPACES

REFUSED = [
    ("r", [0, -1, 1.5, "8", True, None, 10**30]),
    ("num_experts_per_tok", [0, -1, 2.0, False, 9]),
    ("lora_alpha", [0, -1.0, math.nan, math.inf, "16", True, None, 1e300, 1e-300]),
    ("lora_dropout", [-0.1, 1.0, 2, math.nan, "0.1", None]),
    ("use_rslora", [0, 1, "yes", None]),
    ("norm_topk_prob", [0, 1, None]),
    ("learn_curvature", [0, None]),
    ("share_a", [1, "no"]),
    ("init_lora_weights", ["kaiming", None, 2]),
    ("router_scope", ["block", None, "FFN"]),
    ("router_aux_loss_coef", [-0.01, math.nan, math.inf, "0.01", 1e300]),
    ("curvature_init", [-0.3, math.nan, math.inf, None]),
    ("length_unit", [0, -1.0, math.inf, math.nan, "sqrt", None, True]),
    ("curvature_lr_ratio", [0, -30, math.inf]),
    ("curvature_max_grad_norm", [0, -1.0, math.nan, math.inf, "1"]),
    ("activation", ["relu", "swish", None]),
    ("mapping", ["poincare", None]),
    ("domain", ["disk", None]),
    ("boundary_eps", [0, 1, -4e-3, 1.5, math.nan, 1e-8]),
    ("target_modules", [None, "", [], [""], [1], "(", {1: 2}, "a{99999999999}"]),
    ("exclude_modules", ["", [], [None], "("]),
    ("layers_to_transform", [-1, [0, -2], [1.5], True, ["1"]]),
    ("layers_pattern", ["layers", ["h"]]),  # without layers_to_transform
    ("rank_pattern", [{"up": 0}, {"up": 2.0}, {"(": 4}, ["up"], {"up": 10**30}]),
    ("spaces_pattern", [{"up": {}}, {"up": {"flat": 1}}, {"(": {"euclidean": 1}}, ["up"], {"up": {"euclidean": -1}}]),
    ("alpha_pattern", [{"up": 0}, {"up": math.nan}, {"(": 4}, "up", {"up": 1e300}]),
]


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in REFUSED for value in values], ids=lambda v: repr(v)[:30]
)
def test_a_bad_value_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        MoSConfig(**{name: value})


def test_every_option_has_a_refused_value():
    refused = {name for name, _ in REFUSED} | {"spaces"}
    assert refused == {field.name for field in dataclasses.fields(MoSConfig)}


@pytest.mark.parametrize(
    ("spaces", "message"),
    [
        ({}, "no experts"),
        ({"hyperbolic": 0, "euclidean": 0}, "no experts"),
        ({"hyperbolic": -1}, r"spaces\['hyperbolic'\]=-1"),
        ({"hyperbolic": 2.0}, r"spaces\['hyperbolic'\]=2.0"),
        ({"flat": 4}, r"unknown geometries \['flat'\]"),
        ({"euclidean": 4, 3: 1}, "unknown geometries"),
        (8, "spaces=8"),
        ([("euclidean", 8)], "spaces="),
        ({"euclidean": 10**12}, r"spaces\['euclidean'\]=1000000000000 must be an integer from 0 to 4096"),
        ({"euclidean": 4000, "spherical": 4000}, "holds 8000 experts: give at most 4096"),
    ],
)
def test_bad_spaces_are_refused(spaces, message):
    with pytest.raises(ValueError, match=message):
        MoSConfig(spaces=spaces)


@given(counts=st.lists(st.integers(0, 5), min_size=3, max_size=3), k=st.integers(1, 20))
def test_k_may_not_exceed_the_experts(counts, k):
    E = sum(counts)
    if E == 0:
        return
    spaces = dict(zip(SPACES, counts, strict=True))
    if k <= E:
        assert MoSConfig(spaces=spaces, num_experts_per_tok=k).num_experts == E
    else:
        with pytest.raises(ValueError, match=f"num_experts_per_tok={k} exceeds the {E} experts"):
            MoSConfig(spaces=spaces, num_experts_per_tok=k)


@given(
    number=st.floats(),
    name=st.sampled_from(["lora_alpha", "lora_dropout", "boundary_eps", "curvature_init", "length_unit"]),
)
def test_numbers_are_accepted_exactly_on_their_range(number, name):
    inside = {
        "lora_alpha": 1e-10 <= number <= 1e10, "lora_dropout": 0 <= number < 1, "boundary_eps": 1e-7 <= number < 1,
        "curvature_init": 0 <= number <= 1e10, "length_unit": 1e-10 <= number <= 1e10,
    }[name] and math.isfinite(number)  # fmt: skip
    if inside:
        assert getattr(MoSConfig(**{name: number}), name) == number
    else:
        with pytest.raises(ValueError, match=name):
            MoSConfig(**{name: number})


@given(order=st.permutations(SPACES), counts=st.lists(st.integers(1, 4), min_size=3, max_size=3))
def test_experts_are_ordered_whatever_the_order_of_spaces(order, counts):
    by_name = dict(zip(SPACES, counts, strict=True))
    config = MoSConfig(spaces={name: by_name[name] for name in order}, num_experts_per_tok=1)
    h, s, e = counts
    assert config.expert_spaces == ("hyperbolic",) * h + ("spherical",) * s + ("euclidean",) * e
    assert config.curvature_signs == (-1.0,) * h + (1.0,) * s + (0.0,) * e
    assert config == MoSConfig(spaces=by_name, num_experts_per_tok=1)
    assert list(config.spaces) == list(SPACES)


def test_a_geometry_without_experts_is_left_out():
    assert MoSConfig(spaces={"euclidean": 4, "hyperbolic": 0}).spaces == {"euclidean": 4}


@settings(max_examples=60)
@given(
    config=configs(), pattern=st.none() | st.just({"up": 4}), layers=st.sampled_from([None, 3, [0, 2]]),
    modules=st.sampled_from(["all-linear", ["up", "down"], ("a",), {"q", "b"}]),
)  # fmt: skip
def test_survives_json(config, pattern, modules, layers):
    config = dataclasses.replace(
        config, rank_pattern=pattern, alpha_pattern=pattern, target_modules=modules, layers_to_transform=layers
    )
    written = json.dumps(config.to_dict())
    assert MoSConfig.from_dict(json.loads(written)) == config
    shuffled = json.dumps(config.to_dict(), sort_keys=True)  # as peft writes it
    assert MoSConfig.from_dict(json.loads(shuffled)).expert_spaces == config.expert_spaces


def test_an_unknown_option_is_never_dropped():
    with pytest.raises(ValueError, match=r"\['rank', 'temperature'\]"):
        MoSConfig.from_dict({"r": 4, "temperature": 1, "rank": 2})


@pytest.mark.parametrize("values", [[], [("r", 4)], "r", None, 8], ids=repr)
def test_what_is_no_mapping_is_no_configuration(values):
    with pytest.raises(ValueError, match="a configuration maps options to values, and this is"):
        MoSConfig.from_dict(values)


def test_a_key_that_is_no_name_is_an_unknown_option():
    with pytest.raises(ValueError, match=r"unknown options \[3, 'rank'\]"):
        MoSConfig.from_dict({"rank": 4, 3: 1})


def test_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MoSConfig().r = 4


CHANGES = {
    "set": lambda d: d.__setitem__("euclidean", 1), "delete": lambda d: d.__delitem__("euclidean"),
    "update": lambda d: d.update(euclidean=1), "or": lambda d: d.__ior__({"euclidean": 1}),
    "clear": lambda d: d.clear(), "pop": lambda d: d.pop("euclidean"), "popitem": lambda d: d.popitem(),
    "setdefault": lambda d: d.setdefault("spherical", 1),
}  # fmt: skip


@pytest.mark.parametrize("name", ["spaces", "rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_mapping_cannot_be_changed_behind_the_hash(name, change):
    config = MoSConfig(spaces={"euclidean": 4}, rank_pattern={"euclidean": 2}, alpha_pattern={"euclidean": 2.0})
    before = dict(getattr(config, name))
    with pytest.raises(TypeError, match="cannot be changed"):
        change(getattr(config, name))
    assert getattr(config, name) == before


def test_a_callers_mapping_is_not_the_configurations():
    spaces = {"euclidean": 4}
    config = MoSConfig(spaces=spaces)
    spaces["euclidean"] = 5
    assert config.num_experts == 4


@pytest.mark.parametrize("again", [
    copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c)), lambda c: MoSConfig(**dataclasses.asdict(c)),
    lambda c: MoSConfig.from_dict(c.to_dict()), dataclasses.replace,
], ids=["copy", "deepcopy", "pickle", "asdict", "to_dict", "replace"])  # fmt: skip
def test_a_copy_is_equal_and_as_frozen(again):
    config = MoSConfig(rank_pattern={"up": 4}, alpha_pattern={"up": 4})
    found = again(config)
    assert found == config and hash(found) == hash(config) and type(found.spaces) is type(config.spaces)
    assert json.loads(json.dumps(dataclasses.asdict(found))) == config.to_dict()
    assert config.spaces == {"hyperbolic": 3, "spherical": 3, "euclidean": 2} == dict(config.spaces)
    spaces = config.spaces.copy()
    spaces["euclidean"] = 7  # a dict of the caller's own
    assert config.spaces["euclidean"] == 2


def test_equal_numbers_make_one_configuration():
    first = MoSConfig(lora_alpha=16, curvature_init=0, length_unit=2, alpha_pattern={"up": 4})
    second = MoSConfig(lora_alpha=16.0, curvature_init=-0.0, length_unit=2.0, alpha_pattern={"up": 4.0})
    assert first == second and hash(first) == hash(second) and first.json == second.json


def test_the_peft_configuration_takes_and_gives_plain_mappings():
    from mos_kernels.huggingface import MoSPeftConfig

    config = MoSConfig(rank_pattern={"up": 4})
    made = MoSPeftConfig(target_modules=["up"], spaces=config.spaces, rank_pattern=config.rank_pattern)
    assert made.to_mos_config().spaces == config.spaces
    made.spaces["euclidean"] = 3  # peft's configurations are changed in place
    assert made.to_mos_config().num_experts == 9
    assert json.loads(json.dumps(made.to_dict(), default=list))["rank_pattern"] == {"up": 4}
    assert pickle.loads(pickle.dumps(copy.deepcopy(made))).spaces == made.spaces


def test_defaults_are_the_documented_ones():
    config = MoSConfig()
    assert (config.r, config.lora_alpha, config.num_experts, config.num_experts_per_tok) == (8, 16.0, 8, 4)
    assert config.spaces == {"hyperbolic": 3, "spherical": 3, "euclidean": 2}
    assert (config.curvature_init, config.length_unit, config.curvature_lr_ratio) == (0.3, "sqrt_dim", 30.0)
    assert (config.mapping, config.domain, config.activation) == ("stereographic", "ball", "identity")
    assert (config.router_scope, config.router_aux_loss_coef, config.boundary_eps) == ("ffn", 0.01, 4e-3)


def test_presets():
    paper = MoSConfig.paper(r=4)
    assert (paper.curvature_init, paper.length_unit, paper.domain, paper.r) == (1.0, 1.0, "raw", 4)
    assert MoSConfig.paper(domain="ball").domain == "ball"
    hydra = MoSConfig.hydralora(5)
    assert hydra.spaces == {"euclidean": 5} and hydra.num_experts_per_tok == 5 and hydra.share_a
    assert not hydra.norm_topk_prob and not hydra.learn_curvature
    mixture = MoSConfig.mixture_of_lora(3, r=2)
    assert mixture.spaces == {"euclidean": 3} and mixture.num_experts_per_tok == 3 and not mixture.share_a
    assert MoSConfig.mixture_of_lora(8).num_experts_per_tok == 4


@given(r=st.integers(1, 64), alpha=st.floats(0.1, 100))
def test_scaling(r, alpha):
    assert MoSConfig(r=r, lora_alpha=alpha).scaling == pytest.approx(alpha / r)
    assert MoSConfig(r=r, lora_alpha=alpha, use_rslora=True).scaling == pytest.approx(alpha / r**0.5)


def test_length_unit():
    assert MoSConfig().squared_length_unit(1536) == 1536
    assert MoSConfig(length_unit=3).squared_length_unit(1536) == 9


@pytest.mark.parametrize("alias", ["exp/log", "exp_log"])
def test_mapping_alias(alias):
    assert MoSConfig(mapping=alias).mapping == "exp_log"


@pytest.mark.parametrize(
    ("name", "r", "alpha"),
    [
        ("model.layers.0.mlp.up_proj", 4, 16.0),
        ("up_proj", 4, 16.0),
        ("model.layers.0.mlp.gate_up_proj", 8, 16.0),
        ("model.layers.11.mlp.down_proj", 2, 5.0),
        ("model.layers.1.mlp.down_proj", 8, 16.0),
        ("model.layers.0.mlp.up_proj.base", 8, 16.0),
    ],
)
def test_patterns_apply_to_name_endings(name, r, alpha):
    config = MoSConfig(rank_pattern={"up_proj": 4, r"layers\.11\..*": 2}, alpha_pattern={r"11\.mlp\.down_proj": 5.0})
    found = config.for_module(name)
    assert (found.r, found.lora_alpha) == (r, alpha)
    assert dataclasses.replace(found, r=8, lora_alpha=16.0) == config


def test_the_first_pattern_that_matches_wins():
    assert MoSConfig(rank_pattern={"up": 4, "a.up": 2}).for_module("a.up").r == 4


@pytest.mark.parametrize(
    "options",
    [
        {"init_lora_weights": 0}, {"lora_alpha": 10**400}, {"target_modules": 5}, {"layers_to_transform": 1.5},
        {"rank_pattern": {1: 2}}, {"length_unit": 1e-25}, {"length_unit": 1e200},
    ],
    ids=str,
)  # fmt: skip
def test_values_of_another_kind_are_refused_by_name(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        MoSConfig(**options)


def test_an_integer_that_python_does_not_write_out_is_refused_by_name():
    with pytest.raises(ValueError, match="r=<int of over 4,300 digits> must be an integer from 1 to 65536"):
        MoSConfig(r=10**5000)


def test_equal_configurations_hash_alike():
    assert hash(MoSConfig(r=4)) == hash(MoSConfig(r=4)) != hash(MoSConfig(r=5))
