"""What every kernel needs of arithmetic: products, casts, and the same of both in Triton's interpreter."""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def dot(a, b, acc):
    """acc + a @ b, accumulated in float32; float32 operands multiply in IEEE arithmetic, never TF32."""
    if INTERPRET:  # it multiplies the raw bits of bfloat16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def cast(value, dtype: tl.constexpr):
    """A value to a wide product's dtype, to nearest even; float16 saturates, as an infinity would meet 0 as NaN."""
    if dtype == tl.float16:
        value = tl.minimum(tl.maximum(value, -65504.0, tl.PropagateNan.ALL), 65504.0, tl.PropagateNan.ALL)
    return nearest(value, dtype)


@triton.jit
def nearest(value, dtype: tl.constexpr):
    """float32 to dtype, to nearest even, as torch. Of gradients: what float16 cannot hold is infinite, and a gradient
    scaler, which looks for that, skips the step; saturated, it would take the step with the wrong gradient.
    """
    if INTERPRET and dtype == tl.bfloat16:  # its own cast truncates
        bits = value.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        value = tl.where(value == value, rounded, value)
    return value.to(dtype)


@triton.jit
def where_scalar(mask, condition):
    """mask & condition, which is a scalar."""
    mask = mask & condition
    if INTERPRET:  # Triton 3.9's makes integers of the two, and takes no integers as a mask
        mask = mask != 0
    return mask


@triton.jit
def once(tile):
    """The tile as it is, each number computed by one thread. Where a tile is wanted in another layout, as one of two
    dimensions that meets one of three, Triton computes it, and all that it was computed from, again in every thread
    that will read it; but not what a sum made.
    """
    return tl.sum(tl.expand_dims(tile, 0), 0)


@triton.jit
def settled(tile):
    """The tile of two dimensions as it is, in the layout that it has. Triton gives a product's layout to what meets
    the product and to what it reads: it converts all that was loaded for it, or computes it once for every layout.
    """
    return tl.sum(tl.reshape(tile, [tile.shape[0], tile.shape[1], 1]), 2)


@triton.jit
def saturate(squared_norm):
    """At most 1e30 (geometry.SATURATION), NaN kept."""
    return tl.minimum(squared_norm, 1e30, tl.PropagateNan.ALL)


@triton.jit
def bounded(terms):
    """Terms of dκ, held finite: at κ = 0 they grow as a squared norm, and two infinities would be a NaN."""
    return tl.minimum(tl.maximum(terms, -3.4e32, tl.PropagateNan.ALL), 3.4e32, tl.PropagateNan.ALL)


@triton.jit
def keep(seed, row, first, p, COLUMNS: tl.constexpr):
    """Which elements of x survive dropout, of the given rows and COLUMNS columns from `first` (both multiples of 4).

    Philox at an element's own place, so the mask needs no memory. Its four numbers serve four columns: it is the
    dearest part of a kernel that drops.
    """
    group = first // 4 + tl.arange(0, COLUMNS // 4)[None, :]
    place = tl.zeros([row.shape[0], COLUMNS // 4], tl.int32)
    a, b, c, d = tl.philox(tl.load(seed), row[:, None] + place, group + place, place, place)
    bits = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [row.shape[0], COLUMNS])
    return tl.uint_to_uniform_float(bits) >= p
