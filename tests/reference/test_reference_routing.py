"""The routing of reference/ against its definition, one token at a time in Python."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reference.routing import load_balancing_loss, router_logits, top_k, top_k_gates


@st.composite
def routings(draw):
    E, T = draw(st.integers(1, 7)), draw(st.integers(1, 5))
    values = st.sampled_from([-1.5, 0.0, 0.25, 2.0]) | st.floats(-30, 30)  # few distinct ones: ties are common
    logits = draw(st.lists(st.lists(values, min_size=E, max_size=E), min_size=T, max_size=T))
    return torch.tensor(logits, dtype=torch.float64), draw(st.integers(1, E))


@given(routings(), st.booleans())
def test_gates_are_the_softmax_of_the_top_k_with_ties_to_the_lower_index(routing, norm_topk_prob):
    logits, k = routing
    gates = top_k_gates(logits, k, norm_topk_prob)
    for row, actual in zip(logits.tolist(), gates.tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda e: (-row[e], e))[:k]
        exponentials = [math.exp(v - max(row)) for v in row]
        total = sum(exponentials[e] for e in (order if norm_topk_prob else range(len(row))))
        expected = [exponentials[e] / total if e in order else 0.0 for e in range(len(row))]
        assert actual == pytest.approx(expected, rel=1e-12, abs=0)


@given(routings(), st.booleans())
def test_gradients_of_the_gates_match_the_formulas(routing, norm_topk_prob):
    logits, k = routing
    logits.requires_grad_()
    gates = top_k_gates(logits, k, norm_topk_prob)
    dgates = torch.randn(gates.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (actual,) = torch.autograd.grad(gates, logits, dgates)
    if norm_topk_prob:
        expected = gates * (dgates - (gates * dgates).sum(-1, keepdim=True))
    else:
        p, kept = logits.softmax(-1), top_k(logits, k)
        expected = p * (dgates * kept - (p * dgates * kept).sum(-1, keepdim=True))
    torch.testing.assert_close(actual, expected.detach(), rtol=1e-10, atol=1e-14)


@given(routings(), st.data())
def test_load_balancing_is_its_definition_and_leaves_masked_tokens_out(routing, data):
    logits, k = routing
    T, E = logits.shape
    mask = data.draw(st.lists(st.booleans(), min_size=T, max_size=T))
    logits.requires_grad_()
    loss = load_balancing_loss(logits, k, torch.tensor(mask))
    (gradient,) = torch.autograd.grad(loss, logits)
    rows = [row for row, used in zip(logits.tolist(), mask, strict=True) if used]
    if not rows:
        assert loss.item() == 0 and not gradient.any()
        return
    f, P = [0.0] * E, [0.0] * E
    for row in rows:
        for e in sorted(range(E), key=lambda e: (-row[e], e))[:k]:
            f[e] += 1 / (len(rows) * k)
        total = sum(math.exp(v) for v in row)
        P = [P[e] + math.exp(row[e]) / total / len(rows) for e in range(E)]
    assert sum(f) == pytest.approx(1)
    assert loss.item() == pytest.approx(E * sum(a * b for a, b in zip(f, P, strict=True)), rel=1e-12)
    p, f = logits.softmax(-1), torch.tensor(f, dtype=torch.float64)
    expected = E / len(rows) * p * (f - (p * f).sum(-1, keepdim=True)) * torch.tensor(mask).unsqueeze(-1)
    torch.testing.assert_close(gradient, expected.detach(), rtol=1e-10, atol=1e-14)
    kept = logits.detach()[torch.tensor(mask)]
    assert torch.equal(load_balancing_loss(kept, k), loss)


def test_load_balancing_is_1_at_uniform_routing():
    assert load_balancing_loss(torch.eye(4).double() * 1e-9, 1).item() == pytest.approx(1, abs=1e-8)
    assert load_balancing_loss(torch.zeros(3, 4), 4).item() == pytest.approx(1)
    assert load_balancing_loss(torch.tensor([[9e9, 0, 0, 0]]), 1).item() == 4  # collapse onto one expert: E


def test_all_tied_keeps_the_lowest_indices():
    assert top_k(torch.zeros(1, 5), 2).tolist() == [[True, True, False, False, False]]


@pytest.mark.parametrize("k", [0, 5])
def test_k_outside_the_experts_is_an_error(k):
    with pytest.raises(ValueError, match=rf"k={k} experts of 4"):
        top_k(torch.zeros(1, 4), k)


def test_logits_of_half_precision_tokens_are_float32():
    x, router = torch.ones(2, 3, dtype=torch.bfloat16), torch.full((4, 3), 1 / 3)
    assert router_logits(x, router).dtype == torch.float32
    assert router_logits(x.double(), router).dtype == torch.float64
