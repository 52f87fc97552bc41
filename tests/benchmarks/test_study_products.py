"""The study's products in bfloat16, in a process of their own: what is replaced there is replaced for all of it."""

from __future__ import annotations

import multiprocessing

import pytest
import torch
from torch import Tensor, nn

from benchmarks.study import products

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _products(dtype: torch.dtype, exact: bool) -> list[Tensor]:
    """Every product that is replaced, of the same numbers in each dtype; in float64 with `exact`."""
    torch.manual_seed(0)
    a, b, added, bias = (
        torch.randn(shape).to(dtype).to(torch.float64 if exact else dtype)
        for shape in ((5, 70), (70, 33), (5, 33), (33,))
    )
    x, weight = a.clone().requires_grad_(), b.t().contiguous().requires_grad_()
    nn.functional.linear(x, weight, bias).backward(added)
    batch = a.expand(3, -1, -1), b.expand(3, -1, -1)
    results = [
        a @ b, torch.addmm(bias, a, b, beta=0.5, alpha=2), added.clone().addmm_(a, b), torch.bmm(*batch),
        torch.baddbmm(added, *batch, beta=2, alpha=0.5), x.grad, weight.grad, a[:0] @ b, a[:, :0] @ b[:0],
    ]  # fmt: skip
    return [result.detach() for result in results]


def _report(queue) -> None:
    torch.set_num_threads(1)
    exact = {dtype: _products(dtype, exact=True) for dtype in DTYPES}
    native = {dtype: _products(dtype, exact=False) for dtype in DTYPES}
    assert products.kind() == products.NATIVE
    products.widen()
    assert products.kind() == products.WIDENED
    widened = {dtype: _products(dtype, exact=False) for dtype in DTYPES}
    queue.put([[[(t.dtype, t.double().tolist()) for t in ts[d]] for d in DTYPES] for ts in (exact, native, widened)])


@pytest.fixture(scope="module")
def reported() -> dict[torch.dtype, tuple]:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_report, args=(queue,))
    process.start()
    found = queue.get(timeout=300)
    process.join()
    return {dtype: tuple(kind[i] for kind in found) for i, dtype in enumerate(DTYPES)}


def test_a_widened_product_is_rounded_once_as_with_the_instructions(reported):
    for (_, exact), (_, native), (dtype, widened) in zip(*reported[torch.bfloat16], strict=True):
        assert dtype == torch.bfloat16
        exact, native, widened = (torch.tensor(values, dtype=torch.float64) for values in (exact, native, widened))
        assert widened.shape == native.shape
        if exact.numel():
            assert (widened - exact).abs().max() <= 1.01 * (native - exact).abs().max()


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_no_other_dtype_changes(reported, dtype):
    _, native, widened = reported[dtype]
    assert widened == native
