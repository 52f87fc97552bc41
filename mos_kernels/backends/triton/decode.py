"""bridge and expand in one launch, for the few tokens of decoding: y₀ = z·Bcatᵀ + added, z never stored.

Every program makes the z of its tokens again for the outputs that are its own: a launch less, and launches are most of
what decoding costs beside the base product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mos_kernels.backends.triton import launch
from mos_kernels.backends.triton.bridge import bridge_tile, route_parts
from mos_kernels.backends.triton.expand import plus_added
from mos_kernels.backends.triton.geometry import mapping_code
from mos_kernels.backends.triton.numerics import cast, dot

MAX_COLUMNS = 128
"""E·r, each rounded up to a power of two, up to which a program's registers hold the z of its tokens."""


@triton.jit(do_not_specialize=["T"])
def bridge_expand_kernel(
    p, n, routed, kappa, gram, B, added, y, T, N, scaling, eps, E: tl.constexpr, r: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr, K: tl.constexpr,
    SPLITS: tl.constexpr, ROUTE_PARTS: tl.constexpr, NORMALISE: tl.constexpr, SHARED: tl.constexpr,
    MAPPING: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    """y[t, n] = Σ_e z[t, e] @ B[n, e] + added[n] or added[t, n]"""
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
    z = bridge_tile(
        p, n, routed, kappa, gram, o_t, tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_R), T, scaling, eps, E, r, BLOCK_E,
        BLOCK_E, K, SPLITS, ROUTE_PARTS, NORMALISE, SHARED, MAPPING,
    )  # fmt: skip
    b_z = cast(tl.reshape(z, [BLOCK_T, BLOCK_E * BLOCK_R]), B.dtype.element_ty)
    total = dot(b_z, b_B, tl.zeros([BLOCK_T, BLOCK_N], tl.float32))
    total = plus_added(total, added, row, m_t, o_n, N, ADDED)
    tl.store(y + row * N + o_n[None, :], cast(total, y.dtype.element_ty), mask=m_t[:, None] & m_n[None, :])


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
    T, N, E, r = n.shape[1], B.shape[0], config.num_experts, config.r
    y = torch.empty(T, N, device=p.device, dtype=B.dtype)
    settings = launch.wide_settings("bridge_expand", p.device, T, B.dtype)
    block_e, block_r = _columns(config)
    if block_e * block_r > MAX_COLUMNS // 2:
        settings["num_warps"] = 8
    launch.launch(
        bridge_expand_kernel, (triton.cdiv(T, settings["BLOCK_T"]) * triton.cdiv(N, settings["BLOCK_N"]),), p,
        (p, n, routed, kappa, gram, B, p if added is None else added, y, T, N, config.scaling, config.boundary_eps),
        E=E, r=r, BLOCK_E=block_e, BLOCK_R=block_r, K=config.num_experts_per_tok, SPLITS=n.shape[0],
        ROUTE_PARTS=route_parts(routed, own_router, config), NORMALISE=config.norm_topk_prob, SHARED=config.share_a,
        MAPPING=mapping_code(config), ADDED=0 if added is None else added.dim(), **settings,
    )  # fmt: skip
    return y
