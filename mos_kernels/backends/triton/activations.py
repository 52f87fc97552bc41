"""φ and φ' of the activations that the kernels compute: between A and B of an expert, and in an FFN."""

from __future__ import annotations

import triton
import triton.language as tl

TANH, SILU, GELU, GELU_TANH = 0, 1, 2, 3
CODES = {"tanh": TANH, "silu": SILU, "gelu": GELU, "gelu_tanh": GELU_TANH}

_TANH = tl.constexpr(TANH)
_SILU = tl.constexpr(SILU)
_GELU_TANH = tl.constexpr(GELU_TANH)


@triton.jit
def activation(v, ACTIVATION: tl.constexpr):
    """φ(v) and φ'(v)."""
    if ACTIVATION == _TANH:
        a = tl.abs(v)
        s = v * v
        small = v * (1.0 + s * (-1.0 / 3 + s * (2.0 / 15 + s * (-17.0 / 315 + s * (62.0 / 2835)))))
        large = 1.0 - 2.0 / (tl.exp(2.0 * tl.minimum(a, 20.0)) + 1.0)
        u = tl.where(a < 0.25, small, tl.where(v < 0.0, -large, large))
        return tl.where(v == v, u, v), 1.0 - u * u
    if ACTIVATION == _SILU:
        s = _sigmoid(v)
        return v * s, s * (1.0 + v * (1.0 - s))
    if ACTIVATION == _GELU_TANH:  # v σ(2 √(2/π) (v + 0.044715 v³)); at the bound of v² the sigmoid is 0 or 1
        square = tl.minimum(v * v, 1e4)
        s = _sigmoid(v * (1.5957691216057308 + 0.07135481627260025 * square))
        return v * s, s + v * s * (1.0 - s) * (1.5957691216057308 + 0.21406444881780073 * square)
    below, density = _normal(v)
    return v * below, below + v * density


@triton.jit
def _sigmoid(v):
    """In fewer instructions than tl.sigmoid, whose division is exact."""
    return 1.0 / (1.0 + tl.exp2(v * -1.4426950408889634))


@triton.jit
def _normal(v):
    """Φ(v) and its density, without a branch: at that of tl.erf, between its two formulas, the lanes of a warp part.

    Φ(-a) e^(a²/2) (a + 2) is smooth in w = (a - 2) / (a + 2): a polynomial, fitted at Chebyshev's points of w.
    """
    inverse = 1.0 / (tl.abs(v) + 2.0)
    w = 1.0 - 4.0 * inverse
    tail = 0.00062539993 + w * 0.00012148632
    tail = -0.0018459195 + w * (0.0007598505 + w * tail)
    tail = -0.0004917812 + w * (-0.006694298 + w * tail)
    tail = 0.028799044 + w * (0.03671178 + w * tail)
    tail = 0.672408 + w * (-0.33140412 + w * tail)
    bell = tl.exp(-0.5 * v * v)
    tail *= inverse * bell
    return tl.where(v < 0.0, tail, 1.0 - tail), bell * 0.3989422804014327
