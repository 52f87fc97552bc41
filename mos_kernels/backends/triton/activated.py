"""bridge and expand in one for φ ≠ identity, where q = ‖φ(B h)‖² has no Gram form.

    v_e = B_e h_e    u_e = φ(v_e)    q_e = ‖u_e‖²    y₀ = added + Σ_e c_e u_e with c_e = (α/r) g_e e(q_e; κ_e)
    t_e = dy·u_e     dv_e = (c_e dy + 2 dq_e u_e) ⊙ φ'(v_e)    dB_e = dv_eᵀ h_e    dh_e = dv_e B_e

u is formed tile by tile in each pass and never stored: once for q (and t), once for the output (or dv).

A product takes 16 columns at least. Two experts of a rank of at most 8 are a pair: the same tile of B serves both, and
of dy where it is read, each with an h that is 0 in the columns of the other.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mos_kernels.backends.triton import launch
from mos_kernels.backends.triton.activations import CODES, activation
from mos_kernels.backends.triton.bridge import load_factors, load_n, load_p, route_parts, tile_settings
from mos_kernels.backends.triton.expand import plus_added
from mos_kernels.backends.triton.geometry import inverse_projection_scale, mapping_code, projection_scale
from mos_kernels.backends.triton.numerics import bounded, cast, dot, nearest, once, saturate, where_scalar
from mos_kernels.backends.triton.route import balance, balance_gradient, gates_backward, load_logits, top_k_gates
from mos_kernels.geometry import guard_back, guard_into


@triton.jit(do_not_specialize=["T"])
def curve_kernel(
    p, n, kappa, h, T, in_limit, in_edge, E: tl.constexpr, r: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr,
    SPLITS: tl.constexpr, SHARED: tl.constexpr, MAPPING: tl.constexpr,
):  # fmt: skip
    """h[e, t] = λ(n[t]; κ[e]) p[t]"""
    i_t, i_e = tl.program_id(0), tl.program_id(1)
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_e = i_e * BLOCK_E + tl.arange(0, BLOCK_E)
    o_r = tl.arange(0, BLOCK_R)
    m_t, row = o_t < T, o_t.to(tl.int64)
    b_kappa = tl.load(kappa + o_e, mask=o_e < E, other=0.0)
    b_n = load_n(n, o_t, m_t, T, SPLITS)[:, None]
    scale, _, _ = inverse_projection_scale(b_n, b_kappa[None, :], in_limit, in_edge, MAPPING)
    b_h = once(scale)[:, :, None] * load_p(p, row, m_t, o_e, o_r, T, E, r, SHARED, SPLITS)
    offsets = (o_e.to(tl.int64)[None, :, None] * T + row[:, None, None]) * r + o_r[None, None, :]
    mask = m_t[:, None, None] & (o_e[None, :, None] < E) & (o_r[None, None, :] < r)
    tl.store(h + offsets, cast(b_h, h.dtype.element_ty), mask=mask)


@triton.jit
def _load_h(h, row, m_t, i_e, T, o_c, r, IS_SECOND: tl.constexpr):
    """h of one expert, where the columns of its B stand in a tile of `_load_B`, and 0 elsewhere."""
    column = o_c - r if IS_SECOND else o_c
    mask = m_t[:, None] & ((column >= 0) & (column < r))[None, :]
    return tl.load(h + (tl.cast(i_e, tl.int64) * T + row[:, None]) * r + column[None, :], mask=mask, other=0.0)


@triton.jit
def _load_B(B, o_n, i_e, o_c, N, E, r, PAIR: tl.constexpr):
    """B of one expert, or of a PAIR, from the i_e-th on: both have as many columns as a product wants."""
    column = i_e * r + o_c
    mask = (o_n[:, None] < N) & ((o_c < (2 * r if PAIR else r)) & (column < E * r))[None, :]
    return tl.load(B + o_n[:, None].to(tl.int64) * (E * r) + column[None, :], mask=mask, other=0.0)


@triton.jit
def _load_dy(dy, row, m_t, o_n, N, stride_dy):
    mask = m_t[:, None] & (o_n[None, :] < N)
    return tl.load(dy + row[:, None] * stride_dy + o_n[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _of_token(t, row, m_t, i_e, T):
    """A number of every token, of one expert of t (E, T)."""
    return tl.load(t + tl.cast(i_e, tl.int64) * T + row, mask=m_t, other=0.0)


@triton.jit
def _v(h_tile, B_tile):
    return dot(h_tile, tl.trans(B_tile), tl.zeros([h_tile.shape[0], B_tile.shape[0]], tl.float32))


@triton.jit(do_not_specialize=["T"])
def activated_norm_kernel(
    h, B, dy, planes, T, N, stride_dy, E: tl.constexpr, r: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, SPLITS: tl.constexpr, PAIR: tl.constexpr,
    ACTIVATION: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """planes[0, split, e, t] = ‖u[part]‖²; in backward also planes[1, …] = dy[part]·u[part]"""
    i_t, i_e, i_s = tl.program_id(0), tl.program_id(1) * (2 if PAIR else 1), tl.program_id(2)
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_c = tl.arange(0, BLOCK_R)
    m_t, row = o_t < T, o_t.to(tl.int64)
    m_2 = where_scalar(m_t, i_e + 1 < E)
    b_h = _load_h(h, row, m_t, i_e, T, o_c, r, False)
    b_h_2 = _load_h(h, row, m_2, i_e + 1, T, o_c, r, True) if PAIR else b_h
    part = tl.cdiv(tl.cdiv(N, BLOCK_N), SPLITS) * BLOCK_N
    q, q_2 = tl.zeros([BLOCK_T], tl.float32), tl.zeros([BLOCK_T], tl.float32)
    t, t_2 = tl.zeros([BLOCK_T], tl.float32), tl.zeros([BLOCK_T], tl.float32)
    for start in range(i_s * part, tl.minimum((i_s + 1) * part, N), BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        b_B = _load_B(B, o_n, i_e, o_c, N, E, r, PAIR)
        b_dy = _load_dy(dy, row, m_t, o_n, N, stride_dy) if BACKWARD else 0.0
        u, _ = activation(_v(b_h, b_B), ACTIVATION)
        q += tl.sum(u * u, 1)
        if BACKWARD:
            t += tl.sum(b_dy * u, 1)
        if PAIR:
            u, _ = activation(_v(b_h_2, b_B), ACTIVATION)
            q_2 += tl.sum(u * u, 1)
            if BACKWARD:
                t_2 += tl.sum(b_dy * u, 1)
    plane = (i_s.to(tl.int64) * E + i_e) * T + row
    of_t = tl.cast(SPLITS, tl.int64) * E * T
    tl.store(planes + plane, q, mask=m_t)
    if BACKWARD:
        tl.store(planes + of_t + plane, t, mask=m_t)
    if PAIR:
        tl.store(planes + T + plane, q_2, mask=m_2)
        if BACKWARD:
            tl.store(planes + T + of_t + plane, t_2, mask=m_2)


@triton.jit
def _load_planes(planes, row, m_t, o_e, T, E, SPLITS: tl.constexpr):
    mask = m_t[:, None] & (o_e[None, :] < E)
    total = tl.zeros([row.shape[0], o_e.shape[0]], tl.float32)
    for s in range(SPLITS):
        total += tl.load(planes + (s * E + o_e[None, :].to(tl.int64)) * T + row[:, None], mask=mask, other=0.0)
    return total


@triton.jit(do_not_specialize=["T"])
def coefficients_kernel(
    planes, routed, kappa, loads, weight, token_mask, through_dy, through_u, drouted, dkappa, T, scaling,
    out_limit, out_edge,
    E: tl.constexpr,
    BLOCK_T: tl.constexpr, ALL_E: tl.constexpr, K: tl.constexpr, SPLITS: tl.constexpr, ROUTE_SPLITS: tl.constexpr,
    ROUTE_PARTS: tl.constexpr, NORMALISE: tl.constexpr, MAPPING: tl.constexpr, BACKWARD: tl.constexpr,
    BALANCE: tl.constexpr, MASKED: tl.constexpr, LOADS: tl.constexpr,
):  # fmt: skip
    """through_dy (E, T) = c; in backward through_u (E, T) = 2 dq, drouted, and the output scale's share of dκ."""
    o_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_e = tl.arange(0, ALL_E)
    m_t, row = o_t < T, o_t.to(tl.int64)
    m = m_t[:, None] & (o_e[None, :] < E)
    flat, of_expert = row[:, None] * E + o_e[None, :], o_e[None, :].to(tl.int64) * T + row[:, None]
    if ROUTE_PARTS == 0:
        logits = tl.load(routed + flat, mask=m, other=0.0)
        gates = logits
    else:
        logits = load_logits(routed, row, m_t, o_e, T, E, ROUTE_SPLITS, ROUTE_PARTS)
        gates = top_k_gates(logits, o_e, ALL_E, K, NORMALISE)
    b_kappa = tl.load(kappa + o_e, mask=o_e < E, other=0.0)[None, :]
    q = saturate(_load_planes(planes, row, m_t, o_e, T, E, SPLITS))
    e, e_dq, e_dkappa = projection_scale(q, b_kappa, out_limit, out_edge, MAPPING)
    tl.store(through_dy + of_expert, scaling * gates * e, mask=m)
    if BACKWARD:
        t = _load_planes(planes + tl.cast(SPLITS, tl.int64) * T * E, row, m_t, o_e, T, E, SPLITS)
        de = scaling * gates * t
        tl.store(through_u + of_expert, 2.0 * de * e_dq, mask=m)
        tl.store(dkappa + flat, bounded(de * e_dkappa), mask=m)
        b_drouted = scaling * e * t
        if ROUTE_PARTS > 0:
            b_drouted = gates_backward(b_drouted, gates, logits, o_e, ALL_E, K, NORMALISE)
            if BALANCE:
                b_drouted += balance_gradient(logits, loads, weight, token_mask, o_t, m_t, o_e, E, K, LOADS, MASKED)
        tl.store(drouted + flat, b_drouted, mask=m)


