"""What keeps a vector inside the domain of a map: operations on the vector, made before the map is applied.

Each has a kink at its threshold, and autograd gives the exact derivative on both sides.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from reference.manifold import squared_norm

SATURATION = 1e30
"""The largest squared norm that a map is given: a larger one overflows, and meets κ = 0 as 0·∞."""

HYPERBOLIC_EXP_LIMIT = math.asinh(2.0**15)
"""The largest √-κ‖x‖ that the hyperbolic exponential map is given."""


def radial_projection(v: Tensor, curvature: Tensor, radius: float) -> Tensor:
    """v where curvature·‖v‖² <= radius², else the vector in v's direction that attains it. (..., d) -> (..., d).

    With a negative curvature no vector is outside; so one sign of curvature guards one geometry and leaves the others.
    """
    a = curvature * squared_norm(v)
    outside = a > radius**2
    return (torch.where(outside, radius / torch.where(outside, a, 1.0).sqrt(), 1.0) * v).to(v.dtype)


def saturated(v: Tensor) -> tuple[Tensor, Tensor]:
    """(v / t, t) with t >= 1 (..., 1) such that ‖v / t‖² is at most SATURATION; t is 1 up to there.

    A radial map is f(‖v‖²)·v. With f's argument saturated that is t · f(‖v/t‖²)·(v/t): the caller multiplies by t.
    """
    wide = v.to(torch.promote_types(v.dtype, torch.float32))
    unit = wide.detach().abs().amax(-1, keepdim=True).clamp(min=1.0)  # in which the square does not overflow
    norm = unit * torch.linalg.vector_norm(wide / unit, dim=-1, keepdim=True)
    t = (norm / math.sqrt(SATURATION)).clamp(min=1.0)
    return (wide / t).to(v.dtype), t
