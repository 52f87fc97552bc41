"""The points of a space of constant curvature, and the maps between that space and Euclidean space.

A point of the space of curvature κ is a time coordinate ξ (..., 1) and a space part s (..., d), with

    κ < 0 (Lorentz model)   -ξ² + ‖s‖² = 1/κ        κ > 0 (sphere)   ξ² + ‖s‖² = 1/κ

Each map exists twice.

*As printed* in the paper, for κ ≠ 0. At κ = 0 the time coordinate is infinite, and equation 7's φ(0) = 0 would make
equation 8 return u where the limit is u/2, with a NaN gradient at u = 0; so these refuse it.

*Signed*: with the time coordinate τ = √|κ| ξ, in which both manifolds are τ² + κ‖s‖² = 1. Because |κ|·sgn(-κ) = -κ, the
stereographic maps are then smooth functions of signed κ; and the exponential and logarithmic maps are power series in
κ‖x‖². This is the definition, at every κ; the tests prove it equal to the printed form.

κ is a 0-d tensor or a float, or broadcasts against (..., 1). Vectors keep their dtype; squared norms and the scales
made of them are computed in float32 at least.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def squared_norm(v: Tensor) -> Tensor:
    """‖v‖² over the last dimension, kept: (..., d) -> (..., 1), in float32 at least."""
    return v.to(torch.promote_types(v.dtype, torch.float32)).square().sum(-1, keepdim=True)


def scaled(scale: Tensor, v: Tensor) -> Tensor:
    """scale·v in v's dtype: (..., 1), (..., d) -> (..., d)."""
    return (scale * v).to(v.dtype)


def euclidean_inner(y: Tensor, z: Tensor) -> Tensor:
    """⟨y, z⟩₂ of points (ξ; s) given as (..., 1 + d), equation 4. Returns (..., 1)."""
    return (y * z).sum(-1, keepdim=True)


def minkowski_inner(y: Tensor, z: Tensor) -> Tensor:
    """⟨y, z⟩_L = -ξ_y ξ_z + s_y·s_z of points (ξ; s) given as (..., 1 + d), equation 3. Returns (..., 1)."""
    return (y[..., 1:] * z[..., 1:]).sum(-1, keepdim=True) - y[..., :1] * z[..., :1]


# as printed, κ ≠ 0


def inverse_projection(x: Tensor, kappa: Tensor | float, *, pole_eps: float = 0.0) -> tuple[Tensor, Tensor]:
    """Equation 5: (ξ, s) = ((1/√|κ|) (1 - κ‖x‖²)/(1 + κ‖x‖²), 2x/(1 + κ‖x‖²)). |1 + κ‖x‖²| is held at pole_eps."""
    kappa = _curved(kappa, x)
    n = squared_norm(x)
    divisor = held_off_zero(1 + kappa * n, pole_eps)
    return (1 - kappa * n) / divisor / kappa.abs().sqrt(), scaled(2 / divisor, x)


def lift(u: Tensor, kappa: Tensor | float) -> Tensor:
    """Equations 6 and 7: ξ' = √(‖u‖² sgn(-κ) + 1/|κ|), the time coordinate of the point with space part u."""
    kappa = _curved(kappa, u)
    return (squared_norm(u) * torch.sign(-kappa) + 1 / kappa.abs()).sqrt()


def projection(xi: Tensor, s: Tensor, kappa: Tensor | float) -> Tensor:
    """Equation 8: s / (1 + √|κ| ξ)."""
    kappa = _curved(kappa, s)
    return scaled(1 / (1 + kappa.abs().sqrt() * xi), s)


def exp_map(x: Tensor, kappa: Tensor | float) -> tuple[Tensor, Tensor]:
    """Exponential map at the origin (1/√|κ|; 0): a geodesic of length ‖x‖ in the direction of x ≠ 0."""
    kappa = _curved(kappa, x)
    c, norm = kappa.abs().sqrt(), squared_norm(x).sqrt()
    hyperbolic = kappa < 0
    cosine = torch.where(hyperbolic, torch.cosh(c * norm), torch.cos(c * norm))
    sine = torch.where(hyperbolic, torch.sinh(c * norm), torch.sin(c * norm))
    return cosine / c, scaled(sine / (c * norm), x)


def log_map(xi: Tensor, s: Tensor, kappa: Tensor | float) -> Tensor:
    """Logarithmic map at the origin of the point (ξ; s), s ≠ 0: arcosh(√|κ| ξ) or arccos(√|κ| ξ) as a length along s.

    κ⟨origin, point⟩ = √|κ| ξ is the (hyperbolic) cosine of the distance, which loses every digit of a small one.
    """
    kappa = _curved(kappa, s)
    c, hyperbolic = kappa.abs().sqrt(), kappa < 0
    cosine = c * xi
    length = torch.where(
        hyperbolic, torch.acosh(torch.where(hyperbolic, cosine, 2.0)), torch.acos(torch.where(hyperbolic, 0.0, cosine))
    )
    return scaled(length / (c * squared_norm(s).sqrt()), s)


