"""spaces_pattern: other experts for some linears, and a single Euclidean expert, which is exactly a LoRA."""

from __future__ import annotations

import dataclasses
import json
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import MATRIX, batch, ids, logits, mos, tiny
from torch.autograd import forward_ad
from torch.nn.functional import linear
from transformers import Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D

from mos_kernels import MoSConfig, MoSLinear, MoSRouter
from mos_kernels.functional import mos_linear
from mos_kernels.huggingface import (
    MoSCallback,
    MoSPeftConfig,
    activated_parameters,
    apply_mos,
    export_lora,
    load_adapter,
    remove_mos,
    routing_report,
    save_adapter,
    start_from_lora,
)
from mos_kernels.huggingface.modules import adapter_parameters, mos_adapters, router_owners
from mos_kernels.layer import MoSConv1D, MoSWrapped
from mos_kernels.lora import composed, lora_linear
from mos_kernels.run_report.log import read_run
from mos_kernels.run_report.page import page

ATTENTION = {
    "llama": "q_proj|k_proj|v_proj|o_proj", "qwen2": "q_proj|k_proj|v_proj|o_proj",
    "gemma": "q_proj|k_proj|v_proj|o_proj", "bert": r"attention\..*",
}  # fmt: skip
LORA = {"euclidean": 1}


def mixed(family: str = "llama", **options) -> MoSConfig:
    """The default mixture on the FFN, and LoRAs on all other linears."""
    pattern = {"spaces_pattern": {ATTENTION[family]: LORA}, "target_modules": "all-linear", **options}
    exclude = {"exclude_modules": ["pooler.dense"]} if family == "bert" else {}
    return MoSConfig(**{"r": 4, "init_lora_weights": False, **exclude, **pattern})


def adapted(family: str = "llama", dtype=torch.float64, **options):
    model = tiny(family, dtype)
    torch.manual_seed(1)
    applied = apply_mos(model, mixed(family, **options))
    return model, applied


# the configuration


@given(
    st.dictionaries(
        st.sampled_from(["q_proj", "k_proj|v_proj", r"layers\.0\..*"]),
        st.dictionaries(st.sampled_from(["euclidean", "spherical", "hyperbolic"]), st.integers(0, 5)),
    ),
    st.integers(1, 8),
)
def test_a_pattern_gives_a_module_its_experts_and_k_at_most_those(pattern, k):
    if any(not sum(spaces.values()) for spaces in pattern.values()):
        with pytest.raises(ValueError, match="spaces_pattern.*holds no experts"):
            MoSConfig(spaces_pattern=pattern)
        return
    config = MoSConfig(spaces_pattern=pattern, num_experts_per_tok=k)
    assert MoSConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(MoSConfig.from_dict(config.to_dict())) == hash(config)
    own = config.for_module("model.layers.0.self_attn.q_proj")
    keys = [key for key in pattern if key in ("q_proj", r"layers\.0\..*")]
    wanted = {space: n for space, n in pattern[keys[0]].items() if n} if keys else dict(config.spaces)
    assert dict(own.spaces) == wanted and own.num_experts_per_tok == min(k, own.num_experts)
    assert config.for_module("model.layers.1.mlp.up_proj").spaces == config.spaces


@pytest.mark.parametrize(
    "pattern, message",
    [
        ({"q_proj": {"flat": 1}}, "unknown geometries"),
        ({"q_proj": {"euclidean": 0}}, "holds no experts"),
        ({"q_proj": {"euclidean": -1}}, "must be an integer from 0 to"),
        ({"q_proj": 1}, "must map"),
        ({"(": {"euclidean": 1}}, "not a valid regular expression"),
        ("q_proj", "must map module names"),
    ],
)
def test_bad_patterns_are_refused(pattern, message):
    for make in (MoSConfig, MoSPeftConfig):
        with pytest.raises(ValueError, match=message):
            make(spaces_pattern=pattern)


def test_a_pattern_that_matches_nothing_is_refused_before_the_model_is_touched():
    model = tiny()
    with pytest.raises(
        ValueError, match="spaces_pattern has the key 'c_attn', which matches none of the 6 targets.*down_proj.*"
    ):
        apply_mos(model, mos(model, spaces_pattern={"c_attn": LORA}))
    assert not mos_adapters(model)


