"""Races planted by hand: each is found, in every schedule and by the slow judge too, and gone once it is mended."""

from __future__ import annotations

import pytest
import torch

from . import by_hand, machine
from .judge import judge

SCHEDULES = [machine.EARLY, machine.LATE, machine.Schedule(order="random", seed=3), machine.Schedule(late_copies=True)]
OWN = "mov.b32 %r1, global_smem;\nmad.lo.s32 %r1, %r0, 16, %r1;\n" + by_hand.own_part(1, 4)
"""%r1: 16 bytes of shared memory of the thread's own; %d51: its element of the argument."""
OTHERS = "xor.b32 %r2, %r0, 32;\nmov.b32 %r3, global_smem;\nmad.lo.s32 %r3, %r2, 16, %r3;\n"
"""%r3: the same thread's of the other warp."""
COPY = "cp.async.ca.shared.global [%r1], [%d51], 4, 4;\ncp.async.commit_group;\n"

UNORDERED, FILLED = "two warps, no barrier", "while cp.async fills"
# name: body with {} where the mending instruction goes, that instruction, what is found without it
PLANTED = {
    "read what another warp wrote": (
        "st.shared.b32 [%r1], %r0;\n{}\nld.shared.b32 %r4, [%r3];\n", "bar.sync 0;", UNORDERED),
    "overwrite what another warp read": (
        "st.shared.b32 [%r1], %r0;\nbar.sync 0;\nld.shared.b32 %r4, [%r3];\n{}\nst.shared.b32 [%r1], %r4;\n",
        "bar.sync 0;", UNORDERED),
    "overwrite what another warp wrote": (
        "st.shared.b32 [%r1], %r0;\n{}\nst.shared.b32 [%r3], %r0;\n", "bar.sync 0;", UNORDERED),
    "read what another lane wrote": (
        "st.shared.b32 [%r1], %r0;\n{}\nxor.b32 %r2, %r0, 1;\nmov.b32 %r3, global_smem;\n"
        "mad.lo.s32 %r3, %r2, 16, %r3;\nld.shared.b32 %r4, [%r3];\n", "bar.warp.sync -1;", "two lanes of a warp"),
    "read what other lanes wrote, all the same": (
        "and.b32 %r2, %r0, 62;\nmov.b32 %r3, global_smem;\nmad.lo.s32 %r4, %r2, 16, %r3;\nmov.b32 %r5, 7;\n"
        "st.shared.b32 [%r4], %r5;\n{}\nxor.b32 %r2, %r2, 2;\nmad.lo.s32 %r4, %r2, 16, %r3;\n"
        "ld.shared.b32 %r5, [%r4];\n", "bar.warp.sync -1;", "two lanes of a warp"),
    "read another lane's copy after a wait of one's own": (
        f"{COPY}cp.async.wait_group 0;\n{{}}\nxor.b32 %r2, %r0, 1;\nmov.b32 %r3, global_smem;\n"
        "mad.lo.s32 %r3, %r2, 16, %r3;\nld.shared.b32 %r4, [%r3];\n", "bar.warp.sync -1;", "two lanes of a warp"),
    "read what another warp wrote to global memory": (
        "st.global.b32 [%d51], %r0;\n{}\nmul.wide.u32 %d5, %r2, 4;\nadd.s64 %d5, %d5, %d1;\n"
        "ld.global.b32 %r4, [%d5];\n",
        "bar.sync 0;", "global memory"),
    "read a copy that is under way": (
        f"{COPY}{{}}\nld.shared.b32 %r4, [%r1];\ncp.async.wait_all;\n", "cp.async.wait_group 0;", FILLED),
    "overwrite a copy that is under way": (
        f"{COPY}{{}}\nst.shared.b32 [%r1], %r0;\ncp.async.wait_all;\n", "cp.async.wait_group 0;", FILLED),
    "copy over a copy that is under way": (
        f"{COPY}{{}}\n{COPY}cp.async.wait_all;\n", "cp.async.wait_group 0;", FILLED),
    "wait for one group too few": (
        f"{COPY}cp.async.ca.shared.global [%r1+4], [%d51], 4, 4;\ncp.async.commit_group;\ncp.async.wait_group 1;\n"
        "{}\nld.shared.b32 %r4, [%r1+4];\ncp.async.wait_all;\n", "cp.async.wait_group 0;", FILLED),
    "read another warp's copy after a wait of one's own": (
        f"{COPY}cp.async.wait_group 0;\n{{}}\nld.shared.b32 %r4, [%r3];\n", "bar.sync 0;", UNORDERED),
    "copy over what another warp reads": (
        f"st.shared.b32 [%r1], %r0;\nbar.sync 0;\nld.shared.b32 %r4, [%r3];\n{{}}\n{COPY}cp.async.wait_all;\n",
        "bar.sync 0;", UNORDERED),
}  # fmt: skip


