"""bridge: p, n, routed, κ, G -> z, everything curved and everything routed, in E·r float32 numbers a token.

    gates = top-k softmax(logits)    h_e = λ(n; κ_e) p    q_e = h_eᵀ G_e h_e    z_e = (α/r) g_e e(q_e; κ_e) h_e

and its backward (the equations stand at `eager.bridge_backward`). A tile is [BLOCK_T tokens, BLOCK_E experts, BLOCK_R
of rank]. A product with G is a sum over one index of rank at a time: at these sizes nearly free, exact in float32, no
padding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mos_kernels.backends.triton import launch
from mos_kernels.backends.triton.geometry import guards, inverse_projection_scale, mapping_code, projection_scale
from mos_kernels.backends.triton.numerics import bounded, cast, dot, once, saturate
from mos_kernels.backends.triton.route import (
    balance,
    balance_gradient,
    gates_backward,
    load_logits,
    top_k_gates,
)
from mos_kernels.config import MoSConfig


@triton.jit
def take(full, o_all, o_e):
    """full[:, o_e] of a tile [tokens, all experts]."""
    return tl.sum(tl.where(o_all[None, :, None] == o_e[None, None, :], full[:, :, None], 0.0), 1)


@triton.jit
def put(part, o_all, o_e):
    """The tile [tokens, all experts] that holds `part` at o_e and 0 elsewhere."""
    return tl.sum(tl.where(o_all[None, :, None] == o_e[None, None, :], part[:, None, :], 0.0), 2)


@triton.jit
def load_p(p, row, m_t, o_e, o_r, T, E, r, SHARED: tl.constexpr, SPLITS: tl.constexpr):
    """p [tokens, 1 or experts, rank], planes added up in a fixed order."""
    mask = m_t[:, None, None] & (o_r[None, None, :] < r)
    if SHARED:
        total = tl.load(p + row[:, None, None] * r + o_r[None, None, :], mask=mask, other=0.0)
        for s in tl.static_range(1, SPLITS):
            total += tl.load(p + (s * T + row[:, None, None]) * r + o_r[None, None, :], mask=mask, other=0.0)
    else:
        total = load_factors(p, row, m_t, o_e, o_r, T, E, r, SPLITS)
    return total


@triton.jit
def load_factors(planes, row, m_t, o_e, o_r, T, E: tl.constexpr, r: tl.constexpr, SPLITS: tl.constexpr):
    """A tile [tokens, experts, rank] of planes (SPLITS, T, E, r), added up in a fixed order."""
    if o_e.shape[0] == E and o_r.shape[0] == r:  # all of a token: a warp takes whole tokens, and sums of one stay in it
        columns = tl.arange(0, E * r)[None, :]
        total = tl.load(planes + row[:, None] * (E * r) + columns, mask=m_t[:, None], other=0.0)
        for s in tl.static_range(1, SPLITS):
            total += tl.load(planes + (s * T + row[:, None]) * (E * r) + columns, mask=m_t[:, None], other=0.0)
        total = tl.reshape(total, [row.shape[0], E, r])
    else:
        mask = m_t[:, None, None] & (o_e[None, :, None] < E) & (o_r[None, None, :] < r)
        offsets = (row[:, None, None] * E + o_e[None, :, None]) * r + o_r[None, None, :]
        total = tl.load(planes + offsets, mask=mask, other=0.0)
        for s in tl.static_range(1, SPLITS):
            offsets = ((s * T + row[:, None, None]) * E + o_e[None, :, None]) * r + o_r[None, None, :]
            total += tl.load(planes + offsets, mask=mask, other=0.0)
    return total


@triton.jit
def store_factors(t, tile, row, m_t, o_e, o_r, E: tl.constexpr, r: tl.constexpr):
    """A tile [tokens, experts, rank] into t (T, E, r)."""
    tile = cast(tile, t.dtype.element_ty)
    if o_e.shape[0] == E and o_r.shape[0] == r:
        columns = tl.arange(0, E * r)[None, :]
        tl.store(t + row[:, None] * (E * r) + columns, tl.reshape(tile, [row.shape[0], E * r]), mask=m_t[:, None])
    else:
        mask = m_t[:, None, None] & (o_e[None, :, None] < E) & (o_r[None, None, :] < r)
        tl.store(t + (row[:, None, None] * E + o_e[None, :, None]) * r + o_r[None, None, :], tile, mask=mask)


@triton.jit
def load_n(n, o_t, m_t, T, SPLITS: tl.constexpr):
    total = tl.load(n + o_t, mask=m_t, other=0.0)
    for s in tl.static_range(1, SPLITS):
        total += tl.load(n + s * T + o_t, mask=m_t, other=0.0)
    return saturate(total)


@triton.jit
def _gram_times(
    p, b_p, gram, scale, row, m_t, o_e, o_r, T, E: tl.constexpr, r: tl.constexpr,
    SHARED: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """G h / trace [tokens, experts, rank] with h = scale·p, and the trace [experts]; b_p is the tile of p."""
    total = tl.zeros([row.shape[0], o_e.shape[0], o_r.shape[0]], tl.float32)
    if r <= 8 and SHARED:  # all of G stays in registers, and is loaded once
        rows = ()
        diagonal = tl.zeros([1, o_e.shape[0], o_r.shape[0]], tl.float32)
        for j in tl.static_range(r):
            b_g = _gram_row(gram, j, o_e, o_r, E, r)
            rows = rows + (b_g,)
            diagonal += tl.where(o_r[None, None, :] == j, b_g, 0.0)
        trace = tl.sum(tl.sum(diagonal, 2), 0)
        inverse = _inverse(trace)
        for j in tl.static_range(r):
            column = _column(p, b_p, j, row, m_t, o_e, o_r, T, E, r, SHARED, SPLITS)
            total += scale[:, :, None] * column * (rows[j] * inverse)
    else:
        trace = _load_trace(gram, o_e, o_r, E, r)
        inverse = _inverse(trace)
        for j in range(r):
            column = _column(p, b_p, j, row, m_t, o_e, o_r, T, E, r, SHARED, SPLITS)
            total += scale[:, :, None] * column * (_gram_row(gram, j, o_e, o_r, E, r) * inverse)
    return total, trace


@triton.jit
def _gram_row(gram, j, o_e, o_r, E, r):
    """Row j of each G, [1, experts, rank]."""
    mask = (o_e[None, :, None] < E) & (o_r[None, None, :] < r)
    return tl.load(gram + (o_e[None, :, None] * r + j) * r + o_r[None, None, :], mask=mask, other=0.0)


@triton.jit
def _load_trace(gram, o_e, o_r, E, r):
    diagonal = gram + (o_e[:, None] * r + o_r[None, :]) * r + o_r[None, :]
    return tl.sum(tl.load(diagonal, mask=(o_e[:, None] < E) & (o_r[None, :] < r), other=0.0), 1)


@triton.jit
def _inverse(trace):
    return tl.div_rn(1.0 + 0.0 * trace, tl.maximum(trace, 1e-37))[None, :, None]


@triton.jit
def _column(p, b_p, j, row, m_t, o_e, o_r, T, E, r, SHARED: tl.constexpr, SPLITS: tl.constexpr):
    """p at j of the rank, [tokens, 1 or experts, 1]."""
    if SPLITS == 1:
        column = load_p(p, row, m_t, o_e, j + tl.arange(0, 1), T, E, r, SHARED, 1)
    else:  # out of the tile, which costs less than adding up its planes again
        column = tl.sum(tl.where(o_r[None, None, :] == j, b_p, 0.0), 2)[:, :, None]
    return column


@triton.jit
def _squared_output_norm(h, unit_gh, trace):
    """q = hᵀGh, guarded. A huge h is scaled down on the way: terms that overflow with both signs add up to NaN."""
    huge = tl.max(tl.abs(h), 2) > 1099511627776.0
    down = tl.where(huge, 8.470329472543003e-22, 1.0)[:, :, None]  # 2**-70
    up = tl.where(huge, 1180591620717411303424.0, 1.0)
    q = tl.sum((h * down) * (unit_gh * down), 2) * trace[None, :] * up * up
    return saturate(tl.maximum(q, 0.0, tl.PropagateNan.ALL))


@triton.jit
def bridge_tile(
    p, n, routed, kappa, gram, o_t, o_e, o_r, T, scaling,
    in_limit, in_edge, out_limit, out_edge, E: tl.constexpr, r: tl.constexpr,
    BLOCK_E: tl.constexpr, ALL_E: tl.constexpr, K: tl.constexpr, SPLITS: tl.constexpr, ROUTE_SPLITS: tl.constexpr,
    ROUTE_PARTS: tl.constexpr, NORMALISE: tl.constexpr, SHARED: tl.constexpr, MAPPING: tl.constexpr,
):  # fmt: skip
    """z [tokens o_t, experts o_e, rank o_r] = scaling · g · e(q) · h, 0 where there is no expert or rank; p and n."""
    m_t, row = o_t < T, o_t.to(tl.int64)
    b_kappa = tl.load(kappa + o_e, mask=o_e < E, other=0.0)
    gates = _load_gates(routed, row, m_t, o_e, T, E, BLOCK_E, ALL_E, K, ROUTE_SPLITS, ROUTE_PARTS, NORMALISE)
    b_n = load_n(n, o_t, m_t, T, SPLITS)[:, None]
    scale, _, _ = inverse_projection_scale(b_n, b_kappa[None, :], in_limit, in_edge, MAPPING)
    scale = once(scale)
    b_p = load_p(p, row, m_t, o_e, o_r, T, E, r, SHARED, SPLITS)
    if SPLITS > 1:  # or the planes are added up again in each layout, which does not fit the registers
        b_p = once(b_p)
    h = scale[:, :, None] * b_p
    unit_gh, trace = _gram_times(p, b_p, gram, scale, row, m_t, o_e, o_r, T, E, r, SHARED, SPLITS)
    q = _squared_output_norm(h, unit_gh, trace)
    e, _, _ = projection_scale(once(q), b_kappa[None, :], out_limit, out_edge, MAPPING)
    return once(scaling * gates * e)[:, :, None] * h, b_p, b_n


@triton.jit(do_not_specialize=["T"])
def bridge_kernel(
    p, n, routed, kappa, gram, kappa_2, gram_2, z, p_sum, n_sum, T, scaling, in_limit, in_edge, out_limit, out_edge,
    E: tl.constexpr, r: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr,
    ALL_E: tl.constexpr, K: tl.constexpr, SPLITS: tl.constexpr, ROUTE_SPLITS: tl.constexpr, ROUTE_PARTS: tl.constexpr,
    NORMALISE: tl.constexpr, SHARED: tl.constexpr, MAPPING: tl.constexpr, PAIR: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """z[t, e] = scaling · g[t, e] · e(q) · h

    PAIR: z[i] of two linears i, from p[i] and the same n and gates. SUMS: the planes of p and n added up, too.
    """
    o_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    o_r = tl.arange(0, BLOCK_R)
    if PAIR:
        is_second = tl.program_id(2) == 1
        tokens = tl.where(is_second, T.to(tl.int64), 0)
        p += tokens * (SPLITS * r if SHARED else SPLITS * E * r)
        z += tokens * (E * r)
        kappa, gram = tl.where(is_second, kappa_2, kappa), tl.where(is_second, gram_2, gram)
    b_z, b_p, b_n = bridge_tile(
        p, n, routed, kappa, gram, o_t, o_e, o_r, T, scaling,
        in_limit, in_edge, out_limit, out_edge, E, r, BLOCK_E, ALL_E, K, SPLITS, ROUTE_SPLITS, ROUTE_PARTS,
        NORMALISE, SHARED, MAPPING,
    )  # fmt: skip
    row, m_t = o_t.to(tl.int64), o_t < T
    store_factors(z, b_z, row, m_t, o_e, o_r, E, r)
    if SUMS:
        if SHARED:
            if tl.program_id(1) == 0:
                mask = m_t[:, None, None] & (o_r[None, None, :] < r)
                tl.store(p_sum + row[:, None, None] * r + o_r[None, None, :], b_p, mask=mask)
        else:
            store_factors(p_sum, b_p, row, m_t, o_e, o_r, E, r)
        if tl.program_id(1) == 0:
            tl.store(n_sum + row[:, None], b_n, mask=m_t[:, None])


@triton.jit
def _load_gates(
    routed, row, m_t, o_e, T, E,
    BLOCK_E: tl.constexpr, ALL_E: tl.constexpr, K: tl.constexpr, SPLITS: tl.constexpr,
    ROUTE_PARTS: tl.constexpr, NORMALISE: tl.constexpr,
):  # fmt: skip
    """Gates of the experts o_e: from logits in ROUTE_PARTS parts, or as given where that is 0."""
    if ROUTE_PARTS == 0:
        mask = m_t[:, None] & (o_e[None, :] < E)
        return tl.load(routed + row[:, None] * E + o_e[None, :], mask=mask, other=0.0)
    o_all = tl.arange(0, ALL_E)
    logits = load_logits(routed, row, m_t, o_all, T, E, SPLITS, ROUTE_PARTS)
    gates = top_k_gates(logits, o_all, ALL_E, K, NORMALISE)
    if BLOCK_E == ALL_E:
        return gates
    return take(gates, o_all, o_e)


@triton.jit(do_not_specialize=["T"])
def bridge_backward_kernel(
    dz, p, n, routed, kappa, gram, kappa_2, gram_2, loads, weight, token_mask, added, dp, dn, drouted, dq_scale, dkappa,
    T, scaling, in_limit, in_edge, out_limit, out_edge,
    E: tl.constexpr, r: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr, ALL_E: tl.constexpr, K: tl.constexpr,
    ROUTE_PARTS: tl.constexpr, NORMALISE: tl.constexpr, SHARED: tl.constexpr, MAPPING: tl.constexpr,
    DZ_PLANES: tl.constexpr, BALANCE: tl.constexpr, MASKED: tl.constexpr, LOADS: tl.constexpr, LINEARS: tl.constexpr,
    ADDED: tl.constexpr, GATES_ONLY: tl.constexpr,
):  # fmt: skip
    """dp, dn, drouted of a token; dq λ² and its share of dκ, which `bridge_reduce_kernel` sums over tokens.

    LINEARS: as many linears i read one x and have one n and one routing: dz[i], p[i], dp[t, i], and sums over them of
    dn and of the gates' gradients. ADDED: those of a further linear are added. GATES_ONLY: they are drouted.
    """
    o_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_all = tl.arange(0, ALL_E)
    o_r = tl.arange(0, BLOCK_R)
    m_t, row = o_t < T, o_t.to(tl.int64)
    m_all = m_t[:, None] & (o_all[None, :] < E)
    width = r if SHARED else E * r  # of a linear's p
    b_n = load_n(n, o_t, m_t, T, 1)
    if ROUTE_PARTS == 0:
        logits = tl.load(routed + row[:, None] * E + o_all[None, :], mask=m_all, other=0.0)
        gates = logits
    else:
        logits = load_logits(routed, row, m_t, o_all, T, E, 1, ROUTE_PARTS)
        gates = top_k_gates(logits, o_all, ALL_E, K, NORMALISE)
    dgates = tl.zeros([BLOCK_T, ALL_E], tl.float32)
    if ADDED:
        dgates += tl.load(added + row[:, None] * E + o_all[None, :], mask=m_all, other=0.0)
    total_dn = tl.zeros([BLOCK_T], tl.float32)
    for i_l in range(LINEARS):
        if LINEARS > 1:
            kappa_l, gram_l = tl.where(i_l == 1, kappa_2, kappa), tl.where(i_l == 1, gram_2, gram)
        else:
            kappa_l, gram_l = kappa, gram
        before = T.to(tl.int64) * i_l
        p_l, dz_l = p + before * width, dz + before * (DZ_PLANES * E * r)
        total_dp = tl.zeros([BLOCK_T, 1, BLOCK_R], tl.float32)
        for i_e in range(ALL_E // BLOCK_E):
            o_e = i_e * BLOCK_E + tl.arange(0, BLOCK_E)
            m_e = m_t[:, None] & (o_e[None, :] < E)
            mask = m_e[:, :, None] & (o_r[None, None, :] < r)
            b_kappa = tl.load(kappa_l + o_e, mask=o_e < E, other=0.0)[None, :]
            b_gates = gates if BLOCK_E == ALL_E else take(gates, o_all, o_e)
            scale, scale_dn, scale_dkappa = inverse_projection_scale(b_n[:, None], b_kappa, in_limit, in_edge, MAPPING)
            scale = once(scale)
            b_p = load_p(p_l, row, m_t, o_e, o_r, T, E, r, SHARED, 1)
            h = scale[:, :, None] * b_p
            unit_gh, trace = _gram_times(p_l, b_p, gram_l, scale, row, m_t, o_e, o_r, T, E, r, SHARED, 1)
            q = _squared_output_norm(h, unit_gh, trace)
            e, e_dq, e_dkappa = projection_scale(once(q), b_kappa, out_limit, out_edge, MAPPING)

            b_dz = load_factors(dz_l, row, m_t, o_e, o_r, T, E, r, DZ_PLANES)
            dz_h = once(tl.sum(b_dz * h, 2))
            de = scaling * b_gates * dz_h
            dq = de * e_dq
            through_z, through_q = once(scaling * b_gates * e), once(2.0 * dq * trace[None, :])
            dh = through_z[:, :, None] * b_dz + through_q[:, :, None] * unit_gh
            dscale = once(tl.sum(dh * b_p, 2))
            total_dn += tl.sum(dscale * scale_dn, 1)
            if SHARED:
                total_dp += tl.sum(scale[:, :, None] * dh, 1)[:, None, :]
            else:
                offsets = ((row[:, None, None] * LINEARS + i_l) * E + o_e[None, :, None]) * r + o_r[None, None, :]
                tl.store(dp + offsets, scale[:, :, None] * dh, mask=mask)
            by_expert = before * E + o_e[None, :].to(tl.int64) * T + row[:, None]  # as `bridge_reduce_kernel` reads
            tl.store(dq_scale + by_expert, dq * scale * scale, mask=m_e)
            tl.store(dkappa + by_expert, bounded(de * e_dkappa) + bounded(dscale * scale_dkappa), mask=m_e)
            b_dgates = scaling * e * dz_h
            dgates += b_dgates if BLOCK_E == ALL_E else put(b_dgates, o_all, o_e)
        if SHARED:
            m_p = m_t[:, None, None] & (o_r[None, None, :] < r)
            offsets = (row[:, None, None] * LINEARS + i_l) * r + o_r[None, None, :]
            tl.store(dp + offsets, total_dp, mask=m_p)
    tl.store(dn + o_t, total_dn, mask=m_t)
    b_drouted = dgates
    if ROUTE_PARTS > 0 and not GATES_ONLY:
        b_drouted = gates_backward(dgates, gates, logits, o_all, ALL_E, K, NORMALISE)
        if BALANCE:
            b_drouted += balance_gradient(logits, loads, weight, token_mask, o_t, m_t, o_all, E, K, LOADS, MASKED)
    tl.store(drouted + row[:, None] * E + o_all[None, :], b_drouted, mask=m_all)


@triton.jit
def _bridge_reduce_part(
    p, dq_scale, dkappa, plane, T, i_e, i_s, E: tl.constexpr, r: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, SPLITS: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """plane = (Σ_t dq λ² p pᵀ, Σ_t dκ) of expert i_e over the split's tokens."""
    o_r = tl.arange(0, BLOCK_R)
    m_r = o_r[None, :] < r
    part = tl.cdiv(tl.cdiv(T, BLOCK_T), SPLITS) * BLOCK_T
    total = tl.zeros([BLOCK_R, BLOCK_R], tl.float32)
    total_kappa = tl.zeros([BLOCK_T], tl.float32)
    for start in range(i_s * part, tl.minimum((i_s + 1) * part, T), BLOCK_T):
        o_t = start + tl.arange(0, BLOCK_T)
        m_t, row = o_t < T, o_t.to(tl.int64)
        by_expert = i_e.to(tl.int64) * T + row
        b_w = tl.load(dq_scale + by_expert, mask=m_t, other=0.0)
        total_kappa += tl.load(dkappa + by_expert, mask=m_t, other=0.0)
        base = row * r if SHARED else (row * E + i_e) * r
        b_p = tl.load(p + base[:, None] + o_r[None, :], mask=m_t[:, None] & m_r, other=0.0)
        total = dot(tl.trans(b_w[:, None] * b_p), b_p, total)
    tl.store(plane + o_r[:, None] * r + o_r[None, :], total, mask=(o_r[:, None] < r) & m_r)
    tl.store(plane + r * r, bounded(tl.sum(total_kappa, 0)))  # or the sum of the planes may be infinite