def test_a_key_that_an_earlier_one_hides_is_said():
    model = tiny()
    with pytest.warns(UserWarning, match="the key 'up_proj' of rank_pattern has no effect: for each of its linears"):
        apply_mos(model, mos(model, rank_pattern={".*": 2, "up_proj": 3}))
    remove_mos(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_mos(model, mos(model, rank_pattern={"up_proj": 3, ".*": 2}))


# where it is


@pytest.mark.parametrize("family", MATRIX)
def test_a_lora_on_attention_beside_the_mixture(family):
    model, applied = adapted(family)
    loras = {name: layer for name, layer in mos_adapters(model).items() if layer.config.is_lora}
    mixtures = {name: layer for name, layer in mos_adapters(model).items() if name not in loras}
    assert len(loras) == 8 and all("attention" in name or "self_attn" in name for name in loras)
    for layer in loras.values():
        assert layer.mos_router is None and layer.mos_curvature is None and layer.config.num_experts_per_tok == 1
        assert set(dict(layer.named_parameters())) <= {"weight", "bias", "mos_lora_A", "mos_lora_B"}
    assert {dict(layer.config.spaces) == MoSConfig().spaces for layer in mixtures.values()} == {True}
    assert not set(router_owners(model)) & set(loras)
    assert "a LoRA, one Euclidean expert without a router" in str(applied)
    assert not any(name in entry["name"] for entry in routing_report(model, ids()) for name in loras)
    without = tiny(family)
    apply_mos(without, mos(without))
    own = sum(p.numel() for layer in loras.values() for p in (layer.mos_lora_A, layer.mos_lora_B))
    with_loras, counted = activated_parameters(model), activated_parameters(without)
    assert with_loras.adapter == counted.adapter + own and with_loras.activated == counted.activated + own


def test_in_a_block_those_with_the_same_experts_share_the_router():
    model = tiny()
    applied = apply_mos(model, mos(model, spaces_pattern={"gate_proj|up_proj": {"hyperbolic": 5}}))
    mlp = model.model.layers[0].mlp
    assert isinstance(mlp.mos_router, MoSRouter) and mlp.mos_router.weight.shape[0] == 5
    assert mlp.mos_router.config.spaces == {"hyperbolic": 5} == mlp.up_proj.config.spaces
    assert mlp.up_proj.mos_router is None and mlp.down_proj.mos_router.shape[0] == 8
    assert "5 hyperbolic" in str(applied) and "the only one with its spaces" in str(applied)
    model(ids())

    model = tiny()
    apply_mos(model, mos(model, spaces_pattern={"down_proj": LORA}))
    mlp = model.model.layers[0].mlp
    assert mlp.mos_router.config == mos(model, spaces_pattern={"down_proj": LORA}) and mlp.down_proj.mos_router is None
    model(ids())


@pytest.mark.parametrize("scope", ["ffn", "linear"])
def test_all_loras_have_no_router_at_all(scope):
    model = tiny()
    options = {"spaces": LORA, "num_experts_per_tok": 1, "router_scope": scope}
    applied = apply_mos(model, mos(model, **options))
    assert not router_owners(model) and "0 routers" in str(applied)
    assert all(name.endswith(("mos_lora_A", "mos_lora_B")) for name in adapter_parameters(model))
    model(ids())


# it is a LoRA


class FusedLoRA(torch.autograd.Function):
    """A LoRA fused by hand: of the base's products and of the adapter's, one sum each, in place."""

    @staticmethod
    def forward(ctx, x, weight, A, B, scaling):
        low = x.mm(A.to(x.dtype).t()) * scaling
        ctx.save_for_backward(x, weight, A, B, low)
        ctx.scaling = scaling
        return low.mm(B.to(x.dtype).t()).addmm_(x, weight.t())

    @staticmethod
    def backward(ctx, gradient):
        x, weight, A, B, low = ctx.saved_tensors
        to_low = gradient.mm(B.to(x.dtype)) * ctx.scaling
        to_x = to_low.mm(A.to(x.dtype)).addmm_(gradient, weight)
        return to_x, None, to_low.t().mm(x).to(A.dtype), gradient.t().mm(low).to(B.dtype), None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_its_numbers_are_bitwise_those_of_a_fused_lora(dtype):
    torch.manual_seed(0)
    config = MoSConfig(spaces=LORA, num_experts_per_tok=1, init_lora_weights=False)
    layer = MoSLinear(24, 40, bias=False, config=config, dtype=dtype)
    x = torch.randn(3, 5, 24, dtype=dtype, requires_grad=True)
    A, B = (p.detach().clone().requires_grad_() for p in (layer.mos_lora_A, layer.mos_lora_B[:, 0]))
    other = x.detach().clone().requires_grad_()
    y = layer(x)
    wanted = FusedLoRA.apply(other.flatten(0, 1), layer.weight, A, B, config.scaling).unflatten(0, (3, 5))
    assert y.dtype == dtype and torch.equal(y, wanted)
    gradient = torch.randn_like(y)
    y.backward(gradient)
    wanted.backward(gradient)
    assert torch.equal(x.grad, other.grad) and torch.equal(layer.mos_lora_A.grad, A.grad)
    assert torch.equal(layer.mos_lora_B.grad[:, 0], B.grad) and layer.weight.grad is None
    with torch.no_grad():
        assert torch.equal(layer.eval()(x), wanted)


@given(
    needs=st.lists(st.booleans(), min_size=6, max_size=6).filter(any), sizes=st.tuples(*[st.integers(1, 9)] * 4),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]), wide=st.booleans(), flat=st.booleans(),
)  # fmt: skip
def test_its_written_out_backward_is_autograds(needs, sizes, dtype, wide, flat):
    """Of whatever is trainable; from a dense base, or from what another made of x, in that one's dtype.

    Bitwise, but for the gradient of x over a dense base: autograd's is a sum of two that were rounded already.
    """
    T, d_in, d_out, r = sizes
    torch.manual_seed(T)
    y_dtype = torch.float32 if wide and dtype == torch.bfloat16 else dtype
    shape = (T,) if flat else (2, T)
    drawn = [
        torch.randn(*shape, d_in, dtype=dtype), torch.randn(d_out, d_in, dtype=dtype), torch.randn(d_out, dtype=dtype),
        torch.randn(r, d_in), torch.randn(d_out, r), torch.randn(*shape, d_out, dtype=y_dtype),
    ]  # fmt: skip
    if dtype == torch.float64:
        drawn = [tensor.double() for tensor in drawn]
    gradient, found = torch.randn(*shape, d_out, dtype=y_dtype), []
    for form in (lora_linear, composed):
        x, weight, bias, A, B, other = (t.clone().requires_grad_(needs[i]) for i, t in enumerate(drawn))
        base = (None, None) if wide else (weight, bias)
        if form is composed:
            y = composed(x, x, *base, A, B, 1.7, other * 1 if wide else None)
        else:
            y = lora_linear(x, *base, A, B, 1.7, base_output=other * 1 if wide else None)
        if y.requires_grad:
            y.backward(gradient)
        found.append([y, *(t.grad for t in (x, weight, bias, A, B, other))])
    for i, (ours, theirs) in enumerate(zip(*found, strict=True)):
        assert (ours is None) == (theirs is None)
        if i == 1 and not wide and ours is not None:
            weight, A, B, g = (t.double().abs() for t in (drawn[1], drawn[3], drawn[4], gradient))
            bound = 8 * torch.finfo(dtype).eps * (g @ weight + 1.7 * (g @ B) @ A)  # of sums of at most nine terms
            assert ((ours.double() - theirs.double()).abs() <= bound).all()
        elif ours is not None:
            assert torch.equal(ours, theirs)


