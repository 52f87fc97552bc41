"""Routing and bridge of few tokens on a CPU, forward alone, in NumPy: at these sizes calls cost more than arithmetic.

The formulas and guards are those of `routing.route`, `geometry` (the stereographic mapping) and `eager.bridge`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy import ndarray
from torch import Tensor

from mos_kernels.backends import eager
from mos_kernels.backends.interface import Prepared
from mos_kernels.config import MoSConfig
from mos_kernels.geometry import SATURATION, guard_back, guard_into

MOST_TOKENS = 32


def serves(x: Tensor, tokens: int, *configs: MoSConfig) -> bool:
    """Whether x, so many tokens, is bridged here: not where a dispatch mode, as make_fx's, is to see each operation."""
    return (
        x.is_cpu
        and 0 < tokens <= MOST_TOKENS
        and all(config.mapping == "stereographic" for config in configs)
        and not eager.is_observed()
    )


def route(logits: ndarray, config: MoSConfig) -> ndarray:
    """Gates (T, E) from logits (T, E): ties to the lower index, and a NaN shows."""
    k = config.num_experts_per_tok
    kept = np.zeros(logits.shape, bool)
    np.put_along_axis(kept, np.argsort(-logits, 1, kind="stable")[:, :k], True, 1)
    kept |= logits != logits
    exponential = np.exp(logits - logits.max(1, keepdims=True))
    if config.norm_topk_prob:
        exponential *= kept
        return exponential / exponential.sum(1, keepdims=True)
    return exponential / exponential.sum(1, keepdims=True) * kept


def bridge(
    p: ndarray, n: ndarray, gates: ndarray, kappas: Sequence[Tensor], prepared: Sequence[Prepared], config: MoSConfig
) -> ndarray:
    """z (T, m, E·r) of m linears of one configuration on the same tokens. p (T, m, 1 or E, r), n (T,), gates (T, E)."""
    tokens, m, _, r = p.shape
    kappa = _stacked(kappas).astype(n.dtype, copy=False)  # (m, E)
    unit_gram, trace = _stacked([made.unit_gram for made in prepared]), _stacked([made.trace for made in prepared])
    with np.errstate(all="ignore"):
        h = _into(kappa * n[:, None, None], config)[..., None] * p  # (T, m, E, r)
        unit_gh = np.matmul(h.transpose(1, 2, 0, 3), unit_gram).transpose(2, 0, 1, 3)
        total = (h * unit_gh).sum(-1)
        if not math.isfinite(total.sum()):
            total = (h.astype(np.float64) * unit_gh).sum(-1)
        q = np.clip(total * trace, 0, SATURATION).astype(n.dtype, copy=False)
        z = (_back(kappa * q, config) * (config.scaling * gates)[:, None])[..., None] * h
    return z.reshape(tokens, m, -1)


def _stacked(tensors: Sequence[Tensor]) -> ndarray:
    return tensors[0].numpy()[None] if len(tensors) == 1 else np.stack([t.numpy() for t in tensors])


def _into(a: ndarray, config: MoSConfig) -> ndarray:
    """λ, from a = κ n."""
    limit, edge = guard_into(config)
    if config.domain == "raw":
        divisor = 1 + a
        return np.where(np.abs(divisor) < limit, np.where(divisor < 0, -edge, edge), 2 / divisor).astype(a.dtype)
    value = 2 / (1 + np.maximum(a, a.dtype.type(limit)))
    beyond = a < limit
    return np.where(beyond, a.dtype.type(edge) / np.sqrt(np.abs(a)), value) if beyond.any() else value


def _back(a: ndarray, config: MoSConfig) -> ndarray:
    """e, from a = κ q."""
    limit, edge = guard_back(config)
    value = 1 / (1 + np.sqrt(1 - np.minimum(a, a.dtype.type(limit))))
    beyond = a > limit
    return np.where(beyond, a.dtype.type(edge) / np.sqrt(np.abs(a)), value) if beyond.any() else value
