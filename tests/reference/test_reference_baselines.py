"""The baselines of reference/: each is a Euclidean case of the layer."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from reference.baselines import (
    hydralora_linear,
    lora_linear,
    mixture_of_lora_linear,
)
from reference.layer import mos_linear

T, D_IN, D_OUT, R, E = 3, 4, 5, 2, 3


def case(seed: int, share_a: bool = True):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(T, D_IN), (D_OUT, D_IN), (D_OUT,), (R, D_IN) if share_a else (E, R, D_IN), (D_OUT, E, R), (E, D_IN)]
    return [torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]


def assert_same(actual, expected, inputs):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    dy = torch.ones_like(actual).cumsum(-1)
    for a, b in zip(*(torch.autograd.grad(y, inputs, dy) for y in (actual, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@given(st.integers(0, 2**31 - 1), st.booleans(), st.integers(1, E), st.booleans())
def test_mixture_of_lora_is_the_flat_layer(seed, share_a, k, norm_topk_prob):
    *inputs, router = case(seed, share_a)
    options = {"router": router, "scaling": 2.0, "num_experts_per_tok": k, "norm_topk_prob": norm_topk_prob}
    expected = mos_linear(*inputs, torch.zeros(E), **options)
    assert_same(mixture_of_lora_linear(*inputs, **options), expected, [*inputs, router])


@given(st.integers(0, 2**31 - 1))
def test_hydralora_is_the_dense_flat_layer_with_one_A(seed):
    *inputs, router = case(seed)
    x, weight, bias, A, B = inputs
    expected = mos_linear(
        *inputs, torch.zeros(E), router=router, num_experts_per_tok=E, norm_topk_prob=False, scaling=2.0
    )
    actual = hydralora_linear(*inputs, router, scaling=2.0)
    assert_same(actual, expected, [*inputs, router])
    mixed = torch.einsum("te,oer->tor", (x @ router.T).softmax(-1), B)
    torch.testing.assert_close(actual, F.linear(x, weight, bias) + 2 * torch.einsum("tor,tr->to", mixed, x @ A.T))


@given(st.integers(0, 2**31 - 1))
def test_lora_drops_the_adapters_input_alone(seed):
    x, weight, bias, A, B, _ = case(seed)
    keep = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    expected = F.linear(x, weight, bias) + 2 * F.linear(torch.where(keep, x / 0.5, 0), B[:, 0] @ A)
    assert_same(lora_linear(x, weight, bias, A, B[:, 0], scaling=2.0, dropout_p=0.5, keep=keep), expected, [x, A, B])