@given(needs=st.lists(st.booleans(), min_size=6, max_size=6).filter(any), wide=st.booleans(), flat=st.booleans())
def test_its_second_derivatives_are_autograds(needs, wide, flat):
    """Among them those of dB, through A x, to x and A."""
    torch.manual_seed(0)
    shapes = (3, 4) if flat else (2, 2, 4), (3, 4), (3,), (2, 4), (3, 2), (3, 3) if flat else (2, 2, 3)
    x, weight, bias, A, B, other = (
        torch.randn(shape, dtype=torch.float64, requires_grad=needed)
        for shape, needed in zip(shapes, needs, strict=True)
    )  # fmt: skip
    inputs = [t for t in ((x, A, B, other) if wide else (x, weight, bias, A, B)) if t.requires_grad]

    def apply(*_):
        return lora_linear(x, *(None, None) if wide else (weight, bias), A, B, 1.7, base_output=other if wide else None)

    assert not inputs or torch.autograd.gradgradcheck(apply, inputs)


@pytest.mark.parametrize("kind", [MoSLinear, MoSWrapped])
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 0, 4), (2, 3, 4)])
def test_its_output_may_be_changed_in_place(kind, shape):
    config = MoSConfig(spaces=LORA, num_experts_per_tok=1, init_lora_weights=False)
    layer, x = kind.from_linear(torch.nn.Linear(4, 3), config), torch.randn(shape, requires_grad=True)
    wanted = torch.autograd.grad((layer(x) + 1).relu().sum(), [x, layer.mos_lora_B])
    y = layer(x)
    y += 1
    found = torch.autograd.grad(y.relu_().sum(), [x, layer.mos_lora_B])
    assert all(map(torch.equal, found, wanted))


