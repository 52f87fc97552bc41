"""Routing and bridge for few tokens on a CPU, forward only, in NumPy: at these sizes, calls cost more than arithmetic.

The formulas and guards are those of `routing.route`, `geometry` (the stereographic mapping) and `eager.bridge`. The
bridge computes in float64, which costs the same here. So no sum overflows, and z is rounded once. With σ = α/r,

    d = 1 / (σλ) = (1 + κn) / 2σ    q = hᵀGh = pᵀ(G/σ²)p / d²    w = 1/e = 1 + √(1 - κq)    z = σ g e h = g p / (d w)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from mos_kernels.backends import eager
from mos_kernels.backends.interface import Prepared
from mos_kernels.config import MoSConfig
from mos_kernels.geometry import SATURATION, guard_back, guard_into

MOST_TOKENS = 32

FEW_LOGITS = 64
"""Up to so many are routed one by one in Python, which reads fewer instructions into the cache than NumPy or torch."""


class Constants(NamedTuple):
    """The constants of m linears with one configuration that read the same tokens. They depend only on the parameters.

    rows: [A of each; the router, if its logits are needed]ᵀ (d_in, m·rank + E or m·rank), in the compute dtype; x is
    multiplied by it. B: (E·r, d_out) of each. NumPy takes half as long without broadcasting, so single numbers are
    repeated for each expert.
    """

    rows: Tensor
    B: tuple[Tensor, ...]
    kappa: ndarray  # (1, m, E)
    slope: ndarray  # κ/2σ (1, m, E)
    offset: ndarray  # 1/2σ (1, m, E)
    zero: ndarray  # (1, m, E)
    one: ndarray
    gram: ndarray  # G/σ² (m, E, 1, r²)
    into: tuple[float, float]  # guards
    back: tuple[float, float]
    safe_n: float  # up to this n no guard is needed
    safe_q: float
    ranks: tuple[int, tuple[int, ...]]  # how many of the rows are A's, and p's shape
    routes: bool  # whether logits are asked for
    dtype: np.dtype  # z's
    scaling: float  # σ
    is_raw: bool


def are_few(tokens: int) -> bool:
    """Whether so many tokens are computed here. Not under a dispatch mode such as make_fx's, which sees operations."""
    return 0 < tokens <= MOST_TOKENS and not eager.is_observed()


def are_served(*configs: MoSConfig) -> bool:
    return all(config.mapping == "stereographic" for config in configs)


def constants(
    A: Sequence[Tensor],
    kappa: Sequence[Tensor],
    B: Sequence[Tensor],
    prepared: Sequence[Prepared],
    router: Tensor | None,
    dtype: torch.dtype,
    config: MoSConfig,
) -> Constants:
    """Of linears whose base has `dtype`. A (r, d_in) or (E, r, d_in), B (d_out, E, r), kappa (E,), router (E, d_in).

    B is read as it is in the compute dtype, where it is: its products with few tokens take less time than rounded ones.
    No view of a parameter is made, which `torch.utils.swap_tensors` would refuse to swap.
    """
    compute, m, E, r, scaling = eager.compute_dtype(dtype), len(A), config.num_experts, config.r, config.scaling
    factors = [eager.operand(factor, dtype).to(compute).flatten(0, -2) for factor in A]
    rows = torch.cat(factors if router is None else [*factors, router.to(compute)])
    kappas, gram = _stacked(kappa)[None], _stacked([made.gram for made in prepared]) / scaling**2
    into, back = guard_into(config), guard_back(config)
    lowest, highest = kappas.min(), kappas.max()
    least = into[0] - 1 if config.domain == "raw" else into[0]  # of κn
    return Constants(
        rows.t(),
        tuple((b if b.dtype == compute else made.B).data.flatten(1).t() for b, made in zip(B, prepared, strict=True)),
        kappas, kappas / (2 * scaling), *(_filled(kappas.shape, value) for value in (1 / (2 * scaling), 0, 1)),
        gram.reshape(m, E, 1, r * r), into, back,
        min(SATURATION, least / lowest) if lowest < 0 else SATURATION,
        min(SATURATION, back[0] / highest) if highest > 0 else SATURATION,
        (sum(map(len, factors)), (-1, m, 1 if config.share_a else E, r)),
        router is not None,
        np.dtype(np.float64 if compute == torch.float64 else np.float32), scaling, config.domain == "raw",
    )  # fmt: skip


