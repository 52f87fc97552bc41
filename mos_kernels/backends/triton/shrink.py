"""shrink: x -> p, n, logits, in one pass over x; and its backward, in one more.

    p = A·drop(x)    n = ‖x‖²    logits = Router·x
    dx₀ = drop(dp·A) + dlogits·Router + 2 dn x    dA = dpᵀ drop(x)    dRouter = dlogitsᵀ x

A and Router are read as one stack of rows, so that two ranks under 16 fill a tile instead of padding two; so are the A
of two linears that read the same x (PAIR: `A` holds the first half of R rows, `A_2` the second). A router meets a
half-precision x as two rows in x's dtype, its rounding and what the rounding lost (times LOW_SCALE).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mos_kernels.backends.eager import operand
from mos_kernels.backends.triton import launch
from mos_kernels.backends.triton.numerics import cast, dot, keep, nearest, once, saturate, settled

LOW_SCALE = tl.constexpr(2048.0)  # float16 would lose the low part of a small weight to its subnormals


@triton.jit
def stack_part(
    A, A_2, router, stack, first, step, D, R: tl.constexpr, E: tl.constexpr, SPLIT_ROUTER: tl.constexpr,
    PAIR: tl.constexpr,
):  # fmt: skip
    """stack = [A; Router] or [A; high(Router); low(Router)], in its dtype; each `step`-th of its tiles from `first`."""
    rows: tl.constexpr = R + (2 * E if SPLIT_ROUTER else E)
    across = tl.cdiv(D, 128)
    for tile in range(first, tl.cdiv(rows, 16) * across, step):
        o_c, o_d = tile // across * 16 + tl.arange(0, 16), tile % across * 128 + tl.arange(0, 128)
        b_w = _stacked_rows(A, A_2, router, o_c, o_d, D, R, E, stack.dtype.element_ty, SPLIT_ROUTER, PAIR)
        offsets = o_c[:, None].to(tl.int64) * D + o_d[None, :]
        tl.store(stack + offsets, b_w, mask=(o_c[:, None] < rows) & (o_d[None, :] < D))


@triton.jit
def _stacked_rows(
    A, A_2, router, rows, columns, D, R: tl.constexpr, E: tl.constexpr, dtype: tl.constexpr,
    SPLIT_ROUTER: tl.constexpr, PAIR: tl.constexpr,
):  # fmt: skip
    """Rows of [A; Router], or of [A; high(Router); low(Router)], as [rows, columns] in dtype."""
    inside = columns[None, :] < D
    total = tl.zeros([rows.shape[0], columns.shape[0]], tl.float32)
    if R > 0:
        starts = A + rows.to(tl.int64) * D
        if PAIR:
            starts = tl.where(rows < R // 2, starts, A_2 + (rows - R // 2).to(tl.int64) * D)
        total += tl.load(starts[:, None] + columns[None, :], mask=inside & (rows[:, None] < R), other=0.0).to(
            tl.float32
        )
    if E > 0:
        is_low = rows >= R + E
        row = tl.where(is_low, rows - R - E, rows - R)
        is_router = (rows >= R) & (row < E)
        offsets = row[:, None].to(tl.int64) * D + columns[None, :]
        from_router = tl.load(router + offsets, mask=inside & is_router[:, None], other=0.0).to(tl.float32)
        if SPLIT_ROUTER:
            low = (from_router - cast(from_router, dtype).to(tl.float32)) * LOW_SCALE
            from_router = tl.where(is_low[:, None], low, from_router)
        total += from_router
    return cast(total, dtype)


@triton.jit
def _load_rows(stack, rows, columns, D, ROWS: tl.constexpr):
    """Rows of the stack as `stack_part` left it, [rows, columns]: copied to where the product reads them."""
    mask = (rows[:, None] < ROWS) & (columns[None, :] < D)
    return tl.load(stack + rows[:, None].to(tl.int64) * D + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _load_x(x, row, m_t, columns, last, stride_x):
    mask = m_t[:, None] & (columns[None, :] < last)
    return tl.load(x + row[:, None] * stride_x + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _squares(tile):
    """Squares of a tile of x, added up over the numbers that a thread loads at once."""
    EACH: tl.constexpr = 128 // tile.dtype.primitive_bitwidth
    wide = tile.to(tl.float32)
    return tl.sum(tl.reshape(wide * wide, [tile.shape[0], tile.shape[1] // EACH, EACH]), 2)


@triton.jit(do_not_specialize=["T"])
def shrink_kernel(
    x, A, A_2, router, stack, p, n, logits, seed, T, D, stride_x, dropout_p, R: tl.constexpr, E: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, SPLITS: tl.constexpr,
    SPLIT_ROUTER: tl.constexpr, DROPOUT: tl.constexpr, PAIR: tl.constexpr, STACKED: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """(p, logits)[split, t] = x[t, part] @ stack[:, part].T;  n[split, t] = ‖x[t, part]‖²

    STACKED: the stack lies ready. AHEAD: x is loaded into registers a step before it is used, and not copied to shared
    memory: what Triton copies there for a product of `mma.sync` and for other uses too has conflicts of banks.
    """
    i_t, i_s, i_c = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_t = o_t < T
    row = o_t.to(tl.int64)
    dtype = x.dtype.element_ty
    part = tl.cdiv(tl.cdiv(D, BLOCK_D), SPLITS) * BLOCK_D
    first, last = i_s * part, tl.minimum((i_s + 1) * part, D)
    total = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    EACH: tl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth
    squares = tl.zeros([BLOCK_T, BLOCK_D // EACH], tl.float32)
    if AHEAD:
        b_next = _load_x(x, row, m_t, first + tl.arange(0, BLOCK_D), last, stride_x)
    for start in range(first, last, BLOCK_D):
        o_d = start + tl.arange(0, BLOCK_D)
        if AHEAD:
            b_x = b_next
            b_next = _load_x(x, row, m_t, o_d + BLOCK_D, last, stride_x)
        else:
            b_x = _load_x(x, row, m_t, o_d, D, stride_x)
        if STACKED:
            b_w = _load_rows(stack, o_c, o_d, D, R + (2 * E if SPLIT_ROUTER else E))
        else:
            b_w = _stacked_rows(A, A_2, router, o_c, o_d, D, R, E, dtype, SPLIT_ROUTER, PAIR)
        if R > 0:
            squares += _squares(b_x)
        if DROPOUT:
            kept = keep(seed, o_t, start, dropout_p, BLOCK_D)
            dropped = cast(tl.where(kept, b_x.to(tl.float32) * (1.0 / (1.0 - dropout_p)), 0.0), dtype)
            if dtype == tl.float32:  # Triton 3.6 takes what a reshape laid out, as `keep` is, to TF32 on sm_100
                dropped = once(dropped)
            total = dot(dropped, tl.trans(tl.where(o_c[:, None] < R, b_w, 0.0)), total)
            if E > 0:
                total = dot(b_x, tl.trans(tl.where(o_c[:, None] < R, 0.0, b_w)), total)
        else:
            total = dot(b_x, tl.trans(b_w), total)
    plane = i_s.to(tl.int64) * T + row
    if R > 0:
        offsets = plane[:, None] * R + o_c[None, :]
        if PAIR:
            linear, of_linear = o_c // (R // 2), o_c % (R // 2)
            offsets = (linear[None, :] * SPLITS * T + plane[:, None]) * (R // 2) + of_linear[None, :]
        tl.store(p + offsets, total, mask=m_t[:, None] & (o_c[None, :] < R))
        if i_c == 0:
            tl.store(n + plane, saturate(tl.sum(squares, 1)), mask=m_t)
    if E > 0:
        width = 2 * E if SPLIT_ROUTER else E
        o_l = o_c - R
        tl.store(
            logits + plane[:, None] * width + o_l[None, :],
            tl.where(o_l[None, :] >= E, total / LOW_SCALE, total),
            mask=m_t[:, None] & (o_l[None, :] >= 0) & (o_l[None, :] < width),
        )


def empty_stack(As: list[Tensor], router: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, dict]:
    """Room for the stack of one or two A (R, d_in) and a router (E, d_in), and the constants by which it is made."""
    (R, D), E, split = As[0].shape, 0 if router is None else router.shape[0], dtype != torch.float32
    rows = len(As) * R + (2 * E if split else E)
    constants = {"R": len(As) * R, "ROUTED": E, "SPLIT_ROUTER": E > 0 and split}
    return torch.empty(rows, D, device=As[0].device, dtype=dtype), constants


def stacked(As: list[Tensor], router: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What `stack_part` makes, where there is no launch that it could be part of."""
    found = [operand(A, dtype) for A in As]
    if router is not None:
        found.append(operand(router, dtype))
        if dtype != torch.float32:
            found.append(operand((router.float() - found[-1].float()) * LOW_SCALE.value, dtype))
    return torch.cat(found)


