"""tcgen05: products into tensor memory against numpy, and what may not touch them while they are under way."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from . import by_hand, encode, machine
from .operands import halves, laid_out

A, B, ADDRESS, MBARRIER = 0, 16384, 32768, 32776
SHARED = 32784
WAIT = """{
    .reg .pred over;
    again:
    mbarrier.try_wait.parity.shared.b64 over, [%r5], 0;
    @!over bra.uni again;
}
"""


def descriptor(start: int, leading: int, stride: int, swizzle: int) -> int:
    mode = {0: 0, 128: 2, 64: 4, 32: 6}[swizzle]
    return (start >> 4) | (leading >> 4) << 16 | (stride >> 4) << 32 | 1 << 46 | mode << 61


def shape(m: int, n: int, brain: bool, a_rows: bool, b_rows: bool) -> int:
    kinds = 1 << 4 | brain << 7 | brain << 10
    return kinds | (not a_rows) << 15 | (not b_rows) << 16 | (n >> 3) << 17 | (m >> 4) << 24


def fragment(m: int, n: int, accumulators: bool = False) -> tuple[str, str, np.ndarray, np.ndarray]:
    """Shape and split of a load of all of D, and for [register, thread] its row and column."""
    threads = np.arange(128)
    if accumulators:  # as those of mma.sync: two numbers of a row, two of the eighth row below, and eight columns on
        register = np.arange(n // 2)[:, None]
        rows = threads // 32 * 16 + threads % 32 // 4 + register // 2 % 2 * 8
        return f"16x256b.x{n // 8}", "", rows, register // 4 * 8 + threads % 4 * 2 + register % 2
    if m == 128:
        columns = np.arange(n)[:, None] + 0 * threads
        return f"32x32b.x{n}", "", 0 * columns + threads, columns
    half = n // 2
    columns = np.arange(half)[:, None] + threads % 32 // 16 * half
    return f"16x32bx2.x{half}", f", {half}", 0 * columns + threads // 32 * 16 + threads % 16, columns


def body(
    m, n, of_a, of_b, kind, *, wait_store="tcgen05.wait::st.sync.aligned;", fence="fence.proxy.async.shared::cta;",
    barrier="bar.sync 0;", issue="", accumulators=False, wait=WAIT, wait_load="tcgen05.wait::ld.sync.aligned;",
) -> str:  # fmt: skip
    form, split, rows, _ = fragment(m, n, accumulators)
    names = "{" + ", ".join(f"%r{100 + i}" for i in range(len(rows))) + "}"
    text = by_hand.own_part(2, 4) + f"""mov.b32 %r1, global_smem;
    add.s32 %r4, %r1, {ADDRESS};
    add.s32 %r5, %r1, {MBARRIER};
    setp.lt.u32 %p1, %r0, 32;
    setp.eq.u32 %p2, %r0, 0;
    @%p1 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r4], 128;
    @%p2 mbarrier.init.shared::cta.b64 [%r5], 1;
    bar.sync 0;
    ld.shared.b32 %r6, [%r4];
    shl.b32 %r2, %r0, 2;
    add.s32 %r2, %r1, %r2;
    """  # fmt: skip
    for at in range(0, ADDRESS, 512):
        text += f"ld.global.b32 %r3, [%d51+{at}];\nst.shared.b32 [%r2+{at}], %r3;\n"
    for i in range(len(rows)):
        text += f"ld.global.b32 %r{100 + i}, [%d52+{512 * i}];\n"
    text += f"""shr.u32 %r7, %r0, 5;
    shl.b32 %r7, %r7, 21;
    add.s32 %r7, %r7, %r6;
    tcgen05.st.sync.aligned.{form}.b32 [%r7 + 0]{split}, {names};
    {wait_store}
    {fence}
    {barrier}
    mov.b64 %d5, {of_a};
    mov.b64 %d6, {of_b};
    mov.b32 %r8, {kind};
    setp.eq.u32 %p3, 0, 0;
    @%p2 tcgen05.mma.cta_group::1.kind::f16 [ %r6 + 0 ], %d5, %d6, %r8, %p3;
    cvt.u64.u32 %d7, %r5;
    @%p2 tcgen05.commit.cta_group::1.mbarrier::arrive::one.b64 [%d7];
    {issue}
    {wait}
    tcgen05.ld.sync.aligned.{form}.b32 {names}, [%r7 + 0]{split};
    {wait_load}
    """
    for i in range(len(rows)):
        text += f"st.global.b32 [%d52+{512 * i}], %r{100 + i};\n"
    return text


def run(m, n, a_rows, b_rows, swizzle, brain, schedule, **changes) -> tuple[list[str], bool]:
    """Faults, and whether the product is right."""
    rng = np.random.default_rng(3)
    a, a_bits = halves(rng, m, 16, brain=brain)
    b, b_bits = halves(rng, n, 16, brain=brain)
    c = rng.integers(-9, 10, (m, n)).astype(np.float32)
    swizzles = [swizzle if (16 if rows else count) * 2 >= swizzle else 0 for rows, count in ((a_rows, m), (b_rows, n))]
    shared_a, *offsets_a = laid_out(a_bits, a_rows, swizzles[0], B - A)
    shared_b, *offsets_b = laid_out(b_bits, b_rows, swizzles[1], B - A)
    of_a = descriptor(encode.SHARED_BASE + A, *offsets_a, swizzles[0])
    of_b = descriptor(encode.SHARED_BASE + B, *offsets_b, swizzles[1])
    _, _, rows, columns = fragment(m, n, changes.get("accumulators", False))
    operands, values = torch.tensor(np.concatenate([shared_a, shared_b])), torch.tensor(c[rows, columns])
    text = body(m, n, of_a, of_b, shape(m, n, brain, a_rows, b_rows), **changes)
    result = by_hand.run(text, [operands, values], schedule, warps=4, shared_bytes=SHARED)
    return result.faults(), bool((values.numpy() == (a @ b.T + c)[rows, columns]).all())


@pytest.mark.parametrize("schedule", [machine.EARLY, machine.LATE], ids=["early", "late"])
@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
@pytest.mark.parametrize(("a_rows", "b_rows"), [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize(("m", "n"), [(64, 64), (128, 64), (128, 16)])
def test_products_into_tensor_memory(m, n, a_rows, b_rows, swizzle, schedule):
    assert run(m, n, a_rows, b_rows, swizzle, n == 64, schedule) == ([], True)


@pytest.mark.parametrize("n", [32, 64])
def test_products_read_as_accumulators(n):
    assert run(64, n, True, True, 32, True, machine.LATE, accumulators=True) == ([], True)


@pytest.mark.parametrize("schedule", [machine.EARLY, machine.LATE], ids=["early", "late"])
@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"wait_store": ""}, "before a store to it was waited for"),
        ({"barrier": ""}, "no barrier between"),
        ({"fence": ""}, "no proxy fence between a write"),
        ({"wait": ""}, "tensor memory touched while a product uses it"),
        ({"wait_load": ""}, "a register touched"),
        ({"issue": "st.shared.b32 [%r2+0], %r0;"}, "while a product reads it"),
        ({"issue": "bar.sync 0;\nst.shared.b32 [%r2+16384], %r0;"}, "while a product reads it"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_what_may_not_touch_a_product_under_way(changes, what, schedule):
    faults, _ = run(64, 64, True, True, 32, True, schedule, **changes)
    assert any(what in fault for fault in faults), faults


def test_a_wait_that_nobody_ends_is_refused():
    start = f"mov.b32 %r5, global_smem;\nadd.s32 %r5, %r5, {MBARRIER};\nsetp.eq.u32 %p2, %r0, 0;\n"
    start += "@%p2 mbarrier.init.shared::cta.b64 [%r5], 1;\nbar.sync 0;\n"
    with pytest.raises(machine.Failed, match="whose phase nobody ends"):
        by_hand.run(start + WAIT, [torch.zeros(1)], warps=2, shared_bytes=SHARED)
