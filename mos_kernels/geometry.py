"""A mapping between Euclidean and curved space: the two radial scales, their derivatives and their guards.

Every mapping here is radial: it multiplies a vector by a scale. The scale depends only on the product a of the
curvature κ and the squared norm:

    into the space   s = λ x,  λ = f(κ‖x‖²)         out of it   o = e u,  e = f(κ‖u‖²)

So ∂/∂‖·‖² = κ f'(a) and ∂/∂κ = ‖·‖² f'(a). A mapping consists of two functions of one number. The rest of the package
does not depend on which mapping is used.

Guards are radial projections. Beyond a limit l of a, the vector is projected onto the sphere a = l. The scale is then
edge / √|a| with edge = f(l) √|l|, and its derivative is -scale / (2a). Limits and edges depend only on `boundary_eps`.
They are computed in float64, because close to the pole f at the rounded limit differs from f(l).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

SATURATION = 1e30
"""Squared norms are limited to this: an infinite one times κ = 0 would be NaN."""

EXP_LOG_HOLD = math.asinh(2.0**15)
"""Largest √(−κ)‖x‖ that the hyperbolic exponential map is evaluated at."""

_HYPERBOLIC_LIMIT, _HYPERBOLIC_EDGE = -(EXP_LOG_HOLD**2), math.sinh(EXP_LOG_HOLD)

ScaleAndSlope = tuple[Tensor, Tensor]


def guard_into(config) -> tuple[float, float]:
    """The limit of a = κ‖x‖² of the map into the space, and its edge: λ √|a| beyond the limit.

    In the raw domain: the smallest |1 + a|, and λ there.
    """
    eps = config.boundary_eps
    rho = 1 - eps
    if config.mapping == "exp_log":
        return (rho * math.pi / 2) ** 2, math.sin(rho * math.pi / 2)
    if config.domain == "ball":
        gap = eps * (2 - eps)  # 1 - ρ²
        return gap - 1, 2 * rho / gap
    return eps, 2 / eps


def guard_back(config) -> tuple[float, float]:
    """The limit of a = κ‖u‖² of the map out of the space, and its edge: e √a beyond the limit."""
    eps = config.boundary_eps
    rho, gap = 1 - eps, eps * (2 - eps)
    if config.mapping == "exp_log":
        return rho**2, math.atan2(rho, math.sqrt(gap))  # asin ρ
    return rho**2, rho / (1 + math.sqrt(gap))


def inverse_projection_scale(n: Tensor, kappa: Tensor, config) -> tuple[Tensor, Tensor, Tensor]:
    """λ, the scale into the space (equation 5), and its derivatives.

    n: (T,) squared norms of the tokens, in length². kappa: (E,), in 1/length². Returns λ, ∂λ/∂n, ∂λ/∂κ, each (T, E).
    """
    limit, edge = guard_into(config)
    n = n.unsqueeze(-1)
    a = kappa * n
    if config.mapping == "exp_log":
        value, slope = _held(_exp_scale, a, _HYPERBOLIC_LIMIT, _HYPERBOLIC_EDGE, limit, edge)
    elif config.domain == "ball":
        value, slope = _held(_inverse_stereographic, a, limit, edge, math.inf, edge)
    else:
        value, slope = _raw_inverse_stereographic(a, limit, edge)
    return value, torch.where(n < SATURATION, kappa * slope, 0.0), n * slope


def projection_scale(q: Tensor, kappa: Tensor, config) -> tuple[Tensor, Tensor, Tensor]:
    """e, the scale out of the space (equations 6 to 8 as one function of signed κ), and its derivatives.

    q: (T, E) squared norms of the experts' outputs, in length². kappa: (E,), in 1/length². Returns e, ∂e/∂q, ∂e/∂κ,
    each (T, E).
    """
    scale = _log_scale if config.mapping == "exp_log" else _stereographic
    limit, edge = guard_back(config)
    value, slope = _held(scale, kappa * q, -math.inf, edge, limit, edge)
    return value, torch.where(q < SATURATION, kappa * slope, 0.0), q * slope


def _held(
    scale: Callable[[Tensor], ScaleAndSlope], a: Tensor, low: float, low_edge: float, high: float, high_edge: float
) -> ScaleAndSlope:
    held = a.clamp(low, high)
    inside, root = a == held, a.abs().sqrt()
    value, slope = scale(held)
    beyond = high_edge / root
    if low_edge != high_edge:
        beyond = torch.where(a < 0, low_edge / root, beyond)
    value = torch.where(inside, value, beyond)
    return value, torch.where(inside, slope, value / (-2 * a))


def _inverse_stereographic(a: Tensor) -> ScaleAndSlope:
    """2 / (1 + a): equation 5."""
    value = 2 / (1 + a)
    return value, value * value / -2


def _raw_inverse_stereographic(a: Tensor, limit: float, edge: float) -> ScaleAndSlope:
    """Equation 5 on both sides of its pole a = -1, with |1 + a| kept at or above a limit."""
    divisor = 1 + a
    held = divisor.abs() < limit
    bound = torch.full_like(a, edge)  # two numbers in a torch.where would be float32
    value = torch.where(held, torch.where(divisor < 0, -bound, bound), 2 / divisor)
    return value, torch.where(held, 0.0, value * value / -2)


def _stereographic(a: Tensor) -> ScaleAndSlope:
    """1 / (1 + √(1 - a)): equations 6 to 8 as one smooth function of signed κ."""
    w = (1 - a).sqrt()
    value = 1 / (1 + w)
    return value, value * (value / (2 * w))


def _exp_scale(a: Tensor) -> ScaleAndSlope:
    """sinh(t)/t with t = √-a, or sin(t)/t with t = √a."""
    t = a.abs().sqrt()
    direct = torch.where(a < 0, t.sinh(), t.sin()) / t
    slope = (torch.where(a < 0, t.cosh(), t.cos()) - direct) / (2 * a)
    return _taylor_near_zero(a, direct, slope, 1.0, _EXP_SERIES)


def _log_scale(a: Tensor) -> ScaleAndSlope:
    """asinh(t)/t with t = √-a, or asin(t)/t with t = √a."""
    t = a.abs().sqrt()
    direct = torch.where(a < 0, t.asinh(), t.clamp(max=1.0).asin()) / t
    slope = ((1 - a).rsqrt() - direct) / (2 * a)
    return _taylor_near_zero(a, direct, slope, 0.25, _LOG_SERIES)


_EXP_SERIES = [(-1) ** k / math.factorial(2 * k + 1) for k in range(11)]
_LOG_SERIES = [math.comb(2 * k, k) / (4**k * (2 * k + 1)) for k in range(28)]


def _taylor_near_zero(a: Tensor, direct: Tensor, slope: Tensor, radius: float, series: list[float]) -> ScaleAndSlope:
    """The closed forms divide by a. Within the radius, value and slope are summed from their series instead."""
    near = a.abs() < radius
    a = torch.where(near, a, 0.0)
    value, derivative = torch.zeros_like(a), torch.zeros_like(a)
    for coefficient in reversed(series):
        derivative = derivative * a + value
        value = value * a + coefficient
    return torch.where(near, value, direct), torch.where(near, derivative, slope)
