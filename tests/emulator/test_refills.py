"""Shared memory filled anew while a wgmma reads it: where Triton does so, and that its IR shows what is found.

docs/compiled-code.md says why Triton does, and the rule that keeps the package's kernels from it.
"""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from mos_kernels.backends.triton import compiled

from . import compilation, machine

sys.path[:0] = [str(Path(__file__).parents[1] / "compile")]
from refills import refilled  # noqa: E402

activated, shrink = (importlib.import_module(f"mos_kernels.backends.triton.{name}") for name in ("activated", "shrink"))


@triton.jit
def product_and_sums(x, w, y, sums, D, M: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, SUMS: tl.constexpr):
    """y = x @ w, and the sums of the rows of x. The smallest kernel of this kind."""
    m, n = tl.arange(0, M), tl.arange(0, N)
    total, row_sums = tl.zeros([M, N], tl.float32), tl.zeros([M], tl.float32)
    for start in range(0, D, BLOCK):
        o = start + tl.arange(0, BLOCK)
        b_x = tl.load(x + m[:, None] * D + o[None, :])
        total = tl.dot(b_x, tl.load(w + o[:, None] * N + n[None, :]), total)
        if SUMS:
            row_sums += tl.sum(b_x.to(tl.float32), 1)
    tl.store(y + m[:, None] * N + n[None, :], total)
    tl.store(sums + m, row_sums)


def smallest(stages: int, sums: bool) -> tuple:
    x, w = torch.randn(64, 512).bfloat16(), torch.randn(512, 32).bfloat16()
    y, of_rows = torch.full((64, 32), torch.nan), torch.full((64,), torch.nan)
    constants = {"M": 64, "N": 32, "BLOCK": 64, "SUMS": sums, "num_warps": 4, "num_stages": stages}
    return product_and_sums, (1,), (x, w, y, of_rows, 512), constants, y, x.double() @ w.double()


def of_shrink(stages: int, warps: int, ahead: bool) -> tuple:
    T, D, R, E = 64, 1024, 16, 8
    x, stack = torch.randn(T, D).bfloat16(), torch.randn(R + 2 * E, D).bfloat16()
    p, n, logits = torch.full((1, T, R), torch.nan), torch.empty(1, T), torch.empty(1, T, 2 * E)
    constants = {
        "R": R, "E": E, "BLOCK_T": 64, "BLOCK_D": 128, "BLOCK_C": 32, "SPLITS": 1, "SPLIT_ROUTER": True,
        "DROPOUT": False, "PAIR": False, "STACKED": True, "AHEAD": ahead, "num_warps": warps, "num_stages": stages,
    }  # fmt: skip
    arguments = (x, x, x, x, stack, p, n, logits, x, T, D, D, 0.0)
    return shrink.shrink_kernel, (1, 1, 1), arguments, constants, p, (x.double() @ stack[:R].double().T)[None]


