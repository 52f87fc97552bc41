"""activate: g, u -> h, and what the last linear of an FFN shrinks of it, in one pass over both; and its backward.

    h = φ(g)·u    p = A·h    n = ‖h‖²
    dh = dh₀ + dp·A + 2 dn h    du = dh φ(g)    dg = dh u φ'(g)    dA = dpᵀ h

h is rounded to the dtype that the last linear reads before p and n are taken. Backward forms it again. Beyond float16
h, dg and du are infinite, as those of the base: its products are to show what a gradient scaler looks for.

A step loads the tiles of the next one before it uses its own: those that Triton loads ahead by itself lie in shared
memory, from where it computes φ once for each layout that reads h.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mos_kernels.backends.triton import launch
from mos_kernels.backends.triton.activations import CODES, activation
from mos_kernels.backends.triton.numerics import cast, dot, nearest, saturate, settled, where_scalar
from mos_kernels.call import FFNPlan


@triton.jit
def _load(t, row, columns, stride, mask):
    return tl.load(t + row[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _load_rows(A, rows, columns, D, R: tl.constexpr, dtype: tl.constexpr):
    """[rows, columns] of A in dtype."""
    mask = (rows[:, None] < R) & (columns[None, :] < D)
    return cast(
        tl.load(A + rows[:, None].to(tl.int64) * D + columns[None, :], mask=mask, other=0.0).to(tl.float32), dtype
    )


@triton.jit
def _load_transposed(A, rows, columns, D, R: tl.constexpr, dtype: tl.constexpr):
    """[columns, rows] of A in dtype. A tile of h's shape would be loaded as h is stored, 8 float32 of A at a time."""
    mask = (rows[None, :] < R) & (columns[:, None] < D)
    return cast(
        tl.load(A + rows[None, :].to(tl.int64) * D + columns[:, None], mask=mask, other=0.0).to(tl.float32), dtype
    )