def shrink_launch(
    x: Tensor,
    A: Tensor | None,
    router: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    splits_allowed: bool,
    A_2: Tensor | None = None,
    stack: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Planes p (S, T, R), n (S, T) and logits (S, T, E or 2E); S = 1 unless splits are allowed. x (T, D).

    A_2: a second linear's, of A's shape and dtype; p is (2, S, T, R) then. stack: what `stack_part` made of them.
    """
    (T, D), device = x.shape, x.device
    each, E = (0 if A is None else A.shape[0]), (0 if router is None else router.shape[0])
    R = each if A_2 is None else 2 * each
    split_router = E > 0 and x.dtype != torch.float32
    columns = R + (2 * E if split_router else E)
    block_c = launch.block(columns, 16, 64 if A_2 is None else 32)
    wide, dropping, pair = x.dtype == torch.float32, seed is not None, A_2 is not None
    few = launch.bucket(T) == "decode"
    most = 256 if block_c <= 16 else 64 if stack is None or few and block_c > 32 else 128
    if wide or dropping:
        narrow = block_c > 32 or wide and dropping or pair and not few
        most = 32 if narrow else 64
    settings = launch.wide_settings("shrink", device, T, x.dtype, BLOCK_D=most)
    splits = settings.pop("SPLITS") if splits_allowed else 1
    settings.update(SPLITS=splits, AHEAD=R > 0 and not dropping and (wide or bool(settings["AHEAD"])))
    linears, sources = () if A_2 is None else (2,), (A, A_2, router) if stack is None else (None,) * 3
    p = torch.empty(*linears, splits, T, each, device=device, dtype=torch.float32)
    n = torch.empty(splits, T, device=device, dtype=torch.float32)
    logits = torch.empty(splits, T, columns - R, device=device, dtype=torch.float32)
    grid = (triton.cdiv(T, settings["BLOCK_T"]), splits, triton.cdiv(columns, block_c))
    launch.launch(
        shrink_kernel, grid, x,
        (x, *(x if t is None else t for t in (*sources, stack)), p, n, logits, x if seed is None else seed, T, D,
         x.stride(0), dropout_p),
        R=R, E=E, BLOCK_C=block_c, SPLIT_ROUTER=split_router, DROPOUT=dropping, PAIR=pair, STACKED=stack is not None,
        **settings,
    )  # fmt: skip
    return p, n, logits


@triton.jit(do_not_specialize=["T"])
def shrink_backward_kernel(
    x, A, A_2, router, dp, dn, dlogits, dx, planes, seed, T, D, stride_x, dropout_p, R: tl.constexpr, E: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, SPLITS: tl.constexpr,
    NEEDS_DX: tl.constexpr, NEEDS_DW: tl.constexpr, DROPOUT: tl.constexpr, COLUMN_BLOCKS: tl.constexpr,
    PAIR: tl.constexpr,
):  # fmt: skip
    """dx[t] = (dp, dlogits)[t] @ stack + 2 dn[t] x[t];  planes[split] = (dp, dlogits)[part].T @ x[part]

    A program owns BLOCK_D columns of x and walks its part of the tokens, so x is read once.
    """
    i_d, i_s, i_c = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    dtype = x.dtype.element_ty
    part = tl.cdiv(tl.cdiv(T, BLOCK_T), SPLITS) * BLOCK_T
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    if NEEDS_DX and COLUMN_BLOCKS == 1:
        b_w = _stacked_rows(A, A_2, router, o_c, o_d, D, R, E, dtype, False, PAIR)
    for start in range(i_s * part, tl.minimum((i_s + 1) * part, T), BLOCK_T):
        o_t = start + tl.arange(0, BLOCK_T)
        m_t = o_t < T
        row = o_t.to(tl.int64)
        mask = m_t[:, None] & m_d[None, :]
        b_x = tl.load(x + row[:, None] * stride_x + o_d[None, :], mask=mask, other=0.0)
        factor = 1.0
        if DROPOUT:
            factor = tl.where(keep(seed, o_t, i_d * BLOCK_D, dropout_p, BLOCK_D), 1.0 / (1.0 - dropout_p), 0.0)
        b_d = _stacked_gradients(dp, dlogits, row, m_t, o_c, R, E, dtype)
        if NEEDS_DW:
            if DROPOUT:
                b_dropped = cast(b_x.to(tl.float32) * factor, dtype)
                total = dot(tl.trans(tl.where(o_c[None, :] < R, b_d, 0.0)), b_dropped, total)
                total = dot(tl.trans(tl.where(o_c[None, :] < R, 0.0, b_d)), b_x, total)
            else:
                total = dot(tl.trans(b_d), b_x, total)
        if NEEDS_DX:
            b_dx = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
            if COLUMN_BLOCKS == 1:
                b_dx = _through_rows(b_d, b_w, b_dx, factor, o_c, R, DROPOUT)
                _store_dx(b_dx, dx, dn, b_x, o_t, o_d, m_t, mask, D, R)
            elif i_c == 0:
                for j in range(COLUMN_BLOCKS):
                    o_j = j * BLOCK_C + tl.arange(0, BLOCK_C)
                    b_j = _stacked_gradients(dp, dlogits, row, m_t, o_j, R, E, dtype)
                    b_w = _stacked_rows(A, A_2, router, o_j, o_d, D, R, E, dtype, False, PAIR)
                    b_dx = _through_rows(b_j, b_w, b_dx, factor, o_j, R, DROPOUT)
                _store_dx(b_dx, dx, dn, b_x, o_t, o_d, m_t, mask, D, R)
    if NEEDS_DW:
        plane = i_s.to(tl.int64) * (R + E) + o_c
        tl.store(planes + plane[:, None] * D + o_d[None, :], total, mask=(o_c[:, None] < R + E) & m_d[None, :])


@triton.jit
def _stacked_gradients(dp, dlogits, row, m_t, columns, R: tl.constexpr, E: tl.constexpr, dtype: tl.constexpr):
    """Columns of (dp, dlogits) for the given tokens, [tokens, columns] in dtype, infinite where it cannot hold them."""
    total = tl.zeros([row.shape[0], columns.shape[0]], tl.float32)
    if R > 0:
        mask = m_t[:, None] & (columns[None, :] < R)
        total += tl.load(dp + row[:, None] * R + columns[None, :], mask=mask, other=0.0)
    if E > 0:
        o_e = columns - R
        mask = m_t[:, None] & (o_e[None, :] >= 0) & (o_e[None, :] < E)
        total += tl.load(dlogits + row[:, None] * E + o_e[None, :], mask=mask, other=0.0)
    return settled(nearest(total, dtype))


@triton.jit
def _through_rows(b_d, b_w, total, factor, columns, R: tl.constexpr, DROPOUT: tl.constexpr):
    """total + drop(dp·A) + dlogits·Router"""
    if DROPOUT:
        through_A = dot(tl.where(columns[None, :] < R, b_d, 0.0), b_w, tl.zeros(total.shape, tl.float32))
        total += through_A * factor
        b_d = tl.where(columns[None, :] < R, 0.0, b_d)
    return dot(b_d, b_w, total)


@triton.jit
def _store_dx(b_dx, dx, dn, b_x, o_t, o_d, m_t, mask, D, R: tl.constexpr):
    if R > 0:
        b_n = tl.load(dn + o_t, mask=m_t, other=0.0)
        b_dx += (2.0 * b_n)[:, None] * b_x.to(tl.float32)
    tl.store(dx + o_t.to(tl.int64)[:, None] * D + o_d[None, :], nearest(b_dx, dx.dtype.element_ty), mask=mask)


def shrink_backward_launch(
    x: Tensor,
    A: Tensor | None,
    router: Tensor | None,
    dp: Tensor | None,
    dn: Tensor | None,
    dlogits: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    needs_dx: bool,
    needs_dw: bool,
    A_2: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """dx₀ (T, D) in x's dtype and the stacked (dA, dRouter) (R + E, D) in float32, where needed.

    A_2: a second linear's, of A's shape and dtype; dp is (T, R) of both, and dn their sum.
    """
    (T, D), device = x.shape, x.device
    each, E = (0 if A is None else A.shape[0]), (0 if dlogits is None else dlogits.shape[1])
    R = each if A_2 is None else 2 * each
    dropping, wide = seed is not None, x.dtype == torch.float32
    block_c = launch.block(R + E, 16, 32 if dropping or wide else 64)
    settings = launch.wide_settings(
        "shrink_backward", device, T, x.dtype,
        BLOCK_T=16 if dropping and wide and R + E > 32 else 32 if dropping or wide or block_c > 16 else 128,
        BLOCK_D=32 if block_c > 32 or (dropping or wide) and R + E > 32 or dropping and wide else 256,
    )  # fmt: skip
    if dropping and wide and launch.bucket(T) == "decode":  # or registers spill; few tokens are few steps
        settings["num_stages"] = 1
    if R + E > 32:  # the stacked rows of a tile take the shared memory, or the registers, of a stage
        settings["num_stages"] = min(settings["num_stages"], 2)
    if block_c > 32:  # registers read x beside dW's product: Triton gives it a buffer too few (docs/compiled-code.md)
        settings["num_stages"] = 1
    splits = settings.pop("SPLITS")
    blocks = triton.cdiv(R + E, block_c)
    dx = torch.empty(T, D, device=device, dtype=x.dtype) if needs_dx else None
    planes = torch.empty(splits, R + E, D, device=device, dtype=torch.float32) if needs_dw else None
    grid = (triton.cdiv(D, settings["BLOCK_D"]), splits, blocks if needs_dw else 1)
    launch.launch(
        shrink_backward_kernel, grid, x,
        (x, x if A is None else A, x if A_2 is None else A_2, x if router is None else router, x if dp is None else dp,
         x if dn is None else dn, x if dlogits is None else dlogits, x if dx is None else dx,
         x if planes is None else planes, x if seed is None else seed, T, D, x.stride(0), dropout_p),
        R=R, E=E, BLOCK_C=block_c, SPLITS=splits, NEEDS_DX=needs_dx, NEEDS_DW=needs_dw, DROPOUT=dropping,
        COLUMN_BLOCKS=blocks, PAIR=A_2 is not None, **settings,
    )  # fmt: skip
    return dx, launch.sum_planes(planes) if needs_dw else None
