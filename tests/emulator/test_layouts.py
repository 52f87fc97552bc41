"""Instructions of a whole warp against their published layouts: shuffles, ldmatrix, mma, wgmma with its descriptors."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from . import by_hand, encode, machine
from .operands import halves, laid_out

LANES = np.arange(32)
LATE = machine.LATE


def lanes(values) -> torch.Tensor:
    return torch.tensor(np.asarray(values, dtype=np.int64).astype(np.uint32).view(np.int32))


def one_result(body: str, *inputs, outputs: int = 1, warps: int = 1, **options) -> np.ndarray:
    """[outputs, threads] of what %r100, %r101 … hold at the end; the inputs' lanes are %r10, %r11 …"""
    read = by_hand.own_part(len(inputs) + 1, 4)
    read += "".join(f"ld.global.b32 %r{10 + i}, [%d{51 + i}];\n" for i in range(len(inputs)))
    to = 51 + len(inputs)
    write = "".join(f"st.global.b32 [%d{to}+{128 * warps * i}], %r{100 + i};\n" for i in range(outputs))
    found = torch.zeros(outputs, 32 * warps, dtype=torch.int32)
    arguments = [*(lanes(x) for x in inputs), found]
    result = by_hand.run(read + body + write, arguments, warps=warps, **options)
    assert result.faults() == []
    return found.numpy().view(np.uint32)


# between lanes


@pytest.mark.parametrize("kind", ["bfly", "idx", "up", "down"])
@pytest.mark.parametrize("segment", [32, 8])
def test_shuffles(kind, segment):
    values, by = LANES * 7 + 1, 3
    control = (32 - segment) << 8 | (0 if kind == "up" else 31)
    body = f"shfl.sync.{kind}.b32 %r100|%p1, %r10, {by}, {control}, -1;\nselp.b32 %r101, 1, 0, %p1;\n"
    found, valid = one_result(body, values, outputs=2)
    start = LANES // segment * segment
    source = {"bfly": LANES ^ by, "idx": start + by, "up": LANES - by, "down": LANES + by}[kind]
    inside = (source >= start) & (source < start + segment)
    assert (valid == inside).all()
    assert (found == values[np.where(inside, source, LANES)]).all()


@pytest.mark.parametrize(
    ("instruction", "of"),
    [
        ("redux.sync.add.s32", lambda x: x.sum()), ("redux.sync.min.s32", np.min), ("redux.sync.max.s32", np.max),
        ("redux.sync.min.u32", lambda x: x.astype(np.uint32).min()),
        ("redux.sync.max.u32", lambda x: x.astype(np.uint32).max()),
        ("redux.sync.and.b32", np.bitwise_and.reduce), ("redux.sync.or.b32", np.bitwise_or.reduce),
        ("redux.sync.xor.b32", np.bitwise_xor.reduce),
    ],
)  # fmt: skip
def test_reductions_of_a_warp(instruction, of):
    values = ((LANES * 2654435761) % 1000 - 500).astype(np.int32)
    found = one_result(f"{instruction} %r100, %r10, -1;\n", values)
    assert (found == np.uint32(np.int64(of(values)) & 0xFFFFFFFF)).all()


@pytest.mark.parametrize("true", [0, 0xFFFFFFFF, 0x80000001])
def test_votes_and_the_elected_lane(true):
    bits = true >> LANES & 1
    body = """setp.ne.s32 %p1, %r10, 0;
    vote.sync.ballot.b32 %r100, %p1, -1;
    vote.sync.any.pred %p2, %p1, -1;
    vote.sync.all.pred %p3, %p1, -1;
    elect.sync %r103|%p4, -1;
    selp.b32 %r101, 1, 0, %p2;
    selp.b32 %r102, 1, 0, %p3;
    selp.b32 %r103, 1, 0, %p4;\n"""
    ballot, some, every, elected = one_result(body, bits, outputs=4)
    assert (ballot == true).all() and (some == bits.any()).all() and (every == bits.all()).all()
    assert elected.sum() == 1


# control


