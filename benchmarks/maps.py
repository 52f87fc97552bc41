"""The two mappings on vectors of full width, as one writes them down: what Figure 3 of the paper compares.

Each expert knows the sign of its curvature, so nothing branches or waits. Both are a scalar times the vector: fused,
they read and write the same bytes. exp/log takes its length from the arcsine of the space part, which keeps its digits
where arcosh of the time coordinate loses them, and costs no more. geoopt does it through arcosh, in float64 whatever
the input (its arm is flagged "fp64 inside"), and its sphere holds distances above 1e-4 in float32.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Maps(NamedTuple):
    """into: x (..., d), κ -> s (..., d);  back: u (..., d), κ -> o (..., d)."""

    into: Callable[[Tensor, Tensor], Tensor]
    back: Callable[[Tensor, Tensor], Tensor]


def _squared_norm(v: Tensor) -> Tensor:
    return v.float().square().sum(-1, keepdim=True) if v.dtype != torch.float64 else v.square().sum(-1, keepdim=True)


def _stereographic_into(x: Tensor, kappa: Tensor) -> Tensor:
    return (2 / (1 + kappa * _squared_norm(x)) * x).to(x.dtype)


def _stereographic_back(u: Tensor, kappa: Tensor) -> Tensor:
    tau = (1 - kappa * _squared_norm(u)).sqrt()
    return (1 / (1 + tau) * u).to(u.dtype)


def _exp_into(sign: float) -> Callable[[Tensor, Tensor], Tensor]:
    def into(x: Tensor, kappa: Tensor) -> Tensor:
        t = (kappa.abs() * _squared_norm(x)).sqrt()
        return ((t.sinh() if sign < 0 else t.sin()) / t * x).to(x.dtype)

    return into


def _log_back(sign: float) -> Callable[[Tensor, Tensor], Tensor]:
    def back(u: Tensor, kappa: Tensor) -> Tensor:
        t = (kappa.abs() * _squared_norm(u)).sqrt()
        return ((t.asinh() if sign < 0 else t.asin()) / t * u).to(u.dtype)

    return back


def stereographic(sign: float) -> Maps:
    """Equations 5 to 8."""
    return Maps(_stereographic_into, _stereographic_back)


def exp_log(sign: float) -> Maps:
    """Exponential and logarithmic map at the origin."""
    return Maps(_exp_into(sign), _log_back(sign))


@functools.cache
def geoopt(sign: float) -> Maps:
    """The same through the package geoopt: the Lorentz model for κ < 0, the sphere for κ > 0."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it scripts its functions with what torch has deprecated
        import geoopt

    def with_time(v: Tensor, time: Tensor) -> Tensor:
        return torch.cat([time, v], -1)

    def scale(v: Tensor, kappa: Tensor) -> tuple[Tensor, Tensor]:
        wide, c = v.float() if v.dtype != torch.float64 else v, kappa.abs().sqrt()
        return c * wide, c  # on the space of curvature ±1

    if sign < 0:
        lorentz = geoopt.Lorentz()

        def into(x: Tensor, kappa: Tensor) -> Tensor:
            v, c = scale(x, kappa)
            space = lorentz.to(v.device).expmap0(with_time(v, torch.zeros_like(v[..., :1])))[..., 1:]
            return (space / c).to(x.dtype)

        def back(u: Tensor, kappa: Tensor) -> Tensor:
            s, c = scale(u, kappa)
            time = (1 + _squared_norm(s)).sqrt()
            return (lorentz.to(s.device).logmap0(with_time(s, time))[..., 1:] / c).to(u.dtype)

        return Maps(into, back)

    sphere = geoopt.Sphere()

    def origin(v: Tensor) -> Tensor:
        return with_time(torch.zeros_like(v), torch.ones_like(v[..., :1]))

    def into(x: Tensor, kappa: Tensor) -> Tensor:
        v, c = scale(x, kappa)
        space = sphere.expmap(origin(v), with_time(v, torch.zeros_like(v[..., :1])))[..., 1:]
        return (space / c).to(x.dtype)

    def back(u: Tensor, kappa: Tensor) -> Tensor:
        s, c = scale(u, kappa)
        time = (1 - _squared_norm(s)).sqrt()
        return (sphere.logmap(origin(s), with_time(s, time))[..., 1:] / c).to(u.dtype)

    return Maps(into, back)


MAPPINGS = {"stereographic": stereographic, "exp/log": exp_log, "exp/log, geoopt (fp64 inside)": geoopt}


def convert(x: Tensor, kappa: Tensor, signs: tuple[float, ...], mapping: str) -> tuple[Tensor, ...]:
    """Into the space of each curved expert and back out of it. x (T, d), kappa (E,) -> a (T, d) for each.

    A Euclidean expert (sign 0) needs no map.
    """
    outputs = []
    for e, sign in enumerate(signs):
        if sign:
            maps = MAPPINGS[mapping](sign)
            outputs.append(maps.back(maps.into(x, kappa[e]), kappa[e]))
    return tuple(outputs)


def mapped_branch(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    kappa: Tensor,
    gates: Tensor,
    scaling: float,
    signs: tuple[float, ...],
    mapping: str,
) -> Tensor:
    """Σ_e scaling·g_e o_e, expert by expert: into the space, B_e A, back. Returns (T, d_out)."""
    A, B = A.to(x.dtype), B.to(x.dtype)
    y = 0
    for e, sign in enumerate(signs):
        if sign:
            maps = MAPPINGS[mapping](sign)
            o = maps.back(maps.into(x, kappa[e]) @ A.t() @ B[:, e].t(), kappa[e])
        else:
            o = x @ A.t() @ B[:, e].t()
        y = y + (scaling * gates[:, e : e + 1]).to(x.dtype) * o
    return y