def test_a_backward_inside_autocast_is_not_rounded():
    config = MoSConfig(spaces=LORA, num_experts_per_tok=1, init_lora_weights=False)
    layer, x = MoSLinear(4, 3, config=config), torch.randn(5, 4, requires_grad=True)
    inputs = [x, layer.mos_lora_A, layer.mos_lora_B]
    wanted = torch.autograd.grad(layer(x).sum(), inputs)
    y = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(y.sum(), inputs)
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("wide", [torch.float16, torch.float32, None])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("size", [1e3, 6e4])
def test_a_huge_float16_input_meets_a_zero_B_as_zero(size, dropout_p, wide):
    """A x is beyond float16 times the scaling, or already without."""
    x, weight, A = torch.full((2, 64), size).half(), torch.zeros(3, 64).half(), torch.ones(4, 64)
    base = None if wide is None else torch.ones(2, 3, dtype=wide)
    y = lora_linear(
        x, None if base is not None else weight, None, A, torch.zeros(3, 4, requires_grad=True), 2.0,
        base_output=base, dropout_p=dropout_p,
    )  # fmt: skip
    assert torch.equal(y, torch.zeros(2, 3).half() if base is None else base)
    y = lora_linear(x * float("nan"), weight, None, A, torch.zeros(3, 4), 2.0, dropout_p=dropout_p)
    assert y.isnan().all()


def test_forward_mode_of_its_factors():
    x, weight, A, B = (torch.randn(shape, dtype=torch.float64) for shape in ((5, 4), (3, 4), (2, 4), (3, 2)))
    with forward_ad.dual_level():
        y = lora_linear(x, weight, None, A, forward_ad.make_dual(B, B), 1.7)
        torch.testing.assert_close(forward_ad.unpack_dual(y).tangent, 1.7 * x @ A.t() @ B.t())


@pytest.mark.parametrize("share_a", [True, False])
@pytest.mark.parametrize("kind", [MoSLinear, MoSConv1D, MoSWrapped])
def test_it_is_the_mixture_of_one_expert(kind, share_a):
    torch.manual_seed(0)
    config = MoSConfig(spaces=LORA, num_experts_per_tok=1, init_lora_weights=False, share_a=share_a, use_rslora=True)
    base = Conv1D(40, 24).double() if kind is MoSConv1D else torch.nn.Linear(24, 40, dtype=torch.float64)
    layer, x = kind.from_linear(base, config), torch.randn(7, 24, dtype=torch.float64)
    wanted = mos_linear(
        x, None, None, layer.mos_lora_A, layer.mos_lora_B, torch.zeros(1), config=config, base_output=base(x),
        gates=torch.ones(7, 1, dtype=torch.float64),
    )  # fmt: skip
    torch.testing.assert_close(layer(x), wanted)
    torch.testing.assert_close(layer.eval()(x), wanted)
    assert layer.freeze_for_inference() is layer and layer.curvature.tolist() == [0.0]


class _Rounded(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x).long()


class _InFloat32(torch.nn.Linear):
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float())


def test_a_base_that_gives_float32_under_autocast_is_not_rounded():
    layer, x = MoSWrapped(_InFloat32(24, 40), MoSConfig(spaces=LORA, num_experts_per_tok=1)), torch.randn(5, 24)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), layer.base_layer(x))


