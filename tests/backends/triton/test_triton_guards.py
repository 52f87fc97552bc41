"""Both sides of every guard, curvature at and around zero, and numbers of any size."""

from __future__ import annotations

import math

import pytest
import torch
from cases import failures
from strategies import ACTIVATIONS, GEOMETRIES, around, guard_case, leaf, limit_back, limits_into, make_case

from mos_kernels import MoSConfig

geometries = pytest.mark.parametrize(("mapping", "domain"), GEOMETRIES)
EXPERTS = 20


@geometries
@pytest.mark.parametrize(("activation", "share_a"), [("identity", True), ("identity", False), ("tanh", True)])
def test_both_sides_of_every_guard(mapping, domain, activation, share_a):
    config = MoSConfig(
        r=3, spaces={"euclidean": EXPERTS}, num_experts_per_tok=EXPERTS, mapping=mapping, domain=domain,
        activation=activation, share_a=share_a,
    )  # fmt: skip
    into = [a for limit in limits_into(config) for a in (*around(limit, 1e-3), -0.5 * limit)]
    pairs = [(a, math.copysign(b, a)) for a in into for b in around(limit_back(config), 1e-3)]
    pairs += pairs[: -len(pairs) % EXPERTS]
    for start in range(0, len(pairs), EXPERTS):
        case = guard_case(config, pairs[start : start + EXPERTS]).to(torch.float32)
        assert not failures(case, case.upstream(torch.float32)), pairs[start : start + EXPERTS]


@geometries
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_curvature_at_and_around_zero(mapping, domain, activation):
    kappas = (-1e-3, -1e-9, -1e-30, 0.0, 1e-30, 1e-9, 1e-3)
    config = MoSConfig(
        r=2, spaces={"euclidean": 7}, num_experts_per_tok=3, mapping=mapping, domain=domain, activation=activation
    )
    for dtype in (torch.float32, torch.bfloat16):
        case = make_case(config, (6,), kappa=kappas, norms=(1.0, 1e-3, 10.0, 0.0)).to(dtype)
        assert not failures(case, case.upstream(dtype))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_curvature_of_one_billionth_is_as_good_as_none(activation):
    config = MoSConfig(r=2, spaces={"euclidean": 3}, num_experts_per_tok=3, activation=activation)
    found = []
    for kappa in (-1e-9, 0.0, 1e-9):
        case = make_case(config, (4,), kappa=(kappa,) * 3).to(torch.float32)
        found.append(case.results(case.ours("triton")))
    for name, middle in found[1].items():
        for side in (found[0], found[2]):
            torch.testing.assert_close(side[name], middle, rtol=1e-5, atol=1e-6 * middle.abs().max().item())


@geometries
@pytest.mark.parametrize("activation", ["identity", "silu"])
def test_zero_B_and_zero_tokens(mapping, domain, activation):
    config = MoSConfig(r=2, mapping=mapping, domain=domain, activation=activation, router_scope="linear")
    case = make_case(config, (3,), norms=(0.0, 1.0, 100.0), b_scale=0.0, own_router=True).to(torch.float32)
    assert not failures(case, case.upstream(torch.float32))


@geometries
def test_tokens_and_factors_of_any_length(mapping, domain):
    """Squared norms beyond their saturation, where a Euclidean expert would meet 0·∞."""
    config = MoSConfig(r=2, mapping=mapping, domain=domain)
    case = make_case(config, (4,), norms=(1e17, 1e-17, 1e12, 1.0)).to(torch.float32)
    assert not failures(case, case.upstream(torch.float32))
    case = make_case(config, (4,), b_scale=1e12).to(torch.float32)
    assert not failures(case, case.upstream(torch.float32))


@geometries
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ["identity", "tanh", "gelu"])
def test_half_precision_stays_finite_where_the_base_does(mapping, domain, dtype, activation):
    large = 1e30 if dtype == torch.bfloat16 else 3e4
    config = MoSConfig(r=2, mapping=mapping, domain=domain, activation=activation)
    case = make_case(config, (5,), norms=(large, 1.0, 0.0, 1e-4), kappa=(-3.0, -1e-9, -1e-3, 3.0, 1e-9, 1e-3, 0, 0))
    case = case.to(dtype)
    case = case.replace(weight=leaf(torch.zeros_like(case.weight)))
    for name, value in case.results(case.ours("triton"), case.upstream(dtype)).items():
        assert value.isfinite().all(), name


def test_a_token_that_is_not_a_number_spoils_only_itself():
    config = MoSConfig(r=2, router_scope="linear")
    case = make_case(config, (5,), d_in=9, own_router=True).to(torch.float32)
    whole = case.ours("triton").detach()
    x = case.x.detach().clone()
    x[2, 3] = torch.nan
    x[4] = torch.inf
    spoiled = case.replace(x=x).ours("triton").detach()
    assert spoiled[[2, 4]].isnan().all()
    assert torch.equal(spoiled[[0, 1, 3]], whole[[0, 1, 3]])