# signed, every κ


def signed_inverse_projection(x: Tensor, kappa: Tensor | float, *, pole_eps: float = 0.0) -> tuple[Tensor, Tensor]:
    """Equation 5 as (τ, s) = ((1 - κ‖x‖²)/(1 + κ‖x‖²), 2x/(1 + κ‖x‖²)). |1 + κ‖x‖²| is held at pole_eps."""
    n = squared_norm(x)
    divisor = held_off_zero(1 + kappa * n, pole_eps)
    return (1 - kappa * n) / divisor, scaled(2 / divisor, x)


def signed_lift(u: Tensor, kappa: Tensor | float) -> Tensor:
    """Equation 6 as τ' = √(1 - κ‖u‖²)."""
    return (1 - kappa * squared_norm(u)).sqrt()


def signed_projection(tau: Tensor, s: Tensor, kappa: Tensor | float) -> Tensor:
    """Equation 8 as s / (1 + τ); κ is in τ."""
    return scaled(1 / (1 + tau), s)


def signed_exp_map(x: Tensor, kappa: Tensor | float) -> tuple[Tensor, Tensor]:
    """Exponential map at the origin as (τ, s) = (cos(√κ‖x‖), sin(√κ‖x‖)/(√κ‖x‖) x), hyperbolic where κ < 0."""
    a = kappa * squared_norm(x)
    return signed_cos(a), scaled(signed_sinc(a), x)


def signed_log_map(tau: Tensor, s: Tensor, kappa: Tensor | float) -> Tensor:
    """Logarithmic map at the origin by the (hyperbolic) arcsine of √|κ|‖s‖, for τ >= 0: s determines the point."""
    return scaled(signed_arcsinc(kappa * squared_norm(s)), s)


def signed_cos(a: Tensor) -> Tensor:
    """cos √a, or cosh √-a: Σ (-a)^k / (2k)!."""
    coefficients = [(-1) ** k / math.factorial(2 * k) for k in range(12)]
    return _by_series_near_zero(a, torch.cosh, torch.cos, coefficients, radius=1.0)


def signed_sinc(a: Tensor) -> Tensor:
    """sin(√a)/√a, or sinh(√-a)/√-a: Σ (-a)^k / (2k + 1)!."""
    coefficients = [(-1) ** k / math.factorial(2 * k + 1) for k in range(12)]
    return _by_series_near_zero(a, lambda t: torch.sinh(t) / t, lambda t: torch.sin(t) / t, coefficients, radius=1.0)


def signed_arcsinc(a: Tensor) -> Tensor:
    """arcsin(√a)/√a, or arsinh(√-a)/√-a: Σ (2k)! / (4^k (k!)² (2k + 1)) a^k, for a <= 1."""
    coefficients = [math.comb(2 * k, k) / (4**k * (2 * k + 1)) for k in range(20)]
    return _by_series_near_zero(a, lambda t: torch.asinh(t) / t, lambda t: torch.asin(t) / t, coefficients, radius=0.1)


def held_off_zero(divisor: Tensor, eps: float) -> Tensor:
    """The divisor with its magnitude held at or above eps, its sign kept (0 is positive), constant while held."""
    held = divisor.abs() < eps
    bound = torch.full_like(divisor, eps)  # torch.where of two numbers would be float32
    return torch.where(held, torch.where(divisor < 0, -bound, bound), divisor)


def _by_series_near_zero(a: Tensor, hyperbolic, circular, coefficients: list[float], radius: float) -> Tensor:
    """hyperbolic(√-a) for a < 0, circular(√a) for a > 0, and within the radius their common power series.

    Each branch is given only arguments that are its own, so that none sends a NaN back through torch.where.
    """
    below, above = a < -radius, a > radius
    near = torch.where(below | above, 0.0, a)
    series = torch.zeros_like(near)
    for coefficient in reversed(coefficients):
        series = series * near + coefficient
    result = torch.where(below, hyperbolic(torch.where(below, -a, 1.0).sqrt()), series)
    return torch.where(above, circular(torch.where(above, a, 0.25).sqrt()), result)


def _curved(kappa: Tensor | float, like: Tensor) -> Tensor:
    if not isinstance(kappa, Tensor):
        kappa = torch.tensor(kappa, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
    if bool((kappa == 0).any()):
        raise ValueError(
            "kappa=0 has no finite time coordinate: use the signed form of this map, which holds at every κ"
        )
    return kappa
