"""expand: z, B, bias -> y₀, the buffer that the base product is then added to; its backward; and what follows from B.

    y₀ = z·Bcatᵀ + bias    dz = dy·Bcat    dB = dyᵀz + 2 B M    G_e = B_eᵀ B_e

Where the base ran by itself, its output (T, d_out) stands in the bias's place, and y₀ is the layer's output.

Bcat is B (d_out, E, r) seen as (d_out, E·r). dz sums over outputs and dB over tokens, so one pass for both would need
accumulators as wide as dy: backward goes in chunks of tokens that fit the L2, dz and dB of each at about one time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mos_kernels.backends.triton import launch
from mos_kernels.backends.triton.numerics import cast, dot, settled
from mos_kernels.backends.triton.shrink import empty_stack, stack_part


@triton.jit
def _gram_part(
    B, wide, planes, N, i_e, i_s, total_size, E: tl.constexpr, r: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, SPLITS: tl.constexpr, WIDE: tl.constexpr, GRAM: tl.constexpr,
):  # fmt: skip
    """planes[split, e] = B[part, e].T @ B[part, e] of as many experts as BLOCK_R columns hold;  wide = B in the dtype
    of the wide products

    total_size: numbers of a plane, in which this linear's begin at `planes`.
    """
    held: tl.constexpr = BLOCK_R // r
    o_c = tl.arange(0, BLOCK_R)
    column = i_e * held * r + o_c
    m_c = (o_c < held * r) & (column < E * r)
    part = tl.cdiv(tl.cdiv(N, BLOCK_N), SPLITS) * BLOCK_N
    total = tl.zeros([BLOCK_R, BLOCK_R], tl.float32)
    for start in range(i_s * part, tl.minimum((i_s + 1) * part, N), BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        offsets = o_n[:, None].to(tl.int64) * (E * r) + column[None, :]
        mask = (o_n[:, None] < N) & m_c[None, :]
        b_B = tl.load(B + offsets, mask=mask, other=0.0).to(tl.float32)
        if WIDE:  # 4 at a time: the load is as wide as the store, and 8 of float32 are two loads of half a sector each
            tl.store(wide + tl.max_contiguous(offsets, [1, 4]), cast(b_B, wide.dtype.element_ty), mask=mask)
        if GRAM:
            total = dot(tl.trans(b_B), b_B, total)
    if GRAM:  # the blocks on the diagonal
        own = m_c[:, None] & m_c[None, :] & (o_c[:, None] // r == o_c[None, :] // r)
        tl.store(planes + i_s * total_size + column[:, None] * r + o_c[None, :] % r, total, mask=own)


@triton.jit
def gram_kernel(
    B, wide, B_2, wide_2, B_h, wide_h, planes, A, A_2, router, stack, N, N_h, D, E: tl.constexpr, r: tl.constexpr,
    r_h: tl.constexpr, READS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_R_H: tl.constexpr,
    SPLITS: tl.constexpr, WIDE: tl.constexpr, WIDE_2: tl.constexpr, WIDE_H: tl.constexpr, GRAM: tl.constexpr,
    R: tl.constexpr, ROUTED: tl.constexpr, SPLIT_ROUTER: tl.constexpr,
):  # fmt: skip
    """Of the READS linears of an FFN that read its input and of the one (h) after them, or of h alone: G in planes, and
    B in the dtype of the wide products.

    R: where it is not 0, further programs make the stack of the R rows of A, or of A and A_2, and the router's ROUTED.
    """
    i_e, i_s, i_l = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    size: tl.constexpr = READS * E * r * r + E * r_h * r_h
    if i_l == READS:
        last = planes + READS * E * r * r
        _gram_part(B_h, wide_h, last, N_h, i_e, i_s, size, E, r_h, BLOCK_N, BLOCK_R_H, SPLITS, WIDE_H, GRAM)
    elif i_l > READS:
        if R > 0:
            first, programs = i_s * tl.num_programs(0) + i_e, tl.num_programs(0) * tl.num_programs(1)
            stack_part(A, A_2, router, stack, first, programs, D, R, ROUTED, SPLIT_ROUTER, READS == 2)
    elif READS == 1:
        _gram_part(B, wide, planes, N, i_e, i_s, size, E, r, BLOCK_N, BLOCK_R, SPLITS, WIDE, GRAM)
    elif READS == 2:
        if i_l == 0:
            _gram_part(B, wide, planes, N, i_e, i_s, size, E, r, BLOCK_N, BLOCK_R, SPLITS, WIDE, GRAM)
        else:
            second = planes + E * r * r
            _gram_part(B_2, wide_2, second, N, i_e, i_s, size, E, r, BLOCK_N, BLOCK_R, SPLITS, WIDE_2, GRAM)


def gram_launch(
    Bs: list[Tensor],
    dtype: torch.dtype,
    needs_gram: bool,
    As: list[Tensor] | None = None,
    router: Tensor | None = None,
    x_dtype: torch.dtype | None = None,
) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
    """Each B (d_out, E, r) in dtype (B itself where it is that); where needed each G (E, r, r) in float32; the stack.

    Bs: of one linear, or of an FFN's, the last of them last; those before the last have one shape and dtype. As: the A
    (R, d_in) of the linears that read x, of one dtype, which with the router become the stack of x_dtype that
    `shrink_launch` takes.
    """
    *reads, last = Bs
    (N, E, r), (N_h, _, r_h), device = Bs[0].shape, last.shape, last.device
    wide = [B if B.dtype == dtype else torch.empty_like(B, dtype=dtype) for B in Bs]
    casts = [a is not b for a, b in zip(wide, Bs, strict=True)]
    if not (needs_gram or any(casts)):
        return wide, [], None
    settings = launch.settings("gram", device, max(N, N_h))
    if max(r, r_h) > 64:  # the accumulator alone would fill a thread's registers
        settings.update(num_warps=8, BLOCK_N=16)
    most = triton.next_power_of_2(triton.cdiv(max(N, N_h), settings["BLOCK_N"]))
    settings["SPLITS"] = min(settings["SPLITS"], most)
    shapes = [torch.Size((E, B.shape[2], B.shape[2])) for B in Bs]
    sizes = [shape.numel() for shape in shapes]
    planes = torch.empty(settings["SPLITS"], sum(sizes), device=device, dtype=torch.float32) if needs_gram else None
    block_r, block_r_h = launch.block(r, 16, 128), launch.block(r_h, 16, 128)
    across = max(triton.cdiv(E, block_r // r), triton.cdiv(E, block_r_h // r_h))
    stack, sources, D, stacking = None, (last,) * 4, N, {"R": 0, "ROUTED": 0, "SPLIT_ROUTER": False}
    if As is not None:
        stack, stacking = empty_stack(As, router, x_dtype)
        sources, D = (As[0], As[-1], last if router is None else router, stack), stack.shape[1]
    launch.launch(
        gram_kernel, (across, settings["SPLITS"], len(Bs) + (stack is not None)), last,
        (Bs[0], wide[0], Bs[-2:][0], wide[-2:][0], last, wide[-1], last if planes is None else planes, *sources,
         N, N_h, D),
        E=E, r=r, r_h=r_h, READS=len(reads), BLOCK_R=block_r, BLOCK_R_H=block_r_h,
        WIDE=casts[0], WIDE_2=casts[-2:][0], WIDE_H=casts[-1], GRAM=needs_gram, **stacking, **settings,
    )  # fmt: skip
    if planes is None:
        return wide, [], stack
    grams = launch.sum_planes(planes).split(sizes)
    return wide, [gram.view(shape) for gram, shape in zip(grams, shapes, strict=True)], stack


@triton.jit(do_not_specialize=["T", "rows"])
def expand_kernel(
    z, B, added, B_2, added_2, y, T, N, C, rows,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, HOLDS: tl.constexpr, ADDED: tl.constexpr,
    PAIR: tl.constexpr,
):  # fmt: skip
    """y[t, n] = z[t] @ Bcat[n] + added[n] or added[t, n]; neighbouring programs write neighbouring columns

    HOLDS: C <= BLOCK_C, and a program keeps the B and bias of its outputs while it walks `rows` tokens.
    PAIR: y[i] from z[i] of two linears i.
    """
    if PAIR:
        is_second = tl.program_id(1) == 1
        z += tl.where(is_second, T.to(tl.int64) * C, 0)
        y += tl.where(is_second, T.to(tl.int64) * N, 0)
        B, added = tl.where(is_second, B_2, B), tl.where(is_second, added_2, added)
    across = tl.cdiv(N, BLOCK_N)
    first, i_n = tl.program_id(0) // across * rows, tl.program_id(0) % across
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = (o_n < N)[None, :]
    if HOLDS:
        o_c = tl.arange(0, BLOCK_C)
        b_B = _load_columns(B, o_n, N, o_c, C)
        b_bias = tl.load(added + o_n, mask=o_n < N, other=0.0).to(tl.float32) if ADDED == 1 else 0.0
        for start in range(first, tl.minimum(first + rows, T), BLOCK_T):
            o_t = start + tl.arange(0, BLOCK_T)
            m_t, row = o_t < T, o_t.to(tl.int64)[:, None]
            total = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
            total = dot(_load_columns(z, o_t, T, o_c, C), tl.trans(b_B), total)
            if ADDED == 1:
                total += b_bias[None, :]
            else:
                total = plus_added(settled(total), added, row, m_t, o_n, N, ADDED)
            tl.store(y + row * N + o_n[None, :], cast(total, y.dtype.element_ty), mask=m_t[:, None] & m_n)
    else:
        o_t = first + tl.arange(0, BLOCK_T)
        m_t, row = o_t < T, o_t.to(tl.int64)[:, None]
        total = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
        for start in range(0, C, BLOCK_C):
            o_c = start + tl.arange(0, BLOCK_C)
            total = dot(_load_columns(z, o_t, T, o_c, C), tl.trans(_load_columns(B, o_n, N, o_c, C)), total)
        total = plus_added(total, added, row, m_t, o_n, N, ADDED)
        tl.store(y + row * N + o_n[None, :], cast(total, y.dtype.element_ty), mask=m_t[:, None] & m_n)


@triton.jit
def _load_columns(t, rows, row_count, columns, C):
    """[rows, columns] of t (·, C)."""
    mask = (rows < row_count)[:, None] & (columns < C)[None, :]
    return tl.load(t + rows.to(tl.int64)[:, None] * C + columns[None, :], mask=mask, other=0.0)


@triton.jit
def plus_added(total, added, row, m_t, o_n, N, ADDED: tl.constexpr):
    """total [tokens, outputs] + added[n] or added[t, n]. ADDED: how many dimensions `added` has, 0 for none."""
    m_n = (o_n < N)[None, :]
    if ADDED == 1:
        total += tl.load(added + o_n[None, :], mask=m_n, other=0.0).to(tl.float32)
    elif ADDED == 2:
        total += tl.load(added + row * N + o_n[None, :], mask=m_t[:, None] & m_n, other=0.0).to(tl.float32)
    return total


def expand_launch(z: Tensor, B: Tensor, added: Tensor | None) -> Tensor:
    """y₀ (T, d_out) in z's dtype, from z (T, E·r) and B (d_out, E, r) of one dtype, and added, dense, of any."""
    return _expand_launch(z, [B], [added], z.new_empty(z.shape[0], B.shape[0]))


