"""bridge and expand in one launch, for the few tokens of decoding: y₀ = z·Bcatᵀ + added, z never stored.

Every program makes the z of its tokens again for the outputs that are its own: a launch less, and launches are most of
what decoding costs beside the base product. Two linears that read the same x (an FFN's gate and up projection) share
the launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mos_kernels.backends.triton import launch
from mos_kernels.backends.triton.bridge import bridge_tile, route_parts
from mos_kernels.backends.triton.expand import plus_added
from mos_kernels.backends.triton.geometry import guards, mapping_code
from mos_kernels.backends.triton.numerics import cast, dot

MAX_COLUMNS = 128
"""E·r, each rounded up to a power of two, up to which a program's registers hold the z of its tokens."""


@triton.jit
def _bridge_expand_tile(
    p, n, routed, kappa, gram, B, added, y, T, N, scaling,
    in_limit, in_edge, out_limit, out_edge, E: tl.constexpr, r: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr, K: tl.constexpr,
    SPLITS: tl.constexpr, ROUTE_SPLITS: tl.constexpr, ROUTE_PARTS: tl.constexpr, NORMALISE: tl.constexpr,
    SHARED: tl.constexpr, MAPPING: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(N, BLOCK_N)
    i_t, i_n = tl.program_id(0) // across, tl.program_id(0) % across
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_t, m_n = o_t < T, o_n < N
    row = o_t.to(tl.int64)[:, None]
    # B first: it waits for nothing, and comes from further away than the rest. As [columns, outputs]: the transpose of
    # a tile is brought into place for the product at once, and so waited for before anything else is loaded.
    o_c = tl.arange(0, BLOCK_E * BLOCK_R)
    column, m_c = o_c, o_c < E * r
    if r != BLOCK_R:  # the columns that pad each expert are left out
        column = o_c // BLOCK_R * r + o_c % BLOCK_R
        m_c = (o_c < E * BLOCK_R) & (o_c % BLOCK_R < r)
    b_B = tl.load(
        B + o_n[None, :].to(tl.int64) * (E * r) + column[:, None], mask=m_n[None, :] & m_c[:, None], other=0.0
    )
    z, _, _ = bridge_tile(
        p, n, routed, kappa, gram, o_t, tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_R), T, scaling,
        in_limit, in_edge, out_limit, out_edge, E, r, BLOCK_E,
        BLOCK_E, K, SPLITS, ROUTE_SPLITS, ROUTE_PARTS, NORMALISE, SHARED, MAPPING,
    )  # fmt: skip
    b_z = cast(tl.reshape(z, [BLOCK_T, BLOCK_E * BLOCK_R]), B.dtype.element_ty)
    total = dot(b_z, b_B, tl.zeros([BLOCK_T, BLOCK_N], tl.float32))
    total = plus_added(total, added, row, m_t, o_n, N, ADDED)
    tl.store(y + row * N + o_n[None, :], cast(total, y.dtype.element_ty), mask=m_t[:, None] & m_n[None, :])


