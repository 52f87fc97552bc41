"""shrink in Triton's interpreter: the forms that are there for speed give the bits of the plain one; overflows show."""

from __future__ import annotations

import pytest
import torch
from strategies import normal
from test_precision import assert_a_gradient_scaler_skips_the_step, assert_overflows_show

from mos_kernels.backends.triton import launch
from mos_kernels.backends.triton.expand import gram_launch
from mos_kernels.backends.triton.shrink import shrink_launch
from mos_kernels.backends.triton.shrink import stacked as what_is_kept

E, D, R = 3, 70, 5
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@pytest.fixture
def tiled(monkeypatch):
    """Tiles of 32 columns of x, whatever the form, so that sums have one order; returns how x is loaded."""
    chosen, settings = {"BLOCK_D": 32}, launch.settings

    def of(kernel: str, device: torch.device, T: int) -> dict:
        return {**settings(kernel, device, T), **chosen} if kernel == "shrink" else settings(kernel, device, T)

    monkeypatch.setattr(launch, "settings", of)
    return chosen


def shrunk(dtype: torch.dtype, pair: bool, routed: bool, stacked: bool = False) -> list[torch.Tensor]:
    x, As = normal(0, 9, D).to(dtype), [normal(1 + i, R, D).float() for i in range(2 if pair else 1)]
    router = normal(3, E, D).float() if routed else None
    stack = None
    if stacked:
        Bs = [normal(4, 6, 2, R).float() for _ in range(len(As) + 1)]
        stack = gram_launch(Bs, dtype, True, As, router, dtype)[2]
        assert torch.equal(stack, what_is_kept(As, router, dtype)) and stack.isfinite().all()
    found = shrink_launch(x, As[0], router, None, 0.0, True, *(As[1:] or [None]), stack)
    assert all(t.isfinite().all() for t in found)
    return list(found)


@dtypes
@pytest.mark.parametrize("pair", [True, False])
@pytest.mark.parametrize("routed", [True, False])
def test_a_stack_changes_no_bit(tiled, dtype, pair, routed):
    for direct, stacked in zip(shrunk(dtype, pair, routed), shrunk(dtype, pair, routed, True), strict=True):
        assert torch.equal(direct, stacked)


@dtypes
@pytest.mark.parametrize("stacked", [True, False])
def test_loading_x_ahead_changes_no_bit(tiled, dtype, stacked):
    found = []
    for tiled["AHEAD"] in (0, 1):
        found.append(shrunk(dtype, True, True, stacked))
    assert all(torch.equal(plain, ahead) for plain, ahead in zip(*found, strict=True))


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")
def test_gradients_that_float16_cannot_hold_are_infinite():
    assert_overflows_show("triton")


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")
@pytest.mark.parametrize("activation", ["identity", "gelu"])
def test_a_gradient_scaler_skips_the_step_of_an_overflow(activation):
    assert_a_gradient_scaler_skips_the_step("triton", activation)
