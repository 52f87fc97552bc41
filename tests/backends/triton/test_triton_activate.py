"""activate and its backward in Triton's interpreter: every form of an FFN, against the eager backend in float64."""

from __future__ import annotations

import pytest
import torch
from everyday import full_but
from ffn_cases import ACTIVATIONS, FORMS, ActivateTrial, plan

from mos_kernels.backends.triton import activate

SEEDS = range(60)


@pytest.mark.parametrize("seed", full_but(SEEDS[:12], SEEDS))
def test_drawn_calls(seed):
    trial = ActivateTrial.drawn(seed)
    assert trial.failures() == [], trial


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form(form, activation, dtype):
    assert ActivateTrial(form=form, activation=activation, dtype=dtype).failures() == []


def launches(outputs, form="gated", activation="silu", dn=0.0):
    """h, n and the gradients, of A = 0 and dh = 1."""
    d = outputs[0].shape[1] // (2 if form == "fused" else 1)
    T, plan_ = outputs[0].shape[0], plan(form, activation)
    A, dp = torch.zeros(1, d), torch.zeros(T, 1)
    h, _, n = activate.activate_launch(outputs, A, plan_)
    dh = torch.ones(T, d, dtype=outputs[0].dtype)
    gradients, _ = activate.activate_backward_launch(dh, outputs, A, dp, torch.full((T,), dn), plan_, True)
    return h, n.sum(0), gradients


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extreme_gates_are_finite_and_what_is_no_number_stays_none(activation):
    g = torch.tensor([[1e30, -1e30, 3e38, -3e38, 200.0, -200.0, 89.0, -89.0, torch.inf, -torch.inf, torch.nan]])
    h, n, (dg,) = launches([g], "not gated", activation)
    assert torch.allclose(h[0, :9], g[0, :9].clamp(min=0.0), atol=1e-30)
    assert h[0, 9:].isnan().all() and n.isnan().all()
    assert torch.allclose(dg[0, :8], (g[0, :8] > 0).float(), atol=1e-30) and dg[0, 10].isnan()


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_an_overflow_of_float16_shows_and_a_norm_is_bounded():
    g = torch.full((1, 4), 60000.0)
    h, _, gradients = launches([g.half(), g.half()], dn=1.0)
    assert (h == torch.inf).all() and all((gradient == torch.inf).all() for gradient in gradients)
    _, n, _ = launches([g * 1e20, g])
    assert n.item() == torch.tensor(1e30).item()


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_a_dp_that_float16_cannot_hold_shows():
    outputs, A, dp = [torch.ones(1, 4).half()] * 2, torch.ones(1, 4), torch.full((1, 1), 1e5)
    dh, dn = torch.zeros(1, 4).half(), torch.zeros(1)
    gradients, dA = activate.activate_backward_launch(dh, outputs, A, dp, dn, plan("gated", "silu"), True)
    assert all((gradient == torch.inf).all() for gradient in (*gradients, dA))


@pytest.mark.parametrize("form", FORMS)
def test_no_tokens(form):
    trial = ActivateTrial(T=0, form=form)
    assert trial.failures() == []


def test_rows_of_a_wider_tensor():
    """As of a fused output, whose halves are each a view."""
    generator = torch.Generator().manual_seed(0)
    joined = torch.randn(5, 40, generator=generator)
    fused, apart = launches([joined], "fused"), launches(list(joined.chunk(2, -1)))
    assert torch.equal(fused[0], apart[0]) and torch.equal(fused[2][0], torch.cat(apart[2], 1))


def test_h_is_the_same_in_backward():
    """n's gradient is 2 h of the h that was rounded: at u = 1 and φ' = 1 it is that of g."""
    g = torch.full((1, 3), 300.0) + torch.tensor([0.3, 0.6, 0.9])
    h, _, (dg, _) = launches([g.bfloat16(), torch.full((1, 3), 1.0078125).bfloat16()], dn=0.5)
    assert torch.equal(dg, ((1.0 + h.float()) * 1.0078125).bfloat16())