def test_autocast_dropout_and_wrong_inputs():
    torch.manual_seed(0)
    config = MoSConfig(spaces=LORA, num_experts_per_tok=1, init_lora_weights=False, lora_dropout=0.5)
    layer, x = MoSLinear(24, 40, config=config), torch.randn(4000, 24)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == layer(x.bfloat16()).dtype == torch.bfloat16  # the second as a layer before leaves it
    base = linear(x, layer.weight, layer.bias)
    kept = layer.eval()(x) - base
    dropped = layer.train()(x) - base
    assert 0.1 < (dropped - kept).norm() / kept.norm() < 2
    torch.testing.assert_close(dropped.mean(0), kept.mean(0), atol=0.5, rtol=0)
    with pytest.raises(ValueError, match="x has width 23"):
        layer(x[:, :23])
    with pytest.raises(ValueError, match="x is torch.float64 and the weight"):
        layer(x.double())
    with pytest.raises(ValueError, match="base_output is torch.int64"):
        MoSWrapped(_Rounded(24, 40), config)(x)
    with pytest.raises(ValueError, match="has no gate"):
        layer(x, torch.ones(4000, 1))
    with pytest.raises(ValueError, match="has no router"):
        layer.routing_logits(x)


@pytest.mark.parametrize("family", MATRIX)
def test_everything_trains_and_a_state_dict_and_dtype_round_trip(family):
    model, _ = adapted(family)
    model.train()
    model(**batch(family)).loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapter_parameters(model).values() if p.numel())
    again, _ = adapted(family)
    with torch.no_grad():
        for parameter in adapter_parameters(again).values():
            parameter.zero_()
    again.load_state_dict(model.state_dict())
    assert torch.equal(logits(again.eval()), logits(model.eval()))
    assert model.float().half().float() is model


@pytest.mark.parametrize("door", ["plain", "peft"])
def test_a_trainer_logs_what_has_routers_and_the_report_draws_it(door, tmp_path):
    pattern = {"q_proj|k_proj|v_proj|o_proj": LORA, "down_proj": {"spherical": 3}}
    model, options = tiny(dtype=torch.float32), {"target_modules": "all-linear", "spaces_pattern": pattern}
    if door == "plain":
        apply_mos(model, MoSConfig(r=4, **options))
    else:
        model = get_peft_model(model, MoSPeftConfig(r=4, task_type="CAUSAL_LM", **options))
    settings = TrainingArguments(
        str(tmp_path), max_steps=2, logging_steps=1, use_cpu=True, report_to="none", save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in ids(batch=8)]
    trainer = Trainer(model, settings, train_dataset=rows)
    callback = MoSCallback.add_to(trainer)
    trainer.train()
    assert len(callback.history) == 2 and not any("self_attn" in name for name in callback.history[0]["curvature"])
    assert {len(share) for share in callback.history[0]["share"].values()} == {3, 8}
    run = read_run(tmp_path)
    assert run.adapter.spaces_pattern == pattern and "q_proj|k_proj|v_proj|o_proj: 1 Euclidean" in page(run)
    down = next(name for name in callback.history[0]["curvature"] if "down_proj" in name)
    assert run.spaces_of(down, 3) == ("spherical",) * 3


# files, both doors, a warm start, the export


@pytest.mark.parametrize("family", MATRIX)
def test_one_file_for_both_doors(family, tmp_path):
    model, _ = adapted(family)
    save_adapter(model, tmp_path / "plain")
    assert "have 1 euclidean" in (tmp_path / "plain" / "README.md").read_text()
    again = tiny(family)
    load_adapter(again, tmp_path / "plain")
    assert torch.equal(logits(again), logits(model))
    by_peft = PeftModel.from_pretrained(tiny(family), tmp_path / "plain")
    assert torch.equal(logits(by_peft), logits(model))
    by_peft.save_pretrained(tmp_path / "peft")
    third = tiny(family)
    load_adapter(third, tmp_path / "peft")
    assert torch.equal(logits(third), logits(model))


