"""Routing and bridge of few tokens on a CPU, forward alone, in NumPy: at these sizes calls cost more than arithmetic.

The formulas and guards are those of `routing.route`, `geometry` (the stereographic mapping) and `eager.bridge`. The
bridge computes in float64, which costs the same here: no sum overflows, and z is rounded once.
"""

from __future__ import annotations

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


class Constants(NamedTuple):
    """What follows from the parameters of m linears of one configuration that read the same tokens.

    rows: what x meets, [A of each; the router, where its logits are asked for]ᵀ (d_in, m·rank + E or m·rank) in the
    compute dtype. B: (E·r, d_out) of each. safe: up to this q no guard is needed.
    """

    rows: Tensor
    B: tuple[Tensor, ...]
    kappa: ndarray  # (m, E)
    gram: ndarray  # (m, E, r, r)
    into: tuple[float, float]  # guards
    back: tuple[float, float]
    safe: float
    ranks: tuple[int, tuple[int, ...]]  # how many of the rows are A's, and p's shape
    routes: bool  # whether logits are asked for
    dtype: np.dtype  # z's
    scaling: float
    is_raw: bool


def serves(x: Tensor, tokens: int, *configs: MoSConfig) -> bool:
    """Whether x, so many tokens, is bridged here: not where a dispatch mode, as make_fx's, is to see each operation."""
    return x.is_cpu and 0 < tokens <= MOST_TOKENS and not eager.is_observed() and are_served(*configs)


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
    compute, m = eager.compute_dtype(dtype), len(A)
    factors = [eager.operand(factor, dtype).to(compute).flatten(0, -2) for factor in A]
    rows = torch.cat(factors if router is None else [*factors, router.to(compute)])
    kappas, back = _stacked(kappa), guard_back(config)
    highest = kappas.max()
    return Constants(
        rows.t(),
        tuple((b if b.dtype == compute else made.B).data.flatten(1).t() for b, made in zip(B, prepared, strict=True)),
        kappas, _stacked([made.gram for made in prepared]), guard_into(config), back,
        min(SATURATION, back[0] / highest) if highest > 0 else SATURATION,
        (sum(map(len, factors)), (-1, m, 1 if config.share_a else config.num_experts, config.r)),
        router is not None,
        np.dtype(np.float64 if compute == torch.float64 else np.float32), config.scaling, config.domain == "raw",
    )  # fmt: skip


def _stacked(tensors: Sequence[Tensor]) -> ndarray:
    return np.stack([t.detach().double().numpy() for t in tensors])


def shrink(x: Tensor, made: Constants) -> tuple[ndarray, ndarray, ndarray]:
    """p (T, m, 1 or E, r), n (T, 1, 1) in float64, and logits (T, E), empty without a router. x (T, d_in)."""
    x = x.to(made.rows.dtype)
    products = (eager.exact_matmul(x, made.rows) if made.routes else torch.mm(x, made.rows)).numpy()
    ranks, shape = made.ranks
    n = np.add.reduce(np.square(x.numpy(), dtype=np.float64), 1)[:, None, None]
    return products[:, :ranks].reshape(shape), np.minimum(n, SATURATION), products[:, ranks:]


def route(logits: ndarray, config: MoSConfig) -> ndarray:
    """Gates (T, E) from logits (T, E): ties to the lower index, and a NaN shows."""
    k = config.num_experts_per_tok
    ordered = np.sort(logits, 1)
    kept = logits >= ordered[:, -k, None]
    if np.count_nonzero(kept) != k * len(kept):  # ties, or a NaN
        kept = np.zeros(logits.shape, bool)
        np.put_along_axis(kept, np.argsort(-logits, 1, kind="stable")[:, :k], True, 1)
        kept |= logits != logits
    exponential = np.exp(logits - ordered[:, -1:])
    if config.norm_topk_prob:
        exponential *= kept
        return exponential / np.add.reduce(exponential, 1, keepdims=True)
    return exponential / np.add.reduce(exponential, 1, keepdims=True) * kept


def bridge(p: ndarray, n: ndarray, gates: ndarray, made: Constants) -> ndarray:
    """z (T, m, E·r), of p (T, m, 1 or E, r), n (T, 1, 1) and gates (T, E)."""
    h = _into(made.kappa * n, made)[..., None] * p  # (T, m, E, r)
    q = np.add.reduce(np.matmul(made.gram, h[..., None])[..., 0] * h, -1)
    scale = made.scaling * gates[:, None] / _back(np.maximum(q, 0, out=q), made)
    return np.multiply(h, scale[..., None], dtype=made.dtype, casting="same_kind").reshape(len(h), len(made.B), -1)


def _into(a: ndarray, made: Constants) -> ndarray:
    """λ, from a = κ n."""
    limit, edge = made.into
    divisor = 1 + a
    value = 2 / divisor
    if made.is_raw:
        return np.where(np.abs(divisor) < limit, np.where(divisor < 0, -edge, edge), value)
    if np.minimum.reduce(a, None) >= limit:
        return value
    return np.where(a < limit, edge / np.sqrt(np.abs(a)), value)


def _back(q: ndarray, made: Constants) -> ndarray:
    """1 / e, from q."""
    limit, edge = made.back
    if np.maximum.reduce(q, None) <= made.safe:
        return 1 + np.sqrt(1 - made.kappa * q)
    a = made.kappa * np.minimum(q, SATURATION)
    return np.where(a > limit, np.sqrt(np.abs(a)) / edge, 1 + np.sqrt(1 - np.minimum(a, limit)))