def test_lanes_that_part_meet_again():
    """Two branches, a loop of a different length for every lane, and guards: then all lanes vote together."""
    body = """and.b32 %r1, %r10, 1;
    setp.eq.s32 %p1, %r1, 0;
    mov.b32 %r2, 0;
    @%p1 bra $even;
    add.s32 %r2, %r2, 1000;
    bra $join;
$even:
    setp.gt.s32 %p2, %r10, 20;
    @!%p2 add.s32 %r2, %r2, 1;
$join:
    mov.b32 %r3, 0;
$loop:
    add.s32 %r2, %r2, 2;
    add.s32 %r3, %r3, 1;
    setp.le.s32 %p3, %r3, %r10;
    @%p3 bra $loop;
    mov.b32 %r100, %r2;
    redux.sync.add.s32 %r101, %r2, -1;\n"""
    found, total = one_result(body, LANES, outputs=2)
    wanted = np.where(LANES % 2, 1000, (LANES <= 20).astype(int)) + 2 * (LANES + 1)
    assert (found == wanted).all() and (total == wanted.sum()).all()


def test_where_a_thread_is():
    body = """mov.u32 %r1, %ctaid.x;
    mov.u32 %r2, %ctaid.y;
    mov.u32 %r3, %nctaid.x;
    mad.lo.s32 %r1, %r2, %r3, %r1;
    mul.wide.u32 %d8, %r1, 256;
    add.s64 %d51, %d51, %d8;
    mov.u32 %r4, %laneid;
    mad.lo.s32 %r4, %r0, 100, %r4;
    mad.lo.s32 %r4, %r1, 10000, %r4;
    st.global.b32 [%d51], %r4;\n"""
    found = torch.zeros(6, 64, dtype=torch.int32)
    assert by_hand.run(by_hand.own_part(1, 4) + body, [found], grid=(3, 2), warps=2).faults() == []
    threads = torch.arange(64)
    assert (found == threads * 100 + threads % 32 + torch.arange(6)[:, None] * 10000).all()


# loads and stores


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize(("bits", "count"), [(8, 1), (16, 1), (32, 1), (64, 1), (16, 2), (32, 2), (32, 4), (64, 2)])
def test_widths_of_loads_and_stores(space, bits, count):
    size = bits * count // 8
    register = {8: "%h", 16: "%h", 32: "%r", 64: "%d"}[bits]
    names = [f"{register}{40 + i}" for i in range(count)]
    group = "{" + ", ".join(names) + "}" if count > 1 else names[0]
    vector = f".v{count}" if count > 1 else ""
    body = by_hand.own_part(2, size) + f"ld.global{vector}.b{bits} {group}, [%d51];\n"
    if space == "shared":
        body += (
            f"mov.b32 %r1, global_smem;\nmad.lo.s32 %r1, %r0, {size}, %r1;\nst.shared{vector}.b{bits} [%r1], {group};\n"
        )
        body += f"bar.warp.sync -1;\nld.shared{vector}.b{bits} {group}, [%r1+0];\n"
    body += f"st.global{vector}.b{bits} [%d52], {group};\n"
    source = torch.randint(0, 256, (32, size), dtype=torch.uint8)
    found = torch.zeros_like(source)
    assert by_hand.run(body, [source, found], shared_bytes=32 * size).faults() == []
    assert torch.equal(source, found)