@triton.jit(do_not_specialize=["T"])
def bridge_reduce_kernel(
    p, dq_scale, dkappa, planes, T, E: tl.constexpr, r: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, SPLITS: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """planes[split, e] = (Σ_t dq λ² p pᵀ, Σ_t dκ) over the split's tokens."""
    i_e, i_s = tl.program_id(0), tl.program_id(1)
    plane = planes + (i_s * E + i_e).to(tl.int64) * (r * r + 1)
    _bridge_reduce_part(p, dq_scale, dkappa, plane, T, i_e, i_s, E, r, BLOCK_T, BLOCK_R, SPLITS, SHARED)


@triton.jit(do_not_specialize=["T"])
def bridge_reduces_kernel(
    p, dq_scale, dkappa, p_h, dq_scale_h, dkappa_h, planes, T, E: tl.constexpr, r: tl.constexpr, r_h: tl.constexpr,
    READS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_R_H: tl.constexpr, SPLITS: tl.constexpr,
    SHARED: tl.constexpr, SHARED_H: tl.constexpr,
):  # fmt: skip
    """`bridge_reduce_kernel` of the READS linears of an FFN that read its input, and of the one (h) after them."""
    i_e, i_s, i_l = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    size: tl.constexpr = E * (r * r + 1)
    plane = planes + i_s * (READS * size + E * (r_h * r_h + 1))
    if i_l < READS:
        before = T.to(tl.int64) * i_l
        p += before * (r if SHARED else E * r)
        plane += i_l * size + i_e * (r * r + 1)
        _bridge_reduce_part(
            p, dq_scale + before * E, dkappa + before * E, plane, T, i_e, i_s, E, r, BLOCK_T, BLOCK_R, SPLITS, SHARED
        )
    else:
        plane += READS * size + i_e * (r_h * r_h + 1)
        _bridge_reduce_part(p_h, dq_scale_h, dkappa_h, plane, T, i_e, i_s, E, r_h, BLOCK_T, BLOCK_R_H, SPLITS, SHARED_H)


def tile_settings(config, T: int, device, kernel: str) -> dict:
    """Tile shapes: as many experts at a time as keep a token's part of the tile within TOKEN_TILE numbers."""
    settings = launch.settings(kernel, device, T)
    block_r, all_e = triton.next_power_of_2(config.r), triton.next_power_of_2(config.num_experts)
    tile = settings.pop("TILE")
    block_e = min(all_e, max(settings.pop("TOKEN_TILE") // block_r, 1))
    settings["BLOCK_T"] = min(max(tile // (block_e * block_r), 1), 64)
    if block_r > 64:
        settings["num_warps"] = 8
    return {**settings, "BLOCK_E": block_e, "BLOCK_R": block_r, "ALL_E": all_e, "K": config.num_experts_per_tok}


def route_parts(routed: Tensor, own_router: bool, config) -> int:
    """In how many parts the logits lie; 0 where gates are given."""
    return routed.shape[-1] // config.num_experts if own_router else 0


def bridge_launch(p, n, routed, own_router: bool, kappa, gram, dtype: torch.dtype, config) -> Tensor:
    """z (T, E·r) in dtype, from planes p (S, T, …), n (S, T) and logits (S, T, …), or gates (T, E)."""
    return _bridge_launch(p, n, routed, own_router, [kappa], [gram], dtype, config, False)[0]


def bridge_pair_launch(p, n, routed, own_router: bool, kappas, grams, dtype: torch.dtype, config) -> Tensor:
    """z (2, T, E·r) of two linears that read one x, as `bridge_launch`; p (2, S, T, …), the same n and routing."""
    return _bridge_launch(p, n, routed, own_router, kappas, grams, dtype, config, False)[0]


def bridge_sums_launch(p, n, routed, own_router: bool, kappa, gram, dtype, config) -> tuple[Tensor, Tensor, Tensor]:
    """As `bridge_launch`, and p (1, T, …) and n (1, T), their planes added up."""
    return _bridge_launch(p, n, routed, own_router, [kappa], [gram], dtype, config, n.shape[0] > 1)


def _bridge_launch(p, n, routed, own_router: bool, kappas, grams, dtype, config, sums: bool):
    T, E, r, linears = n.shape[1], config.num_experts, config.r, len(kappas)
    z = torch.empty(*(() if linears == 1 else (2,)), T, E * r, device=p.device, dtype=dtype)
    p_sum, n_sum = (torch.empty_like(t[:1]) for t in (p, n)) if sums else (p, n)
    tile = tile_settings(config, T, p.device, "bridge")
    launch.launch(
        bridge_kernel, (triton.cdiv(T, tile["BLOCK_T"]), tile["ALL_E"] // tile["BLOCK_E"], linears), p,
        (p, n, routed, kappas[0], grams[0], kappas[-1], grams[-1], z, p_sum, n_sum, T, config.scaling, *guards(config)),
        E=E, r=r, SPLITS=n.shape[0], ROUTE_SPLITS=routed.shape[0] if own_router else 1,
        ROUTE_PARTS=route_parts(routed, own_router, config), NORMALISE=config.norm_topk_prob, SHARED=config.share_a,
        MAPPING=mapping_code(config), PAIR=linears == 2, SUMS=sums, **tile,
    )  # fmt: skip
    return z, p_sum, n_sum


class BridgeSums(NamedTuple):
    """What a linear's backward has yet to sum over tokens, into M and dκ."""

    p: Tensor  # planes of one, (1, T, R), or (2, 1, T, R) of two linears
    dq_scale: Tensor  # (L, E, T)
    dkappa: Tensor  # (L, E, T)
    config: MoSConfig


def bridge_backward_launch(
    dz: Tensor,
    p,
    n,
    routed,
    own_router: bool,
    kappa,
    gram,
    aux_weight: Tensor | None,
    token_mask: Tensor | None,
    config,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """drouted (T, E), dκ (E,), dn (T,), dp (T, R) and M (E, r, r). dz in planes (S, T, E·r)."""
    drouted, dn, dp, sums = bridge_backward_parts_launch(
        dz[None], p, n, routed, own_router, [kappa], [gram], aux_weight, token_mask, config
    )
    T, E, r = n.shape[1], config.num_experts, config.r
    settings = _reduce_settings(p.device, T, r)
    planes = torch.empty(settings["SPLITS"], E, r * r + 1, device=p.device, dtype=torch.float32)
    launch.launch(
        bridge_reduce_kernel, (E, settings["SPLITS"]), p, (p, sums.dq_scale, sums.dkappa, planes, T),
        E=E, r=r, BLOCK_R=launch.block(r, 16, 128), SHARED=config.share_a, **settings,
    )  # fmt: skip
    reduced = launch.sum_planes(planes)
    return drouted, reduced[:, r * r], dn, dp, reduced[:, : r * r].unflatten(1, (r, r))


def bridge_backward_parts_launch(
    dz: Tensor,
    p,
    n,
    routed,
    own_router: bool,
    kappas,
    grams,
    aux_weight: Tensor | None,
    token_mask: Tensor | None,
    config,
    added: Tensor | None = None,
    gates_only: bool = False,
) -> tuple[Tensor, Tensor, Tensor, BridgeSums]:
    """drouted (T, E), dn (T,) and dp (T, L·R) of L linears that read one x, one or two; M and dκ are to be summed.

    dz (L, S, T, E·r); p (2, 1, T, …) of two linears, or (1, T, …). added (T, E): gradients of the gates from elsewhere.
    gates_only: drouted is the gradient of the gates, though logits made them.
    """
    T, E, r, device, linears = n.shape[1], config.num_experts, config.r, p.device, len(kappas)

    def empty(*shape):
        return torch.empty(*shape, device=device, dtype=torch.float32)

    dp, dn, drouted = empty(T, linears * (r if config.share_a else E * r)), empty(T), empty(T, E)
    dq_scale, dkappa = empty(linears, E, T), empty(linears, E, T)
    loads, weight, mask, constants = balance(routed, aux_weight, token_mask, config)
    tile = tile_settings(config, T, device, "bridge_backward")
    if linears == 2 and tile["BLOCK_R"] >= 64:  # or registers spill
        tile["num_warps"] = 4 if tile["BLOCK_R"] > 64 and tile["BLOCK_E"] > 2 else 8
    launch.launch(
        bridge_backward_kernel, (triton.cdiv(T, tile["BLOCK_T"]),), p,
        (dz, p, n, routed, kappas[0], grams[0], kappas[-1], grams[-1], loads, weight, mask,
         p if added is None else added, dp, dn, drouted, dq_scale, dkappa, T, config.scaling, *guards(config)),
        E=E, r=r, ROUTE_PARTS=route_parts(routed, own_router, config), NORMALISE=config.norm_topk_prob,
        SHARED=config.share_a, MAPPING=mapping_code(config), DZ_PLANES=dz.shape[1], LINEARS=linears,
        ADDED=added is not None, GATES_ONLY=gates_only, **constants, **tile,
    )  # fmt: skip
    return drouted, dn, dp, BridgeSums(p, dq_scale, dkappa, config)


def _reduce_settings(device: torch.device, T: int, rank: int) -> dict:
    settings = launch.settings("bridge_reduce", device, T)
    if rank > 64:  # the accumulator alone would fill a thread's registers
        settings["num_warps"] = 8
    return settings


def bridge_reduces_launch(reads: BridgeSums, last: BridgeSums) -> tuple[Tensor, Tensor, list[Tensor]]:
    """dκ (L, E) of the L linears of an FFN that read its input, dκ (E,) of the last, and M (E, r, r) of each."""
    (linears, E, T), r, r_h = reads.dq_scale.shape, reads.config.r, last.config.r
    settings, device = _reduce_settings(reads.p.device, T, max(r, r_h)), reads.p.device
    of_reads, of_last = linears * E * (r * r + 1), E * (r_h * r_h + 1)
    planes = torch.empty(settings["SPLITS"], of_reads + of_last, device=device, dtype=torch.float32)
    launch.launch(
        bridge_reduces_kernel, (E, settings["SPLITS"], linears + 1), reads.p, (*reads[:3], *last[:3], planes, T),
        E=E, r=r, r_h=r_h, READS=linears, BLOCK_R=launch.block(r, 16, 128), BLOCK_R_H=launch.block(r_h, 16, 128),
        SHARED=reads.config.share_a, SHARED_H=last.config.share_a, **settings,
    )  # fmt: skip
    reduced, reduced_h = launch.sum_planes(planes).split([of_reads, of_last])
    reduced, reduced_h = reduced.view(linears, E, r * r + 1), reduced_h.view(E, r_h * r_h + 1)
    Ms = [*reduced[..., : r * r].unflatten(2, (r, r)), reduced_h[:, : r_h * r_h].unflatten(1, (r_h, r_h))]
    return reduced[..., r * r], reduced_h[:, r_h * r_h], Ms