def planted(body: str, schedule: machine.Schedule, grid=(1,), warps=2) -> tuple[str, bool]:
    """What is found, and whether the judge finds a race."""
    memory = torch.zeros(64 * grid[0], dtype=torch.int32)
    result = by_hand.run(OWN + OTHERS + body, [memory], schedule, grid=grid, warps=warps, shared_bytes=2048, trace=True)
    return "\n".join(result.faults()), bool(judge(result))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("name", PLANTED)
def test_planted_races_are_found(name, schedule):
    body, mending, what = PLANTED[name]
    found, judged = planted(body.format(""), schedule)
    assert what in found
    assert judged
    assert planted(body.format(mending), schedule) == ("", False)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_programs_have_no_order(schedule):
    one = "mov.u32 %r5, %ctaid.x;\nst.global.b32 [%d51], %r5;\n"
    found, judged = planted(one, schedule, grid=(2,))
    assert "global memory: two programs" in found and judged
    apart = (
        "mov.u32 %r5, %ctaid.x;\nmul.wide.u32 %d6, %r5, 256;\nadd.s64 %d51, %d51, %d6;\nst.global.b32 [%d51], %r5;\n"
    )
    assert planted(apart, schedule, grid=(2,)) == ("", False)
    read = "ld.global.b32 %r6, [%d1];\n"
    assert "global memory: two programs" in planted(apart + read, schedule, grid=(2,))[0]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_equal_values_may_meet(schedule):
    assert planted("mov.b32 %r3, global_smem;\nst.shared.b32 [%r3], 7;\nst.global.b32 [%d1], 7;\n", schedule) == (
        "",
        False,
    )


def test_replicas_that_differ():
    one_place = "mov.b32 %r3, global_smem;\nshr.u32 %r5, %r0, 5;\nst.shared.b32 [%r3], %r5;\n"
    assert "warps that store the same element at once" in planted(one_place, machine.EARLY)[0]


# addresses


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("ld.global.b32 %r4, [%d51+1024];\n", "outside"), ("st.global.b32 [%d1+-4], %r0;\n", "outside"),
        ("ld.global.v2.b32 {%r4, %r5}, [%d51];\n", "misaligned"), ("ld.shared.b32 %r4, [%r1+4096];\n", "outside"),
        ("st.shared.b32 [%r1+2], %r0;\n", "misaligned"), ("mov.b32 %r1, 0;\nld.shared.b32 %r4, [%r1];\n", "outside"),
        ("cp.async.ca.shared.global [%r1], [%d51+1024], 4, 4;\ncp.async.wait_all;\n", "outside"),
        ("cp.async.cg.shared.global [%r1], [%d51], 16, 16;\ncp.async.wait_all;\n", "misaligned"),
    ],
)  # fmt: skip
def test_addresses_are_checked(body, what):
    assert what in planted(body, machine.EARLY)[0]


def test_what_a_copy_does_not_read_may_lie_outside():
    body = "cp.async.ca.shared.global [%r1], [%d51+1024], 4, 0;\ncp.async.wait_all;\n"
    assert planted(body, machine.EARLY) == ("", False)


def test_shared_memory_begins_as_nothing():
    result = by_hand.run(
        OWN + "ld.shared.b32 %r4, [%r1];\nst.global.b32 [%d51], %r4;\n", [torch.zeros(32)], shared_bytes=512
    )
    assert result.notes() == {"shared memory read that was never written"}