@pytest.mark.parametrize("kind", ["s8", "u8", "s16", "u16"])
def test_narrow_loads_extend(kind):
    source = torch.randint(-128, 128, (32, int(kind[1:]) // 8), dtype=torch.int8)
    body = by_hand.own_part(1, source.shape[1]) + f"ld.global.{kind} %r100, [%d51];\n"
    body += "mul.wide.u32 %d5, %r0, 4;\nadd.s64 %d5, %d5, %d2;\nst.global.b32 [%d5], %r100;\n"
    found = torch.zeros(32, dtype=torch.int32)
    assert by_hand.run(body, [source, found]).faults() == []
    wanted = source.numpy().view({"s8": np.int8, "u8": np.uint8, "s16": np.int16, "u16": np.uint16}[kind])[:, 0]
    assert (found.numpy() == wanted.astype(np.int32)).all()


@pytest.mark.parametrize("bits", [16, 32])
def test_registers_in_parts_and_together(bits):
    whole, wide = ("%r20", "b32") if bits == 16 else ("%d20", "b64")
    part = "%h" if bits == 16 else "%r"
    body = f"mov.{wide} {whole}, {{{part}50, {part}51}};\nmov.{wide} {{{part}52, {part}53}}, {whole};\n"
    if bits == 16:
        body = "cvt.u16.u32 %h50, %r10;\ncvt.u16.u32 %h51, %r11;\n" + body
        body += "cvt.u32.u16 %r100, %h52;\ncvt.u32.u16 %r101, %h53;\n"
    else:
        body = "mov.b32 %r50, %r10;\nmov.b32 %r51, %r11;\n" + body + "mov.b32 %r100, %r52;\nmov.b32 %r101, %r53;\n"
    low, high = LANES * 3 + 7, LANES + 60000
    assert (one_result(body, low, high, outputs=2) == np.stack([low, high])).all()


@pytest.mark.parametrize("schedule", [machine.EARLY, LATE], ids=["early", "late"])
@pytest.mark.parametrize(("size", "real"), [(4, 4), (8, 3), (16, 16), (16, 0)])
def test_asynchronous_copies(schedule, size, real):
    """What was not asked for is zero; a second group may still be under way when the first is waited for."""
    body = by_hand.own_part(2, size) + f"""mov.b32 %r1, global_smem;
    mad.lo.s32 %r1, %r0, {size}, %r1;
    cp.async.ca.shared.global [%r1], [%d51], {size}, {real};
    cp.async.commit_group;
    cp.async.ca.shared.global [%r1+{32 * size}], [%d51], {size}, {real};
    cp.async.commit_group;
    cp.async.wait_group 1;
    """  # fmt: skip
    for at in range(0, size, 4):
        body += f"ld.shared.b32 %r5, [%r1+{at}];\nst.global.b32 [%d52+{at}], %r5;\n"
    body += "cp.async.wait_all;\n"
    source = torch.randint(1, 256, (32, size), dtype=torch.uint8)
    found = torch.full_like(source, 7)
    assert by_hand.run(body, [source, found], schedule, shared_bytes=64 * size).faults() == []
    assert torch.equal(found[:, :real], source[:, :real]) and not found[:, real:].any()


# matrices of 8 by 8


def fragment(matrix: np.ndarray) -> np.ndarray:
    """[32] registers of an 8 by 8 matrix of 16-bit numbers: lane l has row l // 4, columns 2 (l % 4) and the next."""
    pairs = matrix.reshape(8, 4, 2).astype(np.uint32)
    return (pairs[..., 0] | pairs[..., 1] << 16).reshape(32)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_matrices_from_and_to_shared_memory(count, transposed):
    matrices = np.random.default_rng(0).integers(0, 65536, (count, 8, 8))
    rows = matrices.reshape(count * 8, 8)
    words = [np.zeros(32, np.uint32) for _ in range(4)]
    for i in range(4):
        words[i][: count * 8] = rows[:, 2 * i] | rows[:, 2 * i + 1] << 16
    name = "{" + ", ".join(f"%r{100 + i}" for i in range(count)) + "}"
    trans = ".trans" if transposed else ""
    body = (
        "mov.b32 %r1, global_smem;\nmad.lo.s32 %r1, %r0, 16, %r1;\nst.shared.v4.b32 [%r1], {%r10, %r11, %r12, %r13};\n"
    )
    body += f"bar.warp.sync -1;\nldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {name}, [%r1];\n"
    body += f"stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r1+512], {name};\nbar.warp.sync -1;\n"
    again = "{" + ", ".join(f"%r{100 + count + i}" for i in range(4)) + "}"
    body += f"setp.lt.s32 %p1, %r0, {8 * count};\n@%p1 ld.shared.v4.b32 {again}, [%r1+512];\n"
    found = one_result(body, *words, outputs=count + 4, shared_bytes=1024)
    for i in range(count):
        assert (found[i] == fragment(matrices[i].T if transposed else matrices[i])).all()
    for i in range(4):
        assert (found[count + i][: 8 * count] == words[i][: 8 * count]).all()


@pytest.mark.parametrize("kind", ["bf16", "f16"])
@pytest.mark.parametrize("k", [8, 16])
def test_products_of_a_warp(kind, k):
    rng = np.random.default_rng(1)
    a, a_bits = halves(rng, 16, k, brain=kind == "bf16")
    b, b_bits = halves(rng, k, 8, brain=kind == "bf16")
    c = rng.integers(-9, 10, (16, 8)).astype(np.float32)
    of_a = [fragment(a_bits[8 * i : 8 * i + 8, 8 * j : 8 * j + 8]) for j in range(k // 8) for i in range(2)]
    of_b = [fragment(b_bits[8 * j : 8 * j + 8].T) for j in range(k // 8)]
    of_c = [c[LANES // 4 + 8 * i, 2 * (LANES % 4) + j].view(np.uint32) for i in range(2) for j in range(2)]
    inputs = [*of_a, *of_b, *of_c]
    names = [f"%r{10 + i}" for i in range(len(inputs))]
    cut = [names[: len(of_a)], names[len(of_a) : -4], names[-4:]]
    groups = ", ".join("{" + ", ".join(group) + "}" for group in cut)
    body = f"mma.sync.aligned.m16n8k{k}.row.col.f32.{kind}.{kind}.f32 {{%r100, %r101, %r102, %r103}}, {groups};\n"
    found = one_result(body, *inputs, outputs=4).view(np.float32)
    wanted = a @ b + c
    for q, (i, j) in enumerate(itertools.product(range(2), range(2))):
        assert (found[q] == wanted[LANES // 4 + 8 * i, 2 * (LANES % 4) + j]).all()


# wgmma


def descriptor(start: int, leading: int, stride: int, swizzle: int) -> int:
    mode = {0: 0, 128: 1, 64: 2, 32: 3}[swizzle]
    return (start >> 4) | (leading >> 4) << 16 | (stride >> 4) << 32 | mode << 62


SWIZZLES = [0, 32, 64, 128]


@pytest.mark.parametrize("schedule", [machine.EARLY, LATE], ids=["early", "late"])
@pytest.mark.parametrize(
    ("a_from", "b_rows", "swizzle", "n", "kind"),
    [
        *((a, b, swizzle, 64, "bf16") for a in ("rows", "columns") for b in (True, False) for swizzle in SWIZZLES),
        *((a, True, 128, n, "f16") for a in ("registers", "rows", "columns") for n in (8, 64, 256)),
    ],
)
def test_asynchronous_products(a_from, b_rows, swizzle, n, kind, schedule):
    rng, brain = np.random.default_rng(2), kind == "bf16"
    a, a_bits = halves(rng, 64, 16, brain=brain)
    b, b_bits = halves(rng, n, 16, brain=brain)  # [n, k]
    c = rng.integers(-9, 10, (64, n)).astype(np.float32)
    size, a_rows = 16384, a_from != "columns"
    fits = lambda rows, count: swizzle == 0 or (16 if rows else count) * 2 >= swizzle  # noqa: E731
    swizzle_a, swizzle_b = (s if ok else 0 for s, ok in ((swizzle, fits(a_rows, 64)), (swizzle, fits(b_rows, n))))
    shared_a, *offsets_a = laid_out(a_bits, a_rows, swizzle_a, size)
    shared_b, *offsets_b = laid_out(b_bits, b_rows, swizzle_b, size)
    of_b = descriptor(encode.SHARED_BASE + size, *offsets_b, swizzle_b)
    of_a = descriptor(encode.SHARED_BASE, *offsets_a, swizzle_a)
    threads = np.arange(128)
    row = threads // 32 * 16 + threads % 32 // 4
    column = 2 * (threads % 4)
    inputs = torch.tensor(np.concatenate([shared_a, shared_b]))
    accumulators = torch.tensor(np.stack([c[row + i // 2 % 2 * 8, column + i // 4 * 8 + i % 2] for i in range(n // 2)]))
    pairs = a_bits.reshape(64, 8, 2)
    words = pairs[..., 0] | pairs[..., 1] << 16
    in_registers = np.stack([words[row + i % 2 * 8, threads % 4 + i // 2 * 4] for i in range(4)]).astype(np.uint32)
    body = "mov.b32 %r1, global_smem;\nshl.b32 %r2, %r0, 2;\nadd.s32 %r1, %r1, %r2;\n" + by_hand.own_part(3, 4)
    for at in range(0, 2 * size, 512):
        body += f"ld.global.b32 %r3, [%d51+{at}];\nst.shared.b32 [%r1+{at}], %r3;\n"
    for i in range(n // 2):
        body += f"ld.global.b32 %r{100 + i}, [%d52+{512 * i}];\n"
    for i in range(4):
        body += f"ld.global.b32 %r{20 + i}, [%d53+{512 * i}];\n"
    body += f"fence.proxy.async.shared::cta;\nbar.sync 0;\nmov.b64 %d5, {of_a};\nmov.b64 %d6, {of_b};\n"
    results = "{" + ", ".join(f"%r{100 + i}" for i in range(n // 2)) + "}"
    left = "{%r20, %r21, %r22, %r23}" if a_from == "registers" else "%d5"
    flags = f", {int(not b_rows)}" if a_from == "registers" else f", {int(not a_rows)}, {int(not b_rows)}"
    body += f"""wgmma.fence.sync.aligned;
    setp.ne.b32 %p1, 1, 0;
    wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{kind}.{kind} {results}, {left}, %d6, %p1, 1, 1{flags};
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    """
    for i in range(n // 2):
        body += f"st.global.b32 [%d52+{512 * i}], %r{100 + i};\n"
    of_registers = torch.tensor(in_registers.view(np.int32))
    result = by_hand.run(body, [inputs, accumulators, of_registers], schedule, warps=4, shared_bytes=2 * size)
    assert result.faults() == []
    wanted = a @ b.T + c
    for i in range(n // 2):
        assert (accumulators[i].numpy() == wanted[row + i // 2 % 2 * 8, column + i // 4 * 8 + i % 2]).all(), i


def test_a_narrow_access_to_a_wide_register():
    """As Triton 3.9 writes it: zeros, or the sign, above what is loaded."""
    body = by_hand.own_part(2, 8) + """mov.b32 %r1, global_smem;
    mad.lo.s32 %r1, %r0, 4, %r1;
    mov.b64 %d5, 0xFFFFFFFF80000001;
    st.shared.b32 [%r1], %d5;
    ld.shared.b32 %d6, [%r1];
    st.global.b64 [%d51], %d6;
    ld.shared.s32 %d6, [%r1];
    st.global.b64 [%d52], %d6;
    """  # fmt: skip
    unsigned, signed = torch.zeros(32, dtype=torch.int64), torch.zeros(32, dtype=torch.int64)
    assert by_hand.run(body, [unsigned, signed], shared_bytes=128).faults() == []
    assert (unsigned == 0x80000001).all() and (signed == 0x80000001 - 2**32).all()


def test_a_parameter_chosen_by_its_address():
    body = """mov.b32 %r1, a1;
    mov.b32 %r2, a2;
    and.b32 %r3, %r0, 1;
    setp.eq.s32 %p1, %r3, 0;
    selp.b32 %r4, %r1, %r2, %p1;
    ld.param.b64 %d5, [%r4];
    mul.wide.u32 %d6, %r0, 4;
    add.s64 %d5, %d5, %d6;
    st.global.b32 [%d5], %r0;
    """
    even, odd = torch.zeros(32, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    assert by_hand.run(body, [even, odd]).faults() == []
    threads = torch.arange(32, dtype=torch.int32)
    assert torch.equal(even, threads * (threads % 2 == 0)) and torch.equal(odd, threads * (threads % 2))
