"""Gates and load balancing: against reference/, ties, extremes, and derivatives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import normal, seeds

import reference.routing
from mos_kernels.routing import (
    load,
    load_balancing_backward,
    load_balancing_loss,
    route,
    route_backward,
    top_k_mask,
)


@st.composite
def logits_and_k(draw, elements=None):
    E, T = draw(st.integers(1, 8)), draw(st.integers(0, 6))
    elements = elements if elements is not None else st.integers(-2, 2).map(float) | st.floats(-30, 30)
    rows = draw(st.lists(st.lists(elements, min_size=E, max_size=E), min_size=T, max_size=T))
    return torch.tensor(rows, dtype=torch.float64).reshape(T, E), draw(st.integers(1, E))


tied = st.integers(-1, 1).map(float)


@settings(max_examples=200)
@given(drawn=logits_and_k(tied), dtype=st.sampled_from([torch.float64, torch.float32]))
def test_ties_go_to_the_lower_index(drawn, dtype):
    logits, k = drawn
    mask = top_k_mask(logits.to(dtype), k)
    for row, kept in zip(logits.tolist(), mask.tolist(), strict=True):
        first = sorted(range(len(row)), key=lambda e: (-row[e], e))[:k]
        assert {e for e, keep in enumerate(kept) if keep} == set(first)


def test_all_equal_keeps_the_first_also_in_many_experts():
    for E in (2, 8, 17, 64, 200):
        assert top_k_mask(torch.zeros(3, E), 2).nonzero()[:, 1].tolist() == [0, 1] * 3


@settings(max_examples=100)
@given(drawn=logits_and_k(), norm_topk_prob=st.booleans())
def test_gates_equal_the_reference(drawn, norm_topk_prob):
    logits, k = drawn
    gates = route(logits, k, norm_topk_prob)
    torch.testing.assert_close(gates, reference.routing.top_k_gates(logits, k, norm_topk_prob), rtol=1e-12, atol=1e-15)
    assert ((gates > 0) <= top_k_mask(logits, k)).all()
    if norm_topk_prob:
        torch.testing.assert_close(gates.sum(-1), torch.ones(len(logits), dtype=gates.dtype), rtol=1e-12, atol=0)


@settings(max_examples=100)
@given(drawn=logits_and_k(), norm_topk_prob=st.booleans(), seed=seeds)
def test_backward_equals_autograd_through_the_reference(drawn, norm_topk_prob, seed):
    logits, k = drawn
    logits.requires_grad_()
    gates = reference.routing.top_k_gates(logits, k, norm_topk_prob)
    dgates = normal(seed, *logits.shape)
    (expected,) = torch.autograd.grad(gates, logits, dgates)
    found = route_backward(dgates, gates.detach(), logits.detach(), k, norm_topk_prob)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-14)


@settings(max_examples=100)
@given(drawn=logits_and_k(), seed=seeds, masked=st.sampled_from([None, "some", "all"]))
def test_load_balancing_equals_the_reference(drawn, seed, masked):
    logits, k = drawn
    mask = None if masked is None else torch.zeros(len(logits), dtype=torch.bool)
    if masked == "some":
        mask = normal(seed, len(logits)) > 0
    logits.requires_grad_()
    loss, expected = load_balancing_loss(logits, k, mask), reference.routing.load_balancing_loss(logits, k, mask)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-15)
    (truth,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], truth, rtol=1e-11, atol=1e-14)
    found = load_balancing_backward(logits.detach(), k, mask)
    torch.testing.assert_close(found, truth, rtol=1e-11, atol=1e-14)


@settings(max_examples=50)
@given(drawn=logits_and_k())
def test_load_is_a_distribution_twice(drawn):
    logits, k = drawn
    if len(logits):
        for distribution in load(logits, k):
            assert distribution.sum().item() == pytest.approx(1)


@pytest.mark.parametrize(("E", "k"), [(8, 4), (4, 1), (6, 6), (1, 1)])
def test_uniform_routing_has_loss_one(E, k):
    # token t prefers experts t, t + 1, … by a hair, so that each expert gets its share
    logits = torch.stack([torch.arange(E).roll(t) for t in range(E)]).double() * 1e-9
    assert load_balancing_loss(logits, k).item() == pytest.approx(1, abs=1e-8)


def test_all_tokens_to_one_expert_has_loss_E():
    logits = torch.zeros(5, 4, dtype=torch.float64)
    logits[:, 2] = 100
    assert load_balancing_loss(logits, 1).item() == pytest.approx(4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_extreme_logits_are_finite(k, norm_topk_prob, dtype):
    extreme = [0.0, 1e-40, 1e4, -1e4, 1e30, -1e30, torch.finfo(dtype).max, torch.finfo(dtype).min]
    logits = torch.cartesian_prod(*[torch.tensor(extreme, dtype=dtype)] * 4)
    gates = route(logits, k, norm_topk_prob)
    assert torch.isfinite(gates).all() and ((gates >= 0) & (gates <= 1)).all()
    dgates = normal(0, *logits.shape).to(dtype)
    assert torch.isfinite(route_backward(dgates, gates, logits, k, norm_topk_prob)).all()
    assert torch.isfinite(load_balancing_backward(logits, k)).all()
    assert torch.isfinite(load_balancing_loss(logits, k))
    if norm_topk_prob:
        torch.testing.assert_close(gates.sum(-1), torch.ones(len(logits), dtype=dtype))


def test_leading_dimensions_are_kept():
    logits = normal(0, 2, 3, 5)
    assert torch.equal(route(logits, 2, True).flatten(0, 1), route(logits.flatten(0, 1), 2, True))