@triton.jit(do_not_specialize=["T"])
def activated_expand_kernel(
    h, B, added, through_dy, y, T, N, E: tl.constexpr, r: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PAIR: tl.constexpr,
    ACTIVATION: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    """y[t, n] = added[n] or added[t, n] + Σ_e c[t, e] φ(h[t, e] @ B[n, e])"""
    i_t, i_n = tl.program_id(0), tl.program_id(1)
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_c = tl.arange(0, BLOCK_R)
    m_t, row = o_t < T, o_t.to(tl.int64)
    total = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    total = plus_added(total, added, row[:, None], m_t, o_n, N, ADDED)
    for i_e in range(0, E, 2 if PAIR else 1):
        b_B = _load_B(B, o_n, i_e, o_c, N, E, r, PAIR)
        u, _ = activation(_v(_load_h(h, row, m_t, i_e, T, o_c, r, False), b_B), ACTIVATION)
        total += _of_token(through_dy, row, m_t, i_e, T)[:, None] * u
        if PAIR:
            m_2 = where_scalar(m_t, i_e + 1 < E)
            u, _ = activation(_v(_load_h(h, row, m_2, i_e + 1, T, o_c, r, True), b_B), ACTIVATION)
            total += _of_token(through_dy, row, m_2, i_e + 1, T)[:, None] * u
    mask = m_t[:, None] & (o_n[None, :] < N)
    tl.store(y + row[:, None] * N + o_n[None, :], cast(total, y.dtype.element_ty), mask=mask)


@triton.jit
def _dv(b_dy, h_tile, B_tile, c, d, ACTIVATION: tl.constexpr):
    """dv [tokens, outputs] of one expert."""
    u, slope = activation(_v(h_tile, B_tile), ACTIVATION)
    return nearest((c[:, None] * b_dy + d[:, None] * u) * slope, h_tile.dtype)


@triton.jit(do_not_specialize=["T"])
def activated_input_kernel(
    dy, h, B, through_dy, through_u, planes, T, N, stride_dy, E: tl.constexpr, r: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, SPLITS: tl.constexpr, PAIR: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """planes[split, t, e] = dv[t, part] @ B[part, e]"""
    i_t, i_e, i_s = tl.program_id(0), tl.program_id(1) * (2 if PAIR else 1), tl.program_id(2)
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_c = tl.arange(0, BLOCK_R)
    m_t, row = o_t < T, o_t.to(tl.int64)
    b_h = _load_h(h, row, m_t, i_e, T, o_c, r, False)
    c, d = _of_token(through_dy, row, m_t, i_e, T), _of_token(through_u, row, m_t, i_e, T)
    total = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    if PAIR:
        m_2 = where_scalar(m_t, i_e + 1 < E)
        b_h_2 = _load_h(h, row, m_2, i_e + 1, T, o_c, r, True)
        c_2, d_2 = _of_token(through_dy, row, m_2, i_e + 1, T), _of_token(through_u, row, m_2, i_e + 1, T)
        total_2 = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    part = tl.cdiv(tl.cdiv(N, BLOCK_N), SPLITS) * BLOCK_N
    for start in range(i_s * part, tl.minimum((i_s + 1) * part, N), BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        b_B, b_dy = _load_B(B, o_n, i_e, o_c, N, E, r, PAIR), _load_dy(dy, row, m_t, o_n, N, stride_dy)
        total = dot(_dv(b_dy, b_h, b_B, c, d, ACTIVATION), b_B, total)
        if PAIR:
            total_2 = dot(_dv(b_dy, b_h_2, b_B, c_2, d_2, ACTIVATION), b_B, total_2)
    if PAIR:
        total = tl.where(o_c[None, :] < r, total, total_2)
    _store_columns(planes, i_s.to(tl.int64) * T + row, m_t, i_e, o_c, total, E, r, PAIR)


@triton.jit
def _store_columns(planes, row, m_row, i_e, o_c, total, E, r, PAIR: tl.constexpr):
    """planes[row, e] of one expert, or of a PAIR, from the i_e-th on."""
    column = i_e * r + o_c
    mask = m_row[:, None] & ((o_c < (2 * r if PAIR else r)) & (column < E * r))[None, :]
    tl.store(planes + row[:, None] * (E * r) + column[None, :], total, mask=mask)


@triton.jit(do_not_specialize=["T"])
def activated_weight_kernel(
    dy, h, B, through_dy, through_u, planes, T, N, stride_dy, E: tl.constexpr, r: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, SPLITS: tl.constexpr, PAIR: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """planes[split, n, e] = Σ_t dv[t, n] h[t, e], over the split's tokens"""
    i_n, i_e, i_s = tl.program_id(0), tl.program_id(1) * (2 if PAIR else 1), tl.program_id(2)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_c = tl.arange(0, BLOCK_R)
    b_B = _load_B(B, o_n, i_e, o_c, N, E, r, PAIR)
    part = tl.cdiv(tl.cdiv(T, BLOCK_T), SPLITS) * BLOCK_T
    total = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    for start in range(i_s * part, tl.minimum((i_s + 1) * part, T), BLOCK_T):
        o_t = start + tl.arange(0, BLOCK_T)
        m_t, row = o_t < T, o_t.to(tl.int64)
        b_dy = _load_dy(dy, row, m_t, o_n, N, stride_dy)
        b_h = _load_h(h, row, m_t, i_e, T, o_c, r, False)
        c, d = _of_token(through_dy, row, m_t, i_e, T), _of_token(through_u, row, m_t, i_e, T)
        total = dot(tl.trans(_dv(b_dy, b_h, b_B, c, d, ACTIVATION)), b_h, total)
        if PAIR:  # into the same sum: the columns of the other expert are 0
            m_2 = where_scalar(m_t, i_e + 1 < E)
            b_h = _load_h(h, row, m_2, i_e + 1, T, o_c, r, True)
            c, d = _of_token(through_dy, row, m_2, i_e + 1, T), _of_token(through_u, row, m_2, i_e + 1, T)
            total = dot(tl.trans(_dv(b_dy, b_h, b_B, c, d, ACTIVATION)), b_h, total)
    _store_columns(planes, i_s.to(tl.int64) * N + o_n, o_n < N, i_e, o_c, total, E, r, PAIR)


@triton.jit(do_not_specialize=["T"])
def uncurve_kernel(
    planes, p, n, kappa, projection_dkappa, dp, dn, dkappa, T, in_limit, in_edge, E: tl.constexpr, r: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr, ALL_E: tl.constexpr,
    SPLITS: tl.constexpr, SHARED: tl.constexpr, MAPPING: tl.constexpr,
):  # fmt: skip
    """dp, dn and dκ of a token from dh and from the projection's share of dκ.

    Not into that share itself: a number that several warps hold is read by each of them, and written by one.
    """
    o_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_r = tl.arange(0, BLOCK_R)
    m_t, row = o_t < T, o_t.to(tl.int64)
    b_n = load_n(n, o_t, m_t, T, 1)
    total_dn = tl.zeros([BLOCK_T], tl.float32)
    total_dp = tl.zeros([BLOCK_T, 1, BLOCK_R], tl.float32)
    for i_e in range(ALL_E // BLOCK_E):
        o_e = i_e * BLOCK_E + tl.arange(0, BLOCK_E)
        m_e = m_t[:, None] & (o_e[None, :] < E)
        mask = m_e[:, :, None] & (o_r[None, None, :] < r)
        b_kappa = tl.load(kappa + o_e, mask=o_e < E, other=0.0)[None, :]
        scale, scale_dn, scale_dkappa = inverse_projection_scale(b_n[:, None], b_kappa, in_limit, in_edge, MAPPING)
        offsets = (row[:, None, None] * E + o_e[None, :, None]) * r + o_r[None, None, :]
        dh = load_factors(planes, row, m_t, o_e, o_r, T, E, r, SPLITS)
        dscale = once(tl.sum(dh * load_p(p, row, m_t, o_e, o_r, T, E, r, SHARED, 1), 2))
        total_dn += tl.sum(dscale * scale_dn, 1)
        flat = row[:, None] * E + o_e[None, :]
        held = tl.load(projection_dkappa + flat, mask=m_e, other=0.0)
        tl.store(dkappa + flat, held + bounded(dscale * scale_dkappa), mask=m_e)
        if SHARED:
            total_dp += tl.sum(scale[:, :, None] * dh, 1)[:, None, :]
        else:
            tl.store(dp + offsets, scale[:, :, None] * dh, mask=mask)
    if SHARED:
        m_p = m_t[:, None, None] & (o_r[None, None, :] < r)
        tl.store(dp + row[:, None, None] * r + o_r[None, None, :], total_dp, mask=m_p)
    tl.store(dn + o_t, total_dn, mask=m_t)


def _settings(kernel: str, h: Tensor, T: int) -> dict:
    most = 32 if h.dtype == torch.float32 else 256
    tokens = 16 if most == 32 and h.shape[-1] > 64 else most
    return launch.wide_settings(kernel, h.device, T, h.dtype, BLOCK_T=tokens, BLOCK_N=most)


def _curve(p, n, kappa, dtype: torch.dtype, config) -> Tensor:
    """h (E, T, r)."""
    T, E, r = n.shape[1], config.num_experts, config.r
    h = torch.empty(E, T, r, device=p.device, dtype=dtype)
    tile = tile_settings(config, T, p.device, "curve")
    grid = (triton.cdiv(T, tile["BLOCK_T"]), tile.pop("ALL_E") // tile["BLOCK_E"])
    tile.pop("K")
    launch.launch(
        curve_kernel, grid, p, (p, n, kappa, h, T, *guard_into(config)),
        E=E, r=r, SPLITS=n.shape[0], SHARED=config.share_a, MAPPING=mapping_code(config), **tile,
    )  # fmt: skip
    return h


def _norms(h: Tensor, B: Tensor, dy: Tensor | None, config) -> Tensor:
    """q, and with dy also t: planes (1 or 2, S, E, T)."""
    (E, T, _), N = h.shape, B.shape[0]
    settings, common = _settings("activated_norm", h, T), _constants(config)
    kinds, splits = (1 if dy is None else 2), settings["SPLITS"]
    planes = torch.empty(kinds, splits, E, T, device=h.device, dtype=torch.float32)
    launch.launch(
        activated_norm_kernel, (triton.cdiv(T, settings["BLOCK_T"]), _programs(common), splits), h,
        (h, B, h if dy is None else dy, planes, T, N, 0 if dy is None else dy.stride(0)),
        BACKWARD=dy is not None, **common, **settings,
    )  # fmt: skip
    return planes


def _constants(config) -> dict:
    """Two experts are a PAIR where one would fill no more than half of a product's columns."""
    E, r = config.num_experts, config.r
    block_r = launch.block(r, 16, 128)
    return {
        "E": E, "r": r, "BLOCK_R": block_r, "PAIR": E > 1 and 2 * r <= block_r, "ACTIVATION": CODES[config.activation]
    }  # fmt: skip


def _programs(constants: dict) -> int:
    """Experts, or pairs of them."""
    return triton.cdiv(constants["E"], 2 if constants["PAIR"] else 1)


def _coefficients(planes, routed, own_router: bool, kappa, aux_weight, token_mask, config) -> tuple[Tensor, ...]:
    """c (E, T); with t also 2 dq (E, T), drouted (T, E) and the output scale's share of dκ (T, E)."""
    kinds, splits, E, T = planes.shape

    def empty(*shape: int) -> Tensor:
        return torch.empty(*shape, device=planes.device, dtype=torch.float32)

    through_dy = empty(E, T)
    through_u, drouted, dkappa = (empty(E, T), empty(T, E), empty(T, E)) if kinds == 2 else (planes,) * 3
    loads, weight, mask, constants = balance(routed, aux_weight, token_mask, config)
    parts = route_parts(routed, own_router, config)
    settings, all_e = launch.settings("route", planes.device, T), triton.next_power_of_2(E)
    tile = 2048 if splits == 1 else 256  # each plane of q and t holds a tile in registers at once
    settings["BLOCK_T"] = min(settings["BLOCK_T"], max(tile // all_e, 1))
    launch.launch(
        coefficients_kernel, (triton.cdiv(T, settings["BLOCK_T"]),), planes,
        (planes, routed, kappa, loads, weight, mask, through_dy, through_u, drouted, dkappa, T, config.scaling,
         *guard_back(config)),
        E=E, ALL_E=all_e, K=config.num_experts_per_tok, SPLITS=splits,
        ROUTE_SPLITS=routed.shape[0] if parts else 1, ROUTE_PARTS=parts, NORMALISE=config.norm_topk_prob,
        MAPPING=mapping_code(config), BACKWARD=kinds == 2, **constants, **settings,
    )  # fmt: skip
    return through_dy, through_u, drouted, dkappa


def activated_launch(p, n, routed, own_router: bool, kappa, B: Tensor, added: Tensor | None, config) -> Tensor:
    """y₀ (T, d_out) in B's dtype; added as in `expand_launch`."""
    h = _curve(p, n, kappa, B.dtype, config)
    (_, T, _), N = h.shape, B.shape[0]
    through_dy, *_ = _coefficients(_norms(h, B, None, config), routed, own_router, kappa, None, None, config)
    y = torch.empty(T, N, device=h.device, dtype=h.dtype)
    settings = _settings("activated_expand", h, T)
    launch.launch(
        activated_expand_kernel, (triton.cdiv(T, settings["BLOCK_T"]), triton.cdiv(N, settings["BLOCK_N"])), h,
        (h, B, h if added is None else added, through_dy, y, T, N),
        ADDED=0 if added is None else added.dim(), **_constants(config), **settings,
    )  # fmt: skip
    return y


def activated_backward_launch(
    dy: Tensor, p, n, routed, own_router: bool, kappa, B: Tensor, aux_weight: Tensor | None, token_mask, config
) -> tuple[Tensor, ...]:
    """drouted (T, E), dκ (E,), dn (T,), dp (T, R) and dB (d_out, E, r). dy (T, d_out), rows dense."""
    h = _curve(p, n, kappa, B.dtype, config)
    (E, T, r), N, device = h.shape, B.shape[0], h.device
    planes = _norms(h, B, dy, config)
    through_dy, through_u, drouted, dkappa = _coefficients(
        planes, routed, own_router, kappa, aux_weight, token_mask, config
    )
    common = _constants(config)
    arguments = (T, N, dy.stride(0))

    settings = _settings("activated_input", h, T)
    dh = torch.empty(settings["SPLITS"], T, E, r, device=device, dtype=torch.float32)
    grid = (triton.cdiv(T, settings["BLOCK_T"]), _programs(common), settings["SPLITS"])
    launch.launch(
        activated_input_kernel, grid, h, (dy, h, B, through_dy, through_u, dh, *arguments), **common, **settings
    )
    settings = _settings("activated_weight", h, T)
    dB = torch.empty(settings["SPLITS"], N, E, r, device=device, dtype=torch.float32)
    grid = (triton.cdiv(N, settings["BLOCK_N"]), _programs(common), settings["SPLITS"])
    launch.launch(
        activated_weight_kernel, grid, h, (dy, h, B, through_dy, through_u, dB, *arguments), **common, **settings
    )
    dp = torch.empty(p.shape[1:], device=device, dtype=torch.float32)
    dn = torch.empty(T, device=device, dtype=torch.float32)
    projection_dkappa, dkappa = dkappa, torch.empty_like(dkappa)
    tile = tile_settings(config, T, device, "curve")
    tile.pop("K")
    launch.launch(
        uncurve_kernel, (triton.cdiv(T, tile["BLOCK_T"]),), h,
        (dh, p, n, kappa, projection_dkappa, dp, dn, dkappa, T, *guard_into(config)),
        E=E, r=r, SPLITS=dh.shape[0], SHARED=config.share_a, MAPPING=mapping_code(config), **tile,
    )  # fmt: skip
    return drouted, dkappa.sum(0), dn, dp, launch.sum_planes(dB)