def expand_pair_launch(z: Tensor, Bs: list[Tensor], biases: list[Tensor | None]) -> Tensor:
    """y₀ (2, T, d_out) of two linears, from z (2, T, E·r). Bs: of one shape; biases: of one dtype, or both None."""
    return _expand_launch(z, Bs, biases, z.new_empty(2, z.shape[1], Bs[0].shape[0]))


def _expand_launch(z: Tensor, Bs: list[Tensor], added: list[Tensor | None], y: Tensor) -> Tensor:
    (T, C), N = z.shape[-2:], y.shape[-1]
    there, dimensions = [z if t is None else t for t in added], 0 if added[0] is None else added[0].dim()
    most = (256 if C <= 64 else 128) // (2 if dimensions == 2 else 1)  # or shared memory would not do
    settings = launch.wide_settings("expand", z.device, T, z.dtype, BLOCK_N=most)
    walks, holds = launch.processors(z.device) * settings.pop("PER_SM"), C <= 128 and z.dtype != torch.float32
    if not holds and launch.bucket(T) == "train":
        settings.update(
            BLOCK_T=64 if z.dtype == torch.float32 else 128, BLOCK_N=64 if C % 16 else 128, num_stages=2
        )  # fmt: skip
    settings["BLOCK_C"] = launch.block(C, 16, 128 if holds else settings["BLOCK_C"])
    tiles, across = triton.cdiv(T, settings["BLOCK_T"]), triton.cdiv(N, settings["BLOCK_N"])
    of_a_walk = triton.cdiv(tiles, max(walks // (across * len(Bs)), 1)) if holds and T else 1
    launch.launch(
        expand_kernel, (triton.cdiv(tiles, of_a_walk) * across, len(Bs)), z,
        (z, Bs[0], there[0], Bs[-1], there[-1], y, T, N, C, of_a_walk * settings["BLOCK_T"]),
        HOLDS=holds, ADDED=dimensions, PAIR=len(Bs) == 2, **settings,
    )  # fmt: skip
    return y


@triton.jit
def _input_gradient(
    dy, B, planes, first, last, i_s, o_c, T, N, C, stride_dy,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """planes[i_s, t] = dy[t, part] @ Bcat[part], for BLOCK_T tokens from `first` that lie before `last`"""
    o_t = first + tl.arange(0, BLOCK_T)
    m_t, m_c = o_t < last, o_c[None, :] < C
    row = o_t.to(tl.int64)[:, None]
    part = tl.cdiv(tl.cdiv(N, BLOCK_N), SPLITS) * BLOCK_N
    total = tl.zeros([BLOCK_T, o_c.shape[0]], tl.float32)
    for start in range(i_s * part, tl.minimum((i_s + 1) * part, N), BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        m_n = o_n < N
        b_dy = tl.load(dy + row * stride_dy + o_n[None, :], mask=m_t[:, None] & m_n[None, :], other=0.0)
        b_B = tl.load(B + o_n[:, None].to(tl.int64) * C + o_c[None, :], mask=m_n[:, None] & m_c, other=0.0)
        total = dot(b_dy, b_B, total)
    tl.store(planes + (i_s.to(tl.int64) * T + row) * C + o_c[None, :], total, mask=m_t[:, None] & m_c)


@triton.jit
def _weight_gradient(
    dy, z, planes, first, last, chunk, i_n, o_c, N, C, stride_dy, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr
):
    """planes[chunk, n] = Σ_t dy[t, n] z[t], over the tokens first <= t < last"""
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n, m_c = o_n < N, o_c[None, :] < C
    total = tl.zeros([BLOCK_N, o_c.shape[0]], tl.float32)
    for start in range(first, last, BLOCK_T):
        o_t = start + tl.arange(0, BLOCK_T)
        m_t, row = o_t < last, o_t.to(tl.int64)[:, None]
        b_dy = tl.load(dy + row * stride_dy + o_n[None, :], mask=m_t[:, None] & m_n[None, :], other=0.0)
        b_z = tl.load(z + row * C + o_c[None, :], mask=m_t[:, None] & m_c, other=0.0)
        total = dot(tl.trans(b_dy), b_z, total)
    plane = chunk.to(tl.int64) * N + o_n[:, None]
    tl.store(planes + plane * C + o_c[None, :], total, mask=m_n[:, None] & m_c)


@triton.jit(do_not_specialize=["T", "rows"])
def expand_backward_kernel(
    dy, z, B, dy_2, B_2, dz, dB, T, rows, N, C, stride_dy,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, WEIGHT_T: tl.constexpr,
    WEIGHT_N: tl.constexpr, BLOCK_C: tl.constexpr, NEEDS_DB: tl.constexpr, PAIR: tl.constexpr,
):  # fmt: skip
    """dz[split, t] = dy[t, part] @ Bcat[part];  dB[chunk, n] = Σ_t dy[t, n] z[t], over the chunk's tokens

    One launch for both: they wait for nothing of each other. Programs stand in the order of the chunks, so that those
    of dB find in the L2 what those of dz read at the same time.
    PAIR: dz[i] and dB[i] from dy_i, z[i] and B_i of two linears i, one after the other.
    """
    if PAIR:
        is_second = tl.program_id(2) == 1
        dy, B = tl.where(is_second, dy_2, dy), tl.where(is_second, B_2, B)
        tokens = tl.where(is_second, T.to(tl.int64), 0)
        z += tokens * C
        dz += tokens * SPLITS * C
        dB += tl.where(is_second, tl.cdiv(T, rows).to(tl.int64), 0) * N * C
    for_input = tl.cdiv(rows, BLOCK_T) * SPLITS
    programs = for_input + tl.cdiv(N, WEIGHT_N) if NEEDS_DB else for_input
    chunk, i = tl.program_id(0) // programs, tl.program_id(0) % programs
    first = chunk * rows
    last = tl.minimum(first + rows, T)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    if i < for_input:
        first += i // SPLITS * BLOCK_T
        _input_gradient(dy, B, dz, first, last, i % SPLITS, o_c, T, N, C, stride_dy, BLOCK_T, BLOCK_N, SPLITS)
    else:
        _weight_gradient(dy, z, dB, first, last, chunk, i - for_input, o_c, N, C, stride_dy, WEIGHT_T, WEIGHT_N)


def expand_backward_launch(dy: Tensor, z: Tensor, B: Tensor, needs_dB: bool) -> tuple[Tensor, Tensor | None]:
    """dz in planes (S, T, E·r) and dyᵀz in planes (chunks, d_out, E·r), float32. dy (T, d_out), rows dense."""
    dz, dB = _expand_backward_launch([dy], z, [B], needs_dB)
    return dz[0], None if dB is None else dB[0]


def expand_backward_pair_launch(
    dys: list[Tensor], z: Tensor, Bs: list[Tensor], needs_dB: bool
) -> tuple[Tensor, Tensor | None]:
    """As `expand_backward_launch` of two linears of one shape: dz (2, S, T, E·r) and dyᵀz (2, chunks, d_out, E·r).

    dys: of one stride; z (2, T, E·r).
    """
    return _expand_backward_launch(dys, z, Bs, needs_dB)


def _expand_backward_launch(dys, z: Tensor, Bs, needs_dB: bool) -> tuple[Tensor, Tensor | None]:
    dy, linears = dys[0], len(dys)
    (T, N), C, device = dy.shape, z.shape[-1], dy.device
    block_c = launch.block(C, 16, 64 if dy.dtype == torch.float32 else 128)
    most = 64 if dy.dtype == torch.float32 else 256 if block_c <= 64 else 128
    settings = launch.wide_settings("expand_backward", device, T, dy.dtype, BLOCK_T=most, WEIGHT_N=most)
    rows = _chunk_rows(T, N * dy.element_size(), settings.pop("CHUNK_BYTES"), settings.pop("CHUNK_ROWS"), settings)
    chunks = triton.cdiv(T, rows)
    dz = torch.empty(linears, settings["SPLITS"], T, C, device=device, dtype=torch.float32)
    dB = torch.empty(linears, max(chunks, 1), N, C, device=device, dtype=torch.float32) if needs_dB else None
    if T == 0 and needs_dB:
        dB.zero_()
    programs = triton.cdiv(rows, settings["BLOCK_T"]) * settings["SPLITS"]
    programs += triton.cdiv(N, settings["WEIGHT_N"]) if needs_dB else 0
    launch.launch(
        expand_backward_kernel, (chunks * programs, triton.cdiv(C, block_c), linears), dy,
        (dy, z, Bs[0], dys[-1], Bs[-1], dz, dz if dB is None else dB, T, rows, N, C, dy.stride(0)),
        BLOCK_C=block_c, NEEDS_DB=needs_dB, PAIR=linears == 2, **settings,
    )  # fmt: skip
    return dz, dB


def _chunk_rows(T: int, row_bytes: int, most_bytes: int, most_rows: int, settings: dict) -> int:
    """Tokens of a chunk: whole tiles, within both limits, and the chunks of one size where T allows."""
    tile = max(settings["BLOCK_T"], settings["WEIGHT_T"])
    most = max(min(most_bytes // row_bytes, most_rows) // tile, 1) * tile
    return triton.cdiv(triton.cdiv(T, max(triton.cdiv(T, most), 1)), tile) * tile or tile


@triton.jit
def _norm_gradient_tile(
    planes, B, M, dB, i_n, i_e, P, N, stride_M, E: tl.constexpr, r: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_e = i_e * BLOCK_E + tl.arange(0, BLOCK_E)
    o_r = tl.arange(0, BLOCK_R)
    m_ne = (o_n[:, None] < N) & (o_e[None, :] < E)
    flat = o_n[:, None].to(tl.int64) * E + o_e[None, :]
    offsets = flat[:, :, None] * r + o_r[None, None, :]
    mask = m_ne[:, :, None] & (o_r[None, None, :] < r)
    m_M = (o_e[:, None] < E) & (o_r[None, :] < r)
    total = tl.zeros([BLOCK_N, BLOCK_E, BLOCK_R], tl.float32)
    for j in range(r):
        b_B = tl.load(B + flat * r + j, mask=m_ne, other=0.0).to(tl.float32)
        b_M = tl.load(M + o_e[:, None] * stride_M + j * r + o_r[None, :], mask=m_M, other=0.0)
        total += b_B[:, :, None] * b_M[None, :, :]
    total *= 2.0
    for i in range(P):
        flat = (i * N + o_n[:, None].to(tl.int64)) * E + o_e[None, :]
        total += tl.load(planes + flat[:, :, None] * r + o_r[None, None, :], mask=mask, other=0.0)
    tl.store(dB + offsets, total, mask=mask)


@triton.jit(do_not_specialize=["P"])
def norm_gradient_kernel(
    planes, B, M, dB, P, N, stride_M, E: tl.constexpr, r: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dB[n, e] = Σ planes[:, n, e] + 2 B[n, e] @ M[e]"""
    i_n, i_e = tl.program_id(0), tl.program_id(1)
    _norm_gradient_tile(planes, B, M, dB, i_n, i_e, P, N, stride_M, E, r, BLOCK_N, BLOCK_E, BLOCK_R)


@triton.jit(do_not_specialize=["P", "P_h"])
def norm_gradients_kernel(
    planes, B, M, dB, planes_2, B_2, M_2, dB_2, planes_h, B_h, M_h, dB_h, P, P_h, N, N_h, stride_M, stride_M_h,
    E: tl.constexpr, r: tl.constexpr, r_h: tl.constexpr, READS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N_H: tl.constexpr, BLOCK_E_H: tl.constexpr,
    BLOCK_R_H: tl.constexpr,
):  # fmt: skip
    """`norm_gradient_kernel` of the READS linears of an FFN that read its input, and of the one (h) after them."""
    i, across, across_h = tl.program_id(0), tl.cdiv(E, BLOCK_E), tl.cdiv(E, BLOCK_E_H)
    of_one = tl.cdiv(N, BLOCK_N) * across
    if i < of_one:
        _norm_gradient_tile(planes, B, M, dB, i // across, i % across, P, N, stride_M, E, r, BLOCK_N, BLOCK_E, BLOCK_R)
    elif i < READS * of_one:
        i -= of_one
        _norm_gradient_tile(
            planes_2, B_2, M_2, dB_2, i // across, i % across, P, N, stride_M, E, r, BLOCK_N, BLOCK_E, BLOCK_R
        )
    else:
        i -= READS * of_one
        _norm_gradient_tile(
            planes_h, B_h, M_h, dB_h, i // across_h, i % across_h, P_h, N_h, stride_M_h, E, r_h,
            BLOCK_N_H, BLOCK_E_H, BLOCK_R_H,
        )  # fmt: skip


def _norm_gradient_tiles(settings: dict, E: int, r: int) -> tuple[int, int, int]:
    """BLOCK_N, BLOCK_E and BLOCK_R."""
    block_r, all_e = triton.next_power_of_2(r), triton.next_power_of_2(E)
    block_e = min(all_e, max(settings["TOKEN_TILE"] // block_r, 1))
    return max(settings["TILE"] // (block_e * block_r), 1), block_e, block_r


def norm_gradient_launch(planes: Tensor, B: Tensor, M: Tensor) -> Tensor:
    """dB (d_out, E, r) in float32 from the planes of dyᵀz and the gradient through q. M (E, r, r), each dense."""
    N, E, r = B.shape
    dB = torch.empty(N, E, r, device=B.device, dtype=torch.float32)
    settings = launch.settings("norm_gradient", B.device, N)
    block_n, block_e, block_r = _norm_gradient_tiles(settings, E, r)
    launch.launch(
        norm_gradient_kernel, (triton.cdiv(N, block_n), triton.cdiv(E, block_e)), B,
        (planes, B, M, dB, planes.shape[0], N, M.stride(0)), E=E, r=r, BLOCK_N=block_n, BLOCK_E=block_e,
        BLOCK_R=block_r, num_warps=settings["num_warps"], num_stages=settings["num_stages"],
    )  # fmt: skip
    return dB


def norm_gradients_launch(planes: list[Tensor], Bs: list[Tensor], Ms: list[Tensor]) -> list[Tensor]:
    """As `norm_gradient_launch` of an FFN's linears, the last of them last; those before it have one shape."""
    *reads, last = Bs
    (N, E, r), (N_h, _, r_h) = reads[0].shape, last.shape
    dBs = [torch.empty(B.shape, device=B.device, dtype=torch.float32) for B in Bs]
    settings = launch.settings("norm_gradient", last.device, N)
    block_n, block_e, block_r = _norm_gradient_tiles(settings, E, r)
    block_n_h, block_e_h, block_r_h = _norm_gradient_tiles(settings, E, r_h)
    of_one = triton.cdiv(N, block_n) * triton.cdiv(E, block_e)
    of_last = triton.cdiv(N_h, block_n_h) * triton.cdiv(E, block_e_h)
    each = list(zip(planes, Bs, Ms, dBs, strict=True))
    launch.launch(
        norm_gradients_kernel, (len(reads) * of_one + of_last,), last,
        (*each[0], *each[-2], *each[-1], planes[0].shape[0], planes[-1].shape[0], N, N_h, Ms[0].stride(0),
         Ms[-1].stride(0)),
        E=E, r=r, r_h=r_h, READS=len(reads), BLOCK_N=block_n, BLOCK_E=block_e, BLOCK_R=block_r, BLOCK_N_H=block_n_h,
        BLOCK_E_H=block_e_h, BLOCK_R_H=block_r_h, num_warps=settings["num_warps"], num_stages=settings["num_stages"],
    )  # fmt: skip
    return dBs