@functools.cache
def _filled(shape: tuple[int, ...], value: float) -> ndarray:
    """One of a kind, so that a processor's cache holds it from block to block."""
    return np.full(shape, value, np.float64)


def _stacked(tensors: Sequence[Tensor]) -> ndarray:
    return np.stack([t.detach().double().numpy() for t in tensors])


def shrink(x: Tensor, made: Constants) -> tuple[ndarray, ndarray, ndarray]:
    """p (T, m, 1 or E, r), n (T, 1, 1), and logits (T, E), empty without a router. x (T, d_in)."""
    x = x.to(made.rows.dtype)
    products = (eager.exact_matmul(x, made.rows) if made.routes else torch.mm(x, made.rows)).numpy()
    ranks, shape = made.ranks
    tokens = x.numpy()
    n = np.matmul(tokens[:, None, :], tokens[:, :, None])
    return products[:, :ranks].reshape(shape), n, products[:, ranks:]


def route(logits: ndarray, config: MoSConfig) -> ndarray:
    """Gates (T, E) from logits (T, E)."""
    if logits.size <= FEW_LOGITS:
        gates = [_gates(row, config.num_experts_per_tok, config.norm_topk_prob) for row in logits.tolist()]
        if None not in gates:
            return np.array(gates)
    return eager.route(torch.from_numpy(logits), config).numpy()


def _gates(logits: list[float], k: int, norm_topk_prob: bool) -> list[float] | None:
    """A token's; None where logits tie for the last place, or are not finite."""
    ordered = sorted(logits, reverse=True)
    top, least = ordered[0], ordered[k - 1]
    if not math.isfinite(sum(logits)) or least in ordered[k : k + 1]:
        return None
    gates = [math.exp(logit - top) for logit in logits]
    total = sum(gates)
    gates = [gate if logit >= least else 0.0 for gate, logit in zip(gates, logits, strict=True)]
    if norm_topk_prob:
        total = sum(gates)
    return [gate / total for gate in gates]


def bridge(p: ndarray, n: ndarray, gates: ndarray, made: Constants) -> ndarray:
    """z (T, m, E·r), of p (T, m, 1 or E, r), n (T, 1, 1) and gates (T, E)."""
    p = p.astype(np.float64)
    if max(n.ravel().tolist()) <= made.safe_n:
        d = made.slope * n
        d += made.offset
    else:
        d = _guarded_into(n, made)
    squares = (p[..., None] * p[..., None, :]).reshape(*p.shape[:3], -1, 1)
    q = np.maximum(np.matmul(made.gram, squares).reshape(d.shape), made.zero)
    q /= d * d
    if max(q.ravel().tolist()) <= made.safe_q:
        w = made.kappa * q
        w = np.sqrt(np.subtract(made.one, w, out=w), out=w)
        w += made.one
    else:
        w = _guarded_back(q, made)
    w *= d
    scale = gates[:, None] / w
    return np.multiply(p, scale[..., None], dtype=made.dtype, casting="same_kind").reshape(len(p), len(made.B), -1)


def _guarded_into(n: ndarray, made: Constants) -> ndarray:
    """d, where a guard holds."""
    limit, edge = made.into
    a = made.kappa * np.minimum(n, SATURATION)
    divisor = 1 + a
    if made.is_raw:
        scale = np.where(np.abs(divisor) < limit, np.where(divisor < 0, -edge, edge), 2 / divisor)
    else:
        scale = np.where(a < limit, edge / np.sqrt(np.abs(a)), 2 / divisor)
    return 1 / (made.scaling * scale)


def _guarded_back(q: ndarray, made: Constants) -> ndarray:
    """w, where a guard holds."""
    limit, edge = made.back
    a = made.kappa * np.minimum(q, SATURATION)
    return np.where(a > limit, np.sqrt(np.abs(a)) / edge, 1 + np.sqrt(1 - np.minimum(a, limit)))