def of_shrink_backward(stages: int) -> tuple:
    R, E, T, D, block = 32, 8, 520, 64, 32
    x, A, router = torch.randn(T, D).bfloat16(), torch.randn(R, D), torch.randn(E, D)
    dp, dn, dlogits = torch.randn(T, R), torch.randn(T), torch.randn(T, E)
    dx, planes = torch.full((T, D), torch.nan).bfloat16(), torch.full((1, R + E, D), torch.nan)
    constants = {
        "R": R, "E": E, "BLOCK_T": 32, "BLOCK_D": block, "BLOCK_C": 64, "SPLITS": 1, "NEEDS_DX": True, "NEEDS_DW": True,
        "DROPOUT": False, "COLUMN_BLOCKS": 1, "PAIR": False, "num_warps": 8, "num_stages": stages,
    }  # fmt: skip
    arguments = (x, A, A, router, dp, dn, dlogits, dx, planes, x, T, D, D, 0.0)
    truth = torch.cat([dp, dlogits], 1).bfloat16().double().T @ x.double()
    return shrink.shrink_backward_kernel, (D // block, 1, 1), arguments, constants, planes, truth[None]


def of_activated_weight(stages: int, tokens: int) -> tuple:
    T, N, E, r = 4 * tokens, 64, 2, 8
    h, dy, B = torch.randn(E, T, r).bfloat16(), torch.randn(T, N).bfloat16(), torch.randn(N, E, r).bfloat16()
    c, d, dB = torch.randn(E, T), torch.zeros(E, T), torch.full((1, N, E, r), torch.nan)
    constants = {
        "E": E, "r": r, "BLOCK_T": tokens, "BLOCK_N": 64, "BLOCK_R": 16, "SPLITS": 1, "PAIR": True,
        "ACTIVATION": activated.CODES["silu"], "num_warps": 4, "num_stages": stages,
    }  # fmt: skip
    v = torch.einsum("etr,ner->etn", h.double(), B.double())
    slope = v.sigmoid() * (1 + v * (1 - v.sigmoid()))
    dv = c[:, :, None].double() * dy.double() * slope
    arguments = (dy, h, B, c, d, dB, T, N, N)
    kernel = activated.activated_weight_kernel
    return kernel, (1, 1, 1), arguments, constants, dB, torch.einsum("etn,etr->ner", dv, h.double())[None]


def ir(kernel, arguments: tuple, constants: dict, architecture: str) -> str:
    described = compiled._describe(kernel, arguments, dict(constants))
    return compiled.compile_launch(described, architecture).asm["ttgir"]


pytestmark = pytest.mark.budget(15)
EARLY = "a register touched while a wgmma, or a load of tensor memory, uses it"
"""Of sm_100, and no matter here: docs/compiled-code.md."""
CASES = [
    *((smallest, (stages, sums)) for stages in (1, 2, 3) for sums in (False, True)),
    *((of_shrink, (stages, warps, ahead)) for stages, warps in ((2, 4), (3, 8)) for ahead in (False, True)),
    *((of_shrink_backward, (stages,)) for stages in (1, 2, 3)),
    *((of_activated_weight, (stages, tokens)) for stages in (1, 2) for tokens in (16, 64)),
]
WRONG = {
    (smallest, (2, True)), (smallest, (3, True)), (of_shrink, (2, 4, False)), (of_shrink, (3, 8, False)),
    (of_shrink_backward, (2,)), (of_shrink_backward, (3,)), (of_activated_weight, (2, 16)),
}  # fmt: skip
"""On sm_90."""


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, (case[0].__name__, *case[1]))))
def test_a_tile_that_is_read_into_registers_too_has_a_buffer_too_few_for_wgmma(case, architecture):
    make, options = case
    wrong, errors = case in WRONG and architecture == "sm_90", []
    for schedule in (machine.EARLY, machine.LATE, machine.Schedule(late_products=True)):
        torch.manual_seed(0)
        kernel, grid, arguments, constants, output, truth = make(*options)
        result = compilation.launch(kernel, grid, arguments, constants, architecture, schedule)
        errors.append(((output.double() - truth).abs().max() / truth.abs().max()).item())
        faults = [one for one in result.faults() if not (architecture == "sm_100" and one.startswith(EARLY))]
        assert any("while a product reads it" in one for one in faults) if wrong else faults == []
    assert bool(refilled(ir(kernel, arguments, constants, architecture))) == wrong
    if wrong:
        assert not errors[-1] < 0.1  # and it would be seen in the numbers
    else:
        assert max(errors) < 0.005


@pytest.mark.parametrize(("architecture", "wait"), [("sm_90", "warp_group_dot_wait"), ("sm_100", "wait_barrier")])
def test_a_wait_taken_out_of_the_ir_is_noticed(architecture, wait):
    kernel, _, arguments, constants, *_ = smallest(3, False)
    lines = ir(kernel, arguments, constants, architecture).splitlines()
    assert refilled("\n".join(lines)) == []
    without = [re.sub(r"pendings = \d", "pendings = 9", line) for line in lines]  # a wait for nothing
    without = [line for line in without if wait != "wait_barrier" or wait not in line]
    assert without != lines and refilled("\n".join(without)) != []
