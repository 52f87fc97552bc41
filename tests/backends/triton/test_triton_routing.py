"""Routings: one expert takes all, one takes none, ties; and the load-balancing gradient that goes with them."""

from __future__ import annotations

import math

import pytest
import torch
from cases import failures, in_two_parts, results
from strategies import leaf, make_case, normal

import reference.routing
from mos_kernels import MoSConfig
from mos_kernels.functional import mos_route

E, K, D_IN = 8, 3, 20


def config_of(k: int = K, **options) -> MoSConfig:
    return MoSConfig(r=3, num_experts_per_tok=k, router_scope="linear", **options)


def positive_case(config, dtype, router):
    """Positive tokens, so that a router row with one sign decides."""
    case = make_case(config, (9,), d_in=D_IN, own_router=True, margin=-1.0).to(dtype)
    return case.replace(x=leaf(case.x.detach().abs() + 0.1), router=leaf(in_two_parts(router.float(), dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize("k", [1, K])
@pytest.mark.one_at_a_time("dtype", "norm_topk_prob", "k")
def test_one_expert_takes_all_and_one_takes_none(dtype, norm_topk_prob, k):
    config = config_of(k, norm_topk_prob=norm_topk_prob)
    router = 0.2 * normal(3, E, D_IN)
    router[5], router[2] = 8.0, -8.0
    case = positive_case(config, dtype, router)
    gates = mos_route(case.x, case.router, config=config, backend="triton")
    assert (gates[:, 5] > 0.99).all() and (gates[:, 2] == 0).all()
    assert not failures(case, case.upstream(dtype), aux_weight=1.0)


@pytest.mark.parametrize(("k", "norm_topk_prob"), [(1, False), (K, True), (K, False), (E, True)])
def test_ties_go_to_the_lower_expert(norm_topk_prob, k):
    config = config_of(k, norm_topk_prob=norm_topk_prob)
    pair = normal(3, 2, D_IN)
    for router in (torch.zeros(E, D_IN), pair[torch.tensor([0, 1, 1, 0, 1, 0, 0, 1])]):
        case = positive_case(config, torch.float32, router)
        gates = mos_route(case.x, case.router, config=config, backend="triton")
        logits = reference.routing.router_logits(case.x, case.router)
        kept = reference.routing.top_k(logits, k)
        assert torch.equal(gates > 0, kept)
        assert not failures(case, case.upstream(torch.float32), aux_weight=1.0)


def test_dense_routing_keeps_every_expert():
    case = make_case(config_of(E, norm_topk_prob=False), (5,), d_in=D_IN, own_router=True).to(torch.float32)
    gates = mos_route(case.x, case.router, config=case.config, backend="triton")
    torch.testing.assert_close(gates.sum(-1), torch.ones(5))
    assert not failures(case, case.upstream(torch.float32))


def test_logits_as_low_as_they_come_select_existing_experts():
    """-inf is also what stands where there is no expert."""
    from mos_kernels.backends import triton as backend

    config = MoSConfig(spaces={"euclidean": 5}, num_experts_per_tok=3, norm_topk_prob=False)
    logits = torch.full((1, 2, 5), -torch.inf)
    logits[0, :, 4] = 0.0
    gates = backend.route(logits, config)
    assert torch.equal(gates, torch.tensor([[0.0, 0, 0, 0, 1]] * 2))


@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_a_logit_that_is_no_number_shows_in_the_token_alone(backend, norm_topk_prob):
    x, router = normal(0, 3, D_IN).float(), normal(1, E, D_IN).float()
    x[1, 0] = router[2, 0] = 0.0
    config = config_of(norm_topk_prob=norm_topk_prob)
    right = mos_route(x, router, config=config, backend=backend)
    router[2, 0] = math.nan  # 0 · NaN
    assert not mos_route(x, router, config=config, backend=backend).isfinite().all(-1).any()
    x[1, 1] = math.nan
    router[2, 0] = 0.0
    found = mos_route(x, router, config=config, backend=backend)
    assert found[1].isnan().any() and torch.equal(found[::2], right[::2])


def test_a_wide_router_beside_half_precision_keeps_two_parts():
    """The logits of a float32 router beside a bfloat16 x are right to what two parts hold."""
    from mos_kernels.backends import triton as backend

    for dtype, bits in ((torch.bfloat16, 16), (torch.float16, 22)):
        x, router = normal(0, 7, 300).to(dtype), normal(1, E, 300).float()
        parts = backend.routing_logits(x, router)[0]
        logits = parts[:, :E].double() + parts[:, E:].double()
        exact = x.double() @ router.double().T
        allowed = (x.double().abs() @ router.double().abs().T) * (2.0**-bits + 2.0**-22)
        assert ((logits - exact).abs() <= allowed).all()


@pytest.mark.parametrize("masked", ["none", "some", "all"])
@pytest.mark.parametrize("k", [1, K, E])
def test_the_injected_gradient_is_that_of_the_loss(masked, k):
    """With gates that nobody uses, the router's gradient is the load-balancing loss's alone."""
    x, router = normal(0, 70, D_IN).float(), normal(1, E, D_IN).float().requires_grad_()
    mask = {"none": None, "some": normal(2, 70) > 0, "all": torch.zeros(70, dtype=torch.bool)}[masked]
    config = config_of(k)
    gates = mos_route(
        x, router, config=config, aux_weight=torch.tensor([0.7]), token_mask=mask, backend="triton"
    )  # fmt: skip
    (found,) = torch.autograd.grad(gates, router, torch.zeros_like(gates))
    wide = router.detach().double().requires_grad_()
    loss = 0.7 * reference.routing.load_balancing_loss(x.double() @ wide.T, k, mask)
    (truth,) = torch.autograd.grad(loss, wide)
    torch.testing.assert_close(found.double(), truth, rtol=0, atol=2e-6 * truth.abs().max().item() + 1e-7)


@pytest.mark.parametrize("activation", ["identity", "tanh"])
@pytest.mark.parametrize("masked", ["some", "all"])
@pytest.mark.budget(12)
@pytest.mark.one_at_a_time("masked", "activation")
def test_a_linear_with_its_own_router_leaves_padding_out(masked, activation):
    case = make_case(config_of(activation=activation), (2, 19), d_in=D_IN, own_router=True).to(torch.float32)
    mask = torch.zeros(2, 19, dtype=torch.bool) if masked == "all" else normal(2, 2, 19) > 0
    dy = case.upstream(torch.float32)
    assert not failures(case, dy, aux_weight=3.0, token_mask=mask)
    (all_tokens, padded) = (results(case, dy, "triton", aux_weight=3.0, token_mask=m)["router"] for m in (None, mask))
    assert not torch.allclose(all_tokens, padded, rtol=1e-2)