@triton.jit(do_not_specialize=["T"])
def bridge_expand_kernel(
    p, n, routed, kappa, gram, B, added, y, T, N, scaling,
    in_limit, in_edge, out_limit, out_edge, E: tl.constexpr, r: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr, K: tl.constexpr,
    SPLITS: tl.constexpr, ROUTE_SPLITS: tl.constexpr, ROUTE_PARTS: tl.constexpr, NORMALISE: tl.constexpr,
    SHARED: tl.constexpr, MAPPING: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    """y[t, n] = Σ_e z[t, e] @ B[n, e] + added[n] or added[t, n]"""
    _bridge_expand_tile(
        p, n, routed, kappa, gram, B, added, y, T, N, scaling,
        in_limit, in_edge, out_limit, out_edge, E, r, BLOCK_T, BLOCK_N, BLOCK_E, BLOCK_R, K,
        SPLITS, ROUTE_SPLITS, ROUTE_PARTS, NORMALISE, SHARED, MAPPING, ADDED,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def bridge_expand_pair_kernel(
    p, n, routed, kappa, gram, B, added, kappa_2, gram_2, B_2, added_2, y, T, N, scaling,
    in_limit, in_edge, out_limit, out_edge,
    E: tl.constexpr, r: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr, K: tl.constexpr,
    SPLITS: tl.constexpr, ROUTE_SPLITS: tl.constexpr, ROUTE_PARTS: tl.constexpr, NORMALISE: tl.constexpr,
    SHARED: tl.constexpr, MAPPING: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    """y[i] of two linears i, as `bridge_expand_kernel`, with the same n and logits and p[i]."""
    is_second = tl.program_id(1) == 1
    if is_second:
        p += SPLITS * T * (r if SHARED else E * r)
        y += T * N
    _bridge_expand_tile(
        p, n, routed, tl.where(is_second, kappa_2, kappa), tl.where(is_second, gram_2, gram),
        tl.where(is_second, B_2, B), tl.where(is_second, added_2, added), y, T, N, scaling,
        in_limit, in_edge, out_limit, out_edge, E, r, BLOCK_T,
        BLOCK_N, BLOCK_E, BLOCK_R, K, SPLITS, ROUTE_SPLITS, ROUTE_PARTS, NORMALISE, SHARED, MAPPING, ADDED,
    )  # fmt: skip


def _columns(config) -> tuple[int, int]:
    """BLOCK_E and BLOCK_R: all experts and all of rank, 16 columns at least, as a product wants."""
    all_e = triton.next_power_of_2(config.num_experts)
    return all_e, max(triton.next_power_of_2(config.r), 16 // all_e)


def is_few(T: int, config) -> bool:
    """Whether bridge and expand of T tokens are one launch."""
    block_e, block_r = _columns(config)
    return launch.bucket(T) == "decode" and block_e * block_r <= MAX_COLUMNS


def bridge_expand_launch(
    p, n, routed, own_router: bool, kappa, gram, B: Tensor, added: Tensor | None, config
) -> Tensor:
    """y₀ (T, d_out) in B's dtype; p, n, routed as in `bridge_launch`, added as in `expand_launch`."""
    T, N = n.shape[1], B.shape[0]
    y = torch.empty(T, N, device=p.device, dtype=B.dtype)
    blocks, constants = _shape(n, N, B.dtype, routed, own_router, added, config)
    launch.launch(
        bridge_expand_kernel, (blocks,), p,
        (p, n, routed, kappa, gram, B, p if added is None else added, y, T, N, config.scaling, *guards(config)),
        **constants,
    )  # fmt: skip
    return y


def bridge_expand_pair_launch(p, n, routed, own_router: bool, linears, config) -> Tensor:
    """y₀ (2, T, d_out) of two linears with equal shapes and one routing. p (2, S, T, R).

    linears: (kappa, gram, B, bias or None) of each, both or neither with a bias.
    """
    (kappa, gram, B, bias), (kappa_2, gram_2, B_2, bias_2) = linears
    T, N = n.shape[1], B.shape[0]
    y = torch.empty(2, T, N, device=p.device, dtype=B.dtype)
    blocks, constants = _shape(n, N, B.dtype, routed, own_router, bias, config)
    launch.launch(
        bridge_expand_pair_kernel, (blocks, 2), p,
        (p, n, routed, kappa, gram, B, p if bias is None else bias, kappa_2, gram_2, B_2,
         p if bias is None else bias_2, y, T, N, config.scaling, *guards(config)),
        **constants,
    )  # fmt: skip
    return y


def _shape(n, N: int, dtype: torch.dtype, routed, own_router: bool, added, config) -> tuple[int, dict]:
    """How many programs a linear takes, and the constants."""
    S, T = n.shape
    settings = launch.wide_settings("bridge_expand", n.device, T, dtype)
    block_e, block_r = _columns(config)
    if block_e * block_r > MAX_COLUMNS // 2 or not config.share_a:  # or registers spill, the latter on sm_100
        settings["num_warps"] = 8
    return triton.cdiv(T, settings["BLOCK_T"]) * triton.cdiv(N, settings["BLOCK_N"]), dict(
        E=config.num_experts, r=config.r, BLOCK_E=block_e, BLOCK_R=block_r, K=config.num_experts_per_tok, SPLITS=S,
        ROUTE_SPLITS=routed.shape[0] if own_router else 1,
        ROUTE_PARTS=route_parts(routed, own_router, config), NORMALISE=config.norm_topk_prob, SHARED=config.share_a,
        MAPPING=mapping_code(config), ADDED=0 if added is None else added.dim(), **settings,
    )  # fmt: skip
