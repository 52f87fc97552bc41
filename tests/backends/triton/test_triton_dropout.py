"""Dropout inside shrink: one mask for forward and backward, kept as a seed; the share of elements it should keep."""

from __future__ import annotations

import math

import pytest
import torch
from cases import compare, failures, results
from dropout_mask import keep_mask
from strategies import make_case

from mos_kernels import MoSConfig

P = 0.4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ["identity", "tanh"])
@pytest.mark.parametrize("share_a", [True, False])
@pytest.mark.parametrize("own_router", [True, False])
@pytest.mark.one_at_a_time("dtype", "activation", "share_a", "own_router")
def test_dropout_under_the_kernels_own_mask(dtype, activation, share_a, own_router):
    scope = "linear" if own_router else "ffn"
    config = MoSConfig(r=3, activation=activation, share_a=share_a, router_scope=scope)
    case = make_case(config, (70,), d_in=80, own_router=own_router, margin=0.01).to(dtype)
    case = case if own_router else case.replace(router=None)
    tolerated = {"router"} if dtype == torch.bfloat16 else set()  # its logits are of two parts; test_triton_routing
    failed = failures(case, case.upstream(dtype), dropout_p=P, seed=3)
    assert not [line for line in failed if line.split(":")[0] not in tolerated]


@pytest.mark.parametrize("own_router", [True, False])
def test_dropout_equals_the_papers_formula_under_the_kernels_own_mask(own_router):
    """Straight against reference/: the mask is on the adapter's input; norm and routing read the undropped token."""
    scope = "linear" if own_router else "ffn"
    case = make_case(MoSConfig(r=2, router_scope=scope), (6,), d_in=11, own_router=own_router).to(torch.float32)
    keep = keep_mask(case.x.detach(), P, seed=3)
    assert 0 < keep.float().mean() < 1
    kernels = results(case, case.upstream(torch.float32), "triton", dropout_p=P, seed=3)
    wide = case.to(torch.float64)
    truth = wide.results(wide.reference(keep=keep, dropout_p=P), case.upstream(torch.float32).double())
    narrow = case.results(case.reference(keep=keep, dropout_p=P), case.upstream(torch.float32))
    assert not compare(kernels, narrow, truth)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_the_mask_keeps_the_share_it_should(p):
    x = torch.empty(300, 70)
    lost = ~keep_mask(x, p, seed=1)
    deviation = math.sqrt(p * (1 - p) / x.numel())
    assert lost.float().mean().item() == pytest.approx(p, abs=5 * deviation)
    assert (lost.float().mean(0) - p).abs().max() < 5 * deviation * math.sqrt(70)
    assert (lost.float().mean(1) - p).abs().max() < 5 * deviation * math.sqrt(300)


def test_masks_differ_between_calls_and_repeat_with_the_seed():
    x = torch.empty(50, 60)
    masks = [keep_mask(x, P, seed) for seed in (1, 2)]
    assert 0.4 < (masks[0] == masks[1]).float().mean() < 0.65
    assert torch.equal(masks[0], keep_mask(x, P, 1))
    assert torch.equal(masks[0][:20], keep_mask(x[:20], P, 1))  # an element's own index decides, not the batch


def test_two_calls_drop_differently_and_a_seed_repeats_them():
    case = make_case(MoSConfig(r=2), (6,), d_in=11).to(torch.float32)
    torch.manual_seed(0)
    first, second = (case.ours("triton", dropout_p=P).detach() for _ in range(2))
    torch.manual_seed(0)
    assert torch.equal(first, case.ours("triton", dropout_p=P).detach())
    assert not torch.equal(first, second)
