"""The mappings of `mos_kernels.geometry` inside a kernel: two functions of a = κ‖·‖² and one radial guard."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from mos_kernels import geometry

STEREOGRAPHIC_BALL, STEREOGRAPHIC_RAW, EXP_LOG = 0, 1, 2

_STEREOGRAPHIC_RAW = tl.constexpr(STEREOGRAPHIC_RAW)
_EXP_LOG = tl.constexpr(EXP_LOG)
_LOW_EXP = tl.constexpr(-(geometry.EXP_LOG_HOLD**2))
_LOW_EXP_EDGE = tl.constexpr(math.sinh(geometry.EXP_LOG_HOLD))
_HALF_PI = tl.constexpr(1.5707963267948966)
# enough for float32 within the radius of each series
_EXP_TERMS = tl.constexpr(8)
_LOG_TERMS = tl.constexpr(14)


def mapping_code(config) -> int:
    """The constant by which a kernel knows its mapping and domain."""
    if config.mapping == "exp_log":
        return EXP_LOG
    return STEREOGRAPHIC_RAW if config.domain == "raw" else STEREOGRAPHIC_BALL


def guards(config) -> tuple[float, float, float, float]:
    """Limit and edge of the way into the space, and of the way back, as arguments of a kernel."""
    return *geometry.guard_into(config), *geometry.guard_back(config)


@triton.jit
def inverse_projection_scale(n, kappa, limit, edge, MAPPING: tl.constexpr):
    """λ, ∂λ/∂n, ∂λ/∂κ for squared norms n and curvatures kappa that broadcast; limit, edge: `geometry.guard_into`."""
    a = kappa * n
    if MAPPING == _EXP_LOG:
        held = tl.minimum(tl.maximum(a, _LOW_EXP), limit)
        value, slope = _exp_scale(held)
        value, slope = _radial_guard(a, held, value, slope, tl.where(a < 0.0, _LOW_EXP_EDGE, edge))
    elif MAPPING == _STEREOGRAPHIC_RAW:
        divisor = 1.0 + a
        inside = tl.abs(divisor) >= limit
        value = tl.div_rn(2.0 + 0.0 * a, tl.where(inside, divisor, 1.0))
        value = tl.where(inside, value, tl.where(divisor < 0.0, -edge, edge))
        value = tl.where(a == a, value, a)
        slope = tl.where(inside, value * value * -0.5, 0.0)
    else:
        held = tl.maximum(a, limit)
        value = tl.div_rn(2.0 + 0.0 * held, 1.0 + held)
        value, slope = _radial_guard(a, held, value, value * value * -0.5, edge)
    return value, tl.where(n < 1e30, kappa * slope, 0.0), n * slope


@triton.jit
def projection_scale(q, kappa, limit, edge, MAPPING: tl.constexpr):
    """e, ∂e/∂q, ∂e/∂κ for squared norms q and curvatures kappa that broadcast; limit, edge: `geometry.guard_back`."""
    a = kappa * q
    held = tl.minimum(a, limit)
    if MAPPING == _EXP_LOG:
        value, slope = _log_scale(held)
    else:
        w = tl.sqrt_rn(1.0 - held)
        value = tl.div_rn(1.0 + 0.0 * w, 1.0 + w)
        slope = value * tl.div_rn(value, 2.0 * w)
    value, slope = _radial_guard(a, held, value, slope, edge)
    return value, tl.where(q < 1e30, kappa * slope, 0.0), q * slope


@triton.jit
def _radial_guard(a, held, value, slope, edge):
    inside = a == held
    safe = tl.where(inside, 1.0, a)
    value = tl.div_rn(tl.where(inside, value, edge), tl.sqrt_rn(tl.abs(safe)))
    return value, tl.where(inside, slope, tl.div_rn(value * -0.5, safe))


@triton.jit
def _series(a, TERMS: tl.constexpr, SINE: tl.constexpr):
    """Value and slope of Σ c_k aᵏ, from the ratios c_{k+1} / c_k of sin(t)/t or asin(t)/t with a = t²."""
    value = tl.zeros_like(a) + 1.0
    slope = tl.zeros_like(a)
    for i in tl.static_range(TERMS - 1):
        k = TERMS - 2 - i
        ratio = 1.0 / ((2 * k + 2) * (2 * k + 3))
        ratio = -ratio if SINE else (2 * k + 1) * (2 * k + 1) * ratio
        slope = ratio * (value + a * slope)
        value = 1.0 + ratio * a * value
    return value, slope


@triton.jit
def _exp_scale(a):
    near = a > -1.0  # the series holds up to (π/2)², and the guard holds a below that: no sine with its range reduction
    series, series_slope = _series(tl.where(near, a, 0.0), _EXP_TERMS, True)
    far = tl.where(near, -1.0, a)
    t = tl.sqrt_rn(-far)
    grow = tl.exp(tl.minimum(t, 12.0))
    decay = tl.div_rn(1.0 + 0.0 * grow, grow)
    value = tl.div_rn(0.5 * (grow - decay), t)
    slope = tl.div_rn(0.5 * (grow + decay) - value, 2.0 * far)
    return tl.where(near, series, value), tl.where(near, series_slope, slope)


@triton.jit
def _log_scale(a):
    near = tl.abs(a) < 0.25
    series, series_slope = _series(tl.where(near, a, 0.0), _LOG_TERMS, False)
    far = tl.where(near, 0.5, a)
    t = tl.sqrt_rn(tl.abs(far))
    asinh = tl.log(t + tl.sqrt_rn(1.0 + tl.abs(far)))
    # asin(t) = π/2 - 2 asin(s) with s² = (1 - t)/2 <= 1/4, where the series holds
    s_squared = tl.maximum(0.5 * (1.0 - t), 0.0)
    quotient, _ = _series(tl.where(s_squared <= 0.25, s_squared, 0.0), _LOG_TERMS, False)
    asin = _HALF_PI - 2.0 * tl.sqrt_rn(s_squared) * quotient
    value = tl.div_rn(tl.where(a < 0.0, asinh, asin), t)
    w = tl.sqrt_rn(tl.maximum(1.0 - far, 1e-30))
    slope = tl.div_rn(tl.div_rn(1.0 + 0.0 * w, w) - value, 2.0 * far)
    return tl.where(near, series, value), tl.where(near, series_slope, slope)