# where a GPU would hang


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("setp.lt.s32 %p1, %r0, 7;\n@%p1 bra $skip;\nbar.sync 0;\n$skip:\n", "some lanes of a warp do not reach"),
        ("setp.lt.s32 %p1, %r0, 32;\n@%p1 bra $skip;\nbar.sync 0;\n$skip:\n", "others wait at a barrier"),
        ("setp.lt.s32 %p1, %r0, 32;\n@%p1 bra $one;\nbar.sync 0;\nbra $end;\n$one:\nbar.sync 0;\n$end:\n",
         "different barriers"),
        ("setp.lt.s32 %p1, %r0, 7;\n@%p1 ret;\n", "return apart"),
        ("setp.lt.s32 %p1, %r0, 7;\n@%p1 bra $skip;\nredux.sync.add.s32 %r5, %r0, -1;\n$skip:\n",
         "apart at an instruction"),
    ],
)  # fmt: skip
def test_what_would_hang_is_refused(body, why):
    with pytest.raises(machine.Failed, match=why):
        planted(body, machine.EARLY)


# wgmma: four warps, 64 by 8, A and B in one kilobyte each


def product(fence="fence.proxy.async.shared::cta;", barrier="bar.sync 0;", registers="wgmma.fence.sync.aligned;",
            before="", during="", wait="wgmma.wait_group.sync.aligned 0;", after="") -> str:  # fmt: skip
    descriptors = (1024 >> 4) | (128 >> 4) << 16 | (256 >> 4) << 32
    accumulators = "{%r100, %r101, %r102, %r103}"
    return f"""mov.b32 %r1, global_smem;
    mad.lo.s32 %r1, %r0, 16, %r1;
    {"".join(f"mov.b32 %r{100 + i}, 0;" for i in range(4))}
    st.shared.v4.b32 [%r1], {{%r100, %r101, %r102, %r103}};
    st.shared.v4.b32 [%r1+2048], {{%r100, %r101, %r102, %r103}};
    {fence}
    {barrier}
    mov.b64 %d5, {descriptors};
    mov.b64 %d6, {descriptors + (2048 >> 4)};
    setp.ne.b32 %p1, 1, 0;
    {before}
    {registers}
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {accumulators}, %d5, %d6, %p1, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned;
    {during}
    {wait}
    {after}
    """


PRODUCTS = {
    "no proxy fence": (product(fence=""), "no proxy fence between a write"),
    "no barrier": (product(barrier=""), UNORDERED),
    "no fence of the registers": (product(registers=""), "since the last wgmma.fence"),
    "an operand overwritten": (product(during="st.shared.b32 [%r1], %r0;\n"), "while a product reads it"),
    "a stage refilled behind a barrier alone": (
        product(during="bar.sync 0;\nst.shared.b32 [%r1+2048], %r0;\n"), "while a product reads it"),
    "overwritten by another warp after a wait of its own": (
        product(after="st.shared.b32 [%r1+2048], %r0;\n"), "no barrier"),
    "an accumulator read too early": (product(during="add.s32 %r5, %r100, 1;\n"), "a register touched"),
    "an accumulator written too early": (product(during="mov.b32 %r101, 0;\n"), "a register touched"),
    "no wait": (
        product(wait="", after="add.s32 %r5, %r103, 1;\nwgmma.wait_group.sync.aligned 0;\n"), "a register touched"),
}  # fmt: skip


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("name", PRODUCTS)
def test_races_with_asynchronous_products(name, schedule):
    body, what = PRODUCTS[name]
    result = by_hand.run(body, [torch.zeros(1)], schedule, warps=4, shared_bytes=4096, trace=True)
    assert what in "\n".join(result.faults())
    assert judge(result)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("fence", ["before the barrier", "after the barrier"])
def test_a_product_without_a_race(fence, schedule):
    proxy = "fence.proxy.async.shared::cta;"
    body = product(fence=proxy) if fence == "before the barrier" else product(fence="", before=proxy)
    result = by_hand.run(body, [torch.zeros(1)], schedule, warps=4, shared_bytes=4096, trace=True)
    assert result.faults() == [] and not judge(result)
