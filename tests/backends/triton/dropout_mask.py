"""The elements that the kernels' dropout keeps, read out by a kernel of the tests."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mos_kernels.backends import triton as backend
from mos_kernels.backends.triton.numerics import keep


@triton.jit
def keep_kernel(seed, kept, T, D, p, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    o_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (o_t[:, None] < T) & (o_d[None, :] < D)
    found = keep(seed, o_t, tl.program_id(1) * BLOCK_D, p, BLOCK_D)
    tl.store(kept + o_t[:, None] * D + o_d[None, :], found.to(tl.int8), mask=mask)


def keep_mask(x: Tensor, p: float, seed: int) -> Tensor:
    """Which elements of x (T, d_in) survive in a call made after torch.manual_seed(seed). (T, d_in) bool."""
    torch.manual_seed(seed)
    drawn = backend.draw_dropout(x, p)
    kept = torch.zeros(x.shape, dtype=torch.int8, device=x.device)
    if x.numel():
        grid = (triton.cdiv(x.shape[0], 16), triton.cdiv(x.shape[1], 64))
        keep_kernel[grid](drawn.state, kept, *x.shape, p, BLOCK_T=16, BLOCK_D=64)
    return kept.bool()


def packed(kept: Tensor) -> Tensor:
    """The mask as the eager backend keeps it: a bit an element, (T, ceil(d_in / 8)) uint8."""
    padded = torch.nn.functional.pad(kept, (0, -kept.shape[-1] % 8)).unflatten(-1, (-1, 8))
    values = 2 ** torch.arange(8, device=kept.device)
    return (padded * values).sum(-1).to(torch.uint8)