@given(
    st.permutations(["q_proj", ".*_proj", r"self_attn\..*", r"model\..*"]),
    st.sampled_from(["rank_pattern", "alpha_pattern", "spaces_pattern"]),
)
def test_the_first_key_that_matches_counts_also_after_a_save_by_peft(tmp_path_factory, keys, option):
    """peft sorts the keys of what it writes."""
    folder = tmp_path_factory.mktemp("order")
    values = [{"spherical": i} for i in range(1, 5)] if option == "spaces_pattern" else range(1, 5)
    config = MoSPeftConfig(**{option: dict(zip(keys, values, strict=True))})
    config.save_pretrained(folder)
    for _ in range(2):  # and again, of what was read
        found = MoSPeftConfig.from_pretrained(folder)
        assert found.to_mos_config() == config.to_mos_config()
        assert list(getattr(found, option)) == list(keys)
        found.save_pretrained(folder)


def test_patterns_in_another_order_are_another_configuration(tmp_path):
    patterns = {"up_proj": {"hyperbolic": 2}, ".*_proj": {"spherical": 2}}
    turned = dict(reversed(patterns.items()))
    first, second = (MoSConfig(r=4, init_lora_weights=False, spaces_pattern=p) for p in (patterns, turned))
    assert first != second and first == MoSConfig(r=4, init_lora_weights=False, spaces_pattern=dict(patterns))
    model = tiny()
    apply_mos(model, first)
    save_adapter(model, tmp_path / "first")
    by_peft = PeftModel.from_pretrained(tiny(), tmp_path / "first")
    by_peft.save_pretrained(tmp_path / "peft")
    for folder in ("first", "peft"):
        again = tiny()
        load_adapter(again, tmp_path / folder)
        assert torch.equal(logits(again), logits(model))
        other = tiny()
        apply_mos(other, second)
        with pytest.raises(ValueError, match="another configuration .*spaces_pattern="):
            load_adapter(other, tmp_path / folder)


def test_by_peft_beside_another_adapter_and_with_experts_of_its_own():
    model = tiny()
    options = {"r": 4, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    pattern = {"gate_proj": LORA, "down_proj": {"spherical": 3}}
    by_peft = get_peft_model(model, MoSPeftConfig(**options, spaces_pattern=pattern)).eval()
    own = tiny()
    torch.manual_seed(0)
    apply_mos(own, mos(own, spaces_pattern=pattern))
    values = {name.replace(".mos_adapter.default", ""): p for name, p in by_peft.base_model.model.named_parameters()}
    with torch.no_grad():
        for name, parameter in adapter_parameters(own).items():
            parameter.copy_(values[name])
    torch.testing.assert_close(logits(by_peft), logits(own))
    by_peft.add_adapter("second", MoSPeftConfig(**options))
    by_peft.set_adapter("second")
    assert not torch.equal(logits(by_peft), logits(own))
    by_peft.set_adapter("default")
    torch.testing.assert_close(logits(by_peft), logits(own))


def test_it_starts_from_a_lora_on_all_linears():
    torch.manual_seed(0)
    lora = get_peft_model(tiny(), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False))
    model = tiny()
    start_from_lora(model, lora, dataclasses.replace(mixed(), init_lora_weights=True))
    torch.testing.assert_close(logits(model), logits(lora.eval()))
    apply_to = tiny()
    with pytest.raises(ValueError, match="has no Euclidean experts"):
        pattern = {"q_proj": {"hyperbolic": 2}, "k_proj|v_proj|o_proj": LORA}
        start_from_lora(apply_to, lora, dataclasses.replace(mixed(), init_lora_weights=True, spaces_pattern=pattern))
    assert not mos_adapters(apply_to)


def test_loras_alone_are_not_asked_how_they_route():
    with pytest.raises(ValueError, match="has no MoS routers: its 14 adapted linears are LoRAs, which need none"):
        routing_report(adapted(spaces=LORA, num_experts_per_tok=1)[0], ids())


def test_the_export_has_the_loras_exactly(tmp_path):
    model, _ = adapted()
    report = export_lora(model, [{"input_ids": ids(seed)} for seed in range(6)], tmp_path / "lora", rank=4)
    assert all((error < 1e-6) == ("self_attn" in name) for name, error in report.linears.items())
    assert len(PeftModel.from_pretrained(tiny(), tmp_path / "lora").base_model.targeted_module_names) == 14