@triton.jit(do_not_specialize=["T"])
def activate_kernel(
    g, u, A, h, p, n, T, D, stride_g, stride_u, R: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, SPLITS: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """h[t] = φ(g[t]) u[t];  p[split, t] = h[t, part] @ A[:, part].T;  n[split, t] = ‖h[t, part]‖²"""
    i_t, i_s, i_c = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_t, row = o_t < T, o_t.to(tl.int64)
    dtype = h.dtype.element_ty
    part = tl.cdiv(tl.cdiv(D, BLOCK_D), SPLITS) * BLOCK_D
    total = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    norm = tl.zeros([BLOCK_T], tl.float32)
    first, last = i_s * part, tl.minimum((i_s + 1) * part, D)
    o_d = first + tl.arange(0, BLOCK_D)
    mask = m_t[:, None] & (o_d[None, :] < D)
    b_g = _load(g, row, o_d, stride_g, mask)
    b_u = _load(u, row, o_d, stride_u, mask) if GATED else b_g
    for start in range(first, last, BLOCK_D):
        wide, _ = activation(b_g.to(tl.float32), ACTIVATION)
        if GATED:
            wide *= b_u.to(tl.float32)
        o_next = o_d + BLOCK_D
        m_next = where_scalar(m_t[:, None] & (o_next[None, :] < D), start + BLOCK_D < last)
        b_g = _load(g, row, o_next, stride_g, m_next)
        b_u = _load(u, row, o_next, stride_u, m_next) if GATED else b_g
        b_h = nearest(wide, dtype)
        wide = b_h.to(tl.float32)
        norm += tl.sum(wide * wide, 1)
        total = dot(b_h, _load_transposed(A, o_c, o_d, D, R, dtype), total)
        if i_c == 0:
            tl.store(h + row[:, None] * D + o_d[None, :], b_h, mask=mask)
        o_d, mask = o_next, m_next
    plane = i_s.to(tl.int64) * T + row
    tl.store(p + plane[:, None] * R + o_c[None, :], total, mask=m_t[:, None] & (o_c[None, :] < R))
    if i_c == 0:
        tl.store(n + plane, saturate(norm), mask=m_t)


@triton.jit(do_not_specialize=["T"])
def activate_backward_kernel(
    dh, g, u, A, dp, dn, dg, du, planes, T, D, stride_dh, stride_g, stride_u, stride_dg, stride_du, R: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, SPLITS: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, NEEDS_DA: tl.constexpr, COLUMN_BLOCKS: tl.constexpr,
):  # fmt: skip
    """du[t] = dh φ(g)[t] and dg[t] = (dh u φ'(g))[t] of dh[t] + dp[t] @ A + 2 dn[t] h[t];  planes[split] = dp.T @ h

    A program owns BLOCK_D columns and walks its part of the tokens, so g and u are read once.
    """
    i_d, i_s, i_c = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_d = o_d < D
    dtype = dg.dtype.element_ty
    part = tl.cdiv(tl.cdiv(T, BLOCK_T), SPLITS) * BLOCK_T
    total = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    if COLUMN_BLOCKS == 1:
        b_A = _load_rows(A, o_c, o_d, D, R, dtype)
    first, last = i_s * part, tl.minimum((i_s + 1) * part, T)
    o_t = first + tl.arange(0, BLOCK_T)
    m_t, row = o_t < last, o_t.to(tl.int64)
    mask = m_t[:, None] & m_d[None, :]
    b_g, b_dh = _load(g, row, o_d, stride_g, mask), _load(dh, row, o_d, stride_dh, mask)
    b_u = _load(u, row, o_d, stride_u, mask) if GATED else b_g
    b_dp, b_dn = _load_dp(dp, row, m_t, o_c, R), tl.load(dn + o_t, mask=m_t, other=0.0)
    for _ in range(first, last, BLOCK_T):
        o_next = o_t + BLOCK_T
        m_next, row_next = o_next < last, o_next.to(tl.int64)
        mask_next = m_next[:, None] & m_d[None, :]
        phi, slope = activation(b_g.to(tl.float32), ACTIVATION)
        wide = phi
        if GATED:
            wide, slope = phi * b_u.to(tl.float32), slope * b_u.to(tl.float32)
        b_g = _load(g, row_next, o_d, stride_g, mask_next)
        b_u = _load(u, row_next, o_d, stride_u, mask_next) if GATED else b_g
        b_h, narrow = nearest(wide, dtype), nearest(b_dp, dtype)
        if NEEDS_DA:
            total = dot(tl.trans(narrow), b_h, total)
        if COLUMN_BLOCKS == 1 or i_c == 0:
            through = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
            if COLUMN_BLOCKS == 1:
                through = dot(narrow, b_A, through)
            else:
                for j in range(COLUMN_BLOCKS):
                    o_j = j * BLOCK_C + tl.arange(0, BLOCK_C)
                    narrow = nearest(_load_dp(dp, row, m_t, o_j, R), dtype)
                    through = dot(narrow, _load_rows(A, o_j, o_d, D, R, dtype), through)
            whole = settled(through) + b_dh.to(tl.float32) + (2.0 * b_dn)[:, None] * b_h.to(tl.float32)
            tl.store(dg + row[:, None] * stride_dg + o_d[None, :], nearest(whole * slope, dtype), mask=mask)
            if GATED:
                tl.store(du + row[:, None] * stride_du + o_d[None, :], nearest(whole * phi, dtype), mask=mask)
        b_dh = _load(dh, row_next, o_d, stride_dh, mask_next)
        b_dp, b_dn = _load_dp(dp, row_next, m_next, o_c, R), tl.load(dn + o_next, mask=m_next, other=0.0)
        o_t, m_t, row, mask = o_next, m_next, row_next, mask_next
    if NEEDS_DA:
        plane = i_s.to(tl.int64) * R + o_c
        tl.store(planes + plane[:, None] * D + o_d[None, :], total, mask=(o_c[:, None] < R) & m_d[None, :])


@triton.jit
def _load_dp(dp, row, m_t, columns, R: tl.constexpr):
    mask = m_t[:, None] & (columns[None, :] < R)
    return tl.load(dp + row[:, None] * R + columns[None, :], mask=mask, other=0.0)


def _halves(outputs: Sequence[Tensor], plan: FFNPlan) -> tuple[Tensor, Tensor]:
    """g and u (T, d); g twice where the FFN is not gated."""
    if plan.fused:
        return outputs[0].chunk(2, -1)
    return outputs[0], outputs[-1]


def activate_launch(outputs: Sequence[Tensor], A: Tensor, plan: FFNPlan) -> tuple[Tensor, Tensor, Tensor]:
    """h (T, d) in the outputs' dtype, and planes p (S, T, R) and n (S, T) of it in float32. A (R, d) or (E, r, d).

    outputs: (T, d) of the linears that read x, g and u or g alone, or one (T, 2d) of both; rows dense.
    """
    g, u = _halves(outputs, plan)
    (T, D), A, device = g.shape, A.flatten(0, -2).contiguous(), g.device
    R, wide = A.shape[0], g.dtype == torch.float32
    block_c = launch.block(R, 16, 64)
    settings = launch.wide_settings(
        "activate", device, T, g.dtype, BLOCK_D=(32 if wide else 64) if block_c > 16 else 64 if wide else 256
    )
    splits = settings["SPLITS"]
    h = torch.empty(T, D, device=device, dtype=g.dtype)
    p = torch.empty(splits, T, R, device=device, dtype=torch.float32)
    n = torch.empty(splits, T, device=device, dtype=torch.float32)
    grid = (triton.cdiv(T, settings["BLOCK_T"]), splits, triton.cdiv(R, block_c))
    launch.launch(
        activate_kernel, grid, g, (g, u, A, h, p, n, T, D, g.stride(0), u.stride(0)),
        R=R, BLOCK_C=block_c, ACTIVATION=CODES[plan.activation], GATED=plan.gated, **settings,
    )  # fmt: skip
    return h, p, n


def activate_backward_launch(
    dh: Tensor, outputs: Sequence[Tensor], A: Tensor, dp: Tensor, dn: Tensor, plan: FFNPlan, needs_A: bool
) -> tuple[list[Tensor], Tensor | None]:
    """The gradients of the outputs, and dA (R, d) in float32 where needed.

    From dh (T, d), that of h through the base alone, and dp (T, R) and dn (T,), dense, in float32. Nothing of these is
    written to.
    """
    g, u = _halves(outputs, plan)
    (T, D), A, device = g.shape, A.flatten(0, -2).contiguous(), g.device
    R, wide = A.shape[0], g.dtype == torch.float32
    block_c = launch.block(R, 16, 32 if wide or R > 64 else 64)
    most = 64 if wide or block_c > 16 else 128
    settings = launch.wide_settings(
        "activate_backward", device, T, g.dtype, BLOCK_T=16 if R > 64 else most, BLOCK_D=32 if R > 64 else most
    )
    splits, blocks = settings["SPLITS"], triton.cdiv(R, block_c)
    gradients = [torch.empty(output.shape, device=device, dtype=output.dtype) for output in outputs]
    dg, du = _halves(gradients, plan)
    planes = torch.empty(splits, R, D, device=device, dtype=torch.float32) if needs_A else None
    grid = (triton.cdiv(D, settings["BLOCK_D"]), splits, blocks if needs_A else 1)
    launch.launch(
        activate_backward_kernel, grid, g,
        (dh, g, u, A, dp, dn, dg, du, dp if planes is None else planes, T, D,
         dh.stride(0), g.stride(0), u.stride(0), dg.stride(0), du.stride(0)),
        R=R, BLOCK_C=block_c, ACTIVATION=CODES[plan.activation], GATED=plan.gated, NEEDS_DA=needs_A,
        COLUMN_BLOCKS=blocks, **settings,
    )  # fmt: skip
    return gradients, launch.sum_planes(planes) if needs_A else None
