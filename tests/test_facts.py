"""Facts that follow from the mathematics alone, on the eager backend."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import (
    ACTIVATIONS,
    GEOMETRIES,
    assert_results_close,
    cases,
    curvatures,
    leaf,
    limits_into,
    make_case,
    normal,
    seeds,
)

from mos_kernels import MoSConfig, MoSLinear
from reference.baselines import hydralora_linear, lora_linear, mixture_of_lora_linear

geometries = pytest.mark.parametrize(("mapping", "domain"), GEOMETRIES)
some_geometry = st.sampled_from(GEOMETRIES)
ONE = {"euclidean": 1}


@settings(max_examples=40)
@given(seed=seeds, r=st.integers(1, 16), geometry=some_geometry, norm=st.floats(-3, 6).map(lambda e: 10.0**e))
def test_one_flat_expert_with_gate_one_is_lora(seed, r, geometry, norm):
    config = MoSConfig(r=r, spaces=ONE, num_experts_per_tok=1, mapping=geometry[0], domain=geometry[1])
    case = make_case(config, (4,), seed=seed, norms=(norm,))
    case = case.replace(gates=leaf(torch.ones(4, 1, dtype=torch.float64)))
    names = ("x", "weight", "bias", "A", "B")
    inputs = {name: getattr(case, name) for name in names}
    lora = lora_linear(case.x, case.weight, case.bias, case.A, case.B[:, 0], scaling=config.scaling)
    assert_results_close({"y": case.ours()}, {"y": lora}, 1e-14)
    truth = dict(zip(names, torch.autograd.grad(lora, list(inputs.values()), case.upstream()), strict=True))
    found = case.gradients(case.ours())
    assert_results_close({name: found[name] for name in names}, truth, 1e-13)


@settings(max_examples=60)
@given(case=cases(tokens=st.sampled_from([(1,), (5,), (2, 3)])), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_zero_B_is_the_base_layer_with_finite_gradients(case, dtype):
    case = case.replace(B=leaf(torch.zeros_like(case.B))).to(dtype)
    base = torch.nn.functional.linear(case.x, case.weight, case.bias)
    y = case.ours()
    terms = torch.nn.functional.linear(case.x.abs(), case.weight.abs(), None if case.bias is None else case.bias.abs())
    assert ((y - base).abs() <= 4 * torch.finfo(dtype).eps * terms).all()
    for name, gradient in case.gradients(y).items():
        assert torch.isfinite(gradient).all(), name


@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_hydralora(norm_topk_prob):
    config = MoSConfig.hydralora(5, r=3, lora_alpha=6.0, norm_topk_prob=norm_topk_prob)
    case = make_case(config, (6,), own_router=True)
    truth = hydralora_linear(case.x, case.weight, case.bias, case.A, case.B, case.router, scaling=2.0)
    assert_results_close({"y": case.ours()}, {"y": truth}, 1e-13)
    found, expected = case.gradients(case.ours()), case.gradients(truth)
    del found["kappa"], expected["kappa"]  # LoRA has none
    assert_results_close(found, expected, 1e-12)


def test_mixture_of_lora():
    config = MoSConfig.mixture_of_lora(5, r=3, lora_alpha=6.0, num_experts_per_tok=2)
    case = make_case(config, (6,), own_router=True)
    truth = mixture_of_lora_linear(
        case.x, case.weight, case.bias, case.A, case.B, router=case.router, scaling=2.0, num_experts_per_tok=2
    )
    assert_results_close({"y": case.ours()}, {"y": truth}, 1e-13)
    found, expected = case.gradients(case.ours()), case.gradients(truth)
    del found["kappa"], expected["kappa"]
    assert_results_close(found, expected, 1e-12)


@settings(max_examples=100)
@given(
    seed=seeds, sign=st.sampled_from([-1, 1]), size=st.floats(-4, 4).map(lambda e: 10.0**e),
    norm=st.floats(-3, 8).map(lambda e: 10.0**e), B=st.floats(-3, 8).map(lambda e: 10.0**e),
    domain=st.sampled_from(["ball", "raw"]), activation=st.sampled_from(ACTIVATIONS),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_a_curved_expert_stays_within_one_radius(seed, sign, size, norm, B, domain, activation, dtype):
    config = MoSConfig(
        r=2, lora_alpha=2.0, spaces=ONE, num_experts_per_tok=1, domain=domain, activation=activation, boundary_eps=1e-6
    )
    case = make_case(config, (4,), seed=seed, norms=(norm,), b_scale=B, kappa=(sign * size,), bias=False)
    case = case.replace(weight=torch.zeros_like(case.weight), gates=torch.ones(4, 1))
    o = case.to(dtype).ours().detach().double()
    # q of the float32 Gram form carries its rounding near a null space of B
    assert (o.norm(dim=-1) <= size**-0.5 * (1 + (1e-3 if dtype == torch.float32 else 1e-9))).all()


@settings(max_examples=60)
@given(case=cases(tokens=st.just((4,)), activations=("identity",)), c=st.floats(0.05, 20))
def test_scale_covariance(case, c):
    """(x, κ, BA) and (c·x, κ/c², BA) give o and c·o."""
    case = case.replace(weight=leaf(torch.zeros_like(case.weight)), bias=None)
    if case.router is not None:
        case = case.replace(router=None, gates=leaf(normal(0, 4, case.config.num_experts).softmax(-1)))
    n = case.x.detach().square().sum(-1, keepdim=True)
    for limit in limits_into(case.config):
        if ((case.kappa.detach() * n / limit - 1).abs() < 1e-6).any():
            return
    o = case.ours()
    scaled = case.replace(x=leaf(c * case.x), kappa=leaf(case.kappa / c**2))
    assert_results_close({"o": scaled.ours()}, {"o": c * o}, 1e-9)
    found, expected = scaled.gradients(scaled.ours()), case.gradients(o)
    for name, factor in (("x", 1), ("A", c), ("B", c), ("gates", c), ("kappa", c**3)):
        assert_results_close({name: found[name]}, {name: factor * expected[name]}, 1e-8)


@geometries
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_output_and_gradients_are_continuous_in_curvature_across_zero(mapping, domain, activation):
    config = MoSConfig(
        r=2, spaces={"euclidean": 3}, num_experts_per_tok=2, mapping=mapping, domain=domain, activation=activation
    )
    results = []
    for kappa in (-1e-9, 0.0, 1e-9):
        case = make_case(config, (4,), kappa=(kappa,) * 3, norms=(0.5, 3.0), own_router=True)
        results.append(case.results(case.ours()))
    assert_results_close(results[0], results[1], 1e-6)
    assert_results_close(results[2], results[1], 1e-6)
    assert results[1]["kappa"].abs().min() > 0


@settings(max_examples=40)
@given(kappa=curvatures, activation=st.sampled_from(ACTIVATIONS), geometry=some_geometry, seed=seeds)
def test_the_order_of_the_experts_does_not_matter(kappa, activation, geometry, seed):
    config = MoSConfig(
        r=2,
        spaces={"euclidean": 3},
        num_experts_per_tok=3,
        activation=activation,
        mapping=geometry[0],
        domain=geometry[1],
    )
    case = make_case(config, (4,), kappa=(kappa, 0.3, -0.2), seed=seed)
    order = torch.tensor([2, 0, 1])
    permuted = case.replace(B=case.B[:, order], kappa=case.kappa[order], gates=case.gates[:, order])
    assert_results_close({"y": permuted.ours()}, {"y": case.ours()}, 1e-12)


@settings(max_examples=40)
@given(case=cases(tokens=st.just((6,))))
def test_tokens_do_not_see_each_other(case):
    y = case.ours()
    for t in range(6):
        gates = None if case.gates is None else case.gates[t : t + 1]
        alone = case.replace(x=case.x[t : t + 1], gates=gates).ours()
        assert_results_close({"y": alone}, {"y": y[t : t + 1]}, 1e-12)


@pytest.mark.parametrize("scope", ["ffn", "linear"])
def test_the_start_of_training_is_the_base_layer(scope):
    torch.manual_seed(0)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        linear = torch.nn.Linear(24, 20, dtype=dtype)
        layer = MoSLinear.from_linear(linear, MoSConfig(router_scope=scope))
        x = normal(0, 7, 24).to(dtype)
        gates = torch.rand(7, 8) if scope == "ffn" else None
        tolerance = 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(layer(x, gates), linear(x), rtol=tolerance, atol=tolerance)
