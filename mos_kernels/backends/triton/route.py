"""route: logits -> gates, the top-k softmax, its backward, and the load-balancing gradient that is added there.

    gates = top-k softmax(logits)    dlogits = g (dg - Σ g dg) + c·(E/T)·p (f - Σ f p)

The first functions work on tiles [tokens, experts] inside any kernel; the kernels are for a router of its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mos_kernels.backends.triton import launch


@triton.jit
def load_logits(logits, row, m_t, o_e, T, E, SPLITS: tl.constexpr, PARTS: tl.constexpr):
    """Logits [tokens, experts]: planes and parts added up in a fixed order; -inf where there is no expert."""
    m_e = o_e[None, :] < E
    total = tl.zeros([row.shape[0], o_e.shape[0]], tl.float32)
    for s in tl.static_range(SPLITS):
        for part in tl.static_range(PARTS):
            offsets = (s * T + row[:, None]) * (PARTS * E) + part * E + o_e[None, :]
            total += tl.load(logits + offsets, mask=m_t[:, None] & m_e, other=0.0)
    return tl.where(m_e, total, -float("inf"))


@triton.jit
def top_k(logits, o_e, BLOCK_E: tl.constexpr, K: tl.constexpr):
    """The K largest of each row as a mask, ties to the lower index."""
    kept = tl.zeros(logits.shape, tl.int1)
    for _ in range(K):
        left = tl.where(kept, -float("inf"), logits)
        best = tl.max(left, 1)
        candidate = (left == best[:, None]) & (kept == 0)
        first = tl.min(tl.where(candidate, o_e[None, :], BLOCK_E), 1)
        kept = kept | (o_e[None, :] == first[:, None])
    return kept


@triton.jit
def softmax(logits):
    shifted = tl.exp(logits - tl.max(logits, 1)[:, None])
    return tl.div_rn(shifted, tl.sum(shifted, 1)[:, None] + 0.0 * shifted)


@triton.jit
def softmax_backward(probability, gradient):
    """p (d - Σ p d), centred twice: where one p is nearly 1, the first difference holds its rounding and no more."""
    for _ in tl.static_range(2):
        gradient -= tl.sum(probability * gradient, 1)[:, None]
    return probability * gradient


@triton.jit
def top_k_gates(logits, o_e, BLOCK_E: tl.constexpr, K: tl.constexpr, NORMALISE: tl.constexpr):
    """Gates [tokens, experts]: the softmax kept for the top K, renormalised over them if asked. A NaN shows."""
    kept = top_k(logits, o_e, BLOCK_E, K) | (logits != logits)  # the largest of a row passes over NaN
    if NORMALISE:
        return softmax(tl.where(kept, logits, -float("inf")))
    return tl.where(kept, softmax(logits), 0.0)


@triton.jit
def gates_backward(dgates, gates, logits, o_e, BLOCK_E: tl.constexpr, K: tl.constexpr, NORMALISE: tl.constexpr):
    """dlogits of `top_k_gates`."""
    if NORMALISE:
        return softmax_backward(gates, dgates)
    return softmax_backward(softmax(logits), tl.where(top_k(logits, o_e, BLOCK_E, K), dgates, 0.0))


@triton.jit
def balance_gradient(
    logits, loads, weight, token_mask, o_t, m_t, o_e, E, K: tl.constexpr, LOADS: tl.constexpr, MASKED: tl.constexpr
):
    """weight[0]·(E/T)·p (f - Σ f p): the load-balancing gradient in the logits.

    f and the number T of valid tokens are made of the LOADS planes of `load_kernel`.
    """
    counts = tl.zeros([o_e.shape[0]], tl.float32)
    tokens = tl.load(loads + E)
    for s in tl.static_range(LOADS):
        counts += tl.load(loads + s * (E + 1) + o_e, mask=o_e < E, other=0.0)
        if s > 0:
            tokens += tl.load(loads + s * (E + 1) + E)
    tokens = tl.maximum(tokens, 1.0)
    b_share = tl.div_rn(counts, tokens * K)[None, :]
    b_weight = tl.div_rn(tl.load(weight).to(tl.float32) * E, tokens) + tl.zeros([o_t.shape[0], 1], tl.float32)
    if MASKED:
        b_weight = b_weight * tl.load(token_mask + o_t, mask=m_t, other=0).to(tl.float32)[:, None]
    probability = softmax(logits)
    return b_weight * softmax_backward(probability, b_share + 0.0 * probability)


@triton.jit(do_not_specialize=["T"])
def route_kernel(
    logits, gates, T, E: tl.constexpr,
    BLOCK_T: tl.constexpr, ALL_E: tl.constexpr, K: tl.constexpr, SPLITS: tl.constexpr, PARTS: tl.constexpr,
    NORMALISE: tl.constexpr,
):  # fmt: skip
    """gates[t] = top-k softmax(logits[t]): for a router of its own."""
    o_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_e = tl.arange(0, ALL_E)
    m_t, row = o_t < T, o_t.to(tl.int64)
    b_gates = top_k_gates(load_logits(logits, row, m_t, o_e, T, E, SPLITS, PARTS), o_e, ALL_E, K, NORMALISE)
    tl.store(gates + row[:, None] * E + o_e[None, :], b_gates, mask=m_t[:, None] & (o_e[None, :] < E))


@triton.jit(do_not_specialize=["T"])
def route_backward_kernel(
    dgates, logits, loads, weight, token_mask, dlogits, T, E: tl.constexpr,
    BLOCK_T: tl.constexpr, ALL_E: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr, NORMALISE: tl.constexpr,
    BALANCE: tl.constexpr, MASKED: tl.constexpr, LOADS: tl.constexpr,
):  # fmt: skip
    """dlogits[t], the load-balancing gradient added"""
    o_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_e = tl.arange(0, ALL_E)
    m_t, row = o_t < T, o_t.to(tl.int64)
    m = m_t[:, None] & (o_e[None, :] < E)
    b_logits = load_logits(logits, row, m_t, o_e, T, E, 1, PARTS)
    b_gates = top_k_gates(b_logits, o_e, ALL_E, K, NORMALISE)
    b_dgates = tl.load(dgates + row[:, None] * E + o_e[None, :], mask=m, other=0.0)
    b_dlogits = gates_backward(b_dgates, b_gates, b_logits, o_e, ALL_E, K, NORMALISE)
    if BALANCE:
        b_dlogits += balance_gradient(b_logits, loads, weight, token_mask, o_t, m_t, o_e, E, K, LOADS, MASKED)
    tl.store(dlogits + row[:, None] * E + o_e[None, :], b_dlogits, mask=m)


@triton.jit(do_not_specialize=["T"])
def load_kernel(
    logits, mask, planes, T, E: tl.constexpr,
    BLOCK_T: tl.constexpr, ALL_E: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr, MASKED: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """planes[split] = (assignments of each expert over the split's tokens, valid tokens)"""
    i_s = tl.program_id(0)
    o_e = tl.arange(0, ALL_E)
    part = tl.cdiv(tl.cdiv(T, BLOCK_T), SPLITS) * BLOCK_T
    count = tl.zeros([ALL_E], tl.float32)
    tokens = tl.zeros([BLOCK_T], tl.float32)
    for start in range(i_s * part, tl.minimum((i_s + 1) * part, T), BLOCK_T):
        o_t = start + tl.arange(0, BLOCK_T)
        m_t, row = o_t < T, o_t.to(tl.int64)
        valid = m_t
        if MASKED:
            valid = tl.load(mask + o_t, mask=m_t, other=0) != 0
        kept = top_k(load_logits(logits, row, m_t, o_e, T, E, 1, PARTS), o_e, ALL_E, K)
        count += tl.sum(tl.where(kept & valid[:, None], 1.0, 0.0), 0)
        tokens += tl.where(valid, 1.0, 0.0)
    tl.store(planes + i_s * (E + 1) + o_e, count, mask=o_e < E)
    tl.store(planes + i_s * (E + 1) + E, tl.sum(tokens, 0))


def balance(logits: Tensor, aux_weight: Tensor | None, token_mask: Tensor | None, config) -> tuple:
    """What `balance_gradient` reads, loads, weight and mask, and the constants that go with them.

    Where one is not wanted the logits stand in, since a kernel's pointer cannot be absent.
    """
    if aux_weight is None:
        return logits, logits, logits, {"BALANCE": False, "MASKED": False, "LOADS": 1}
    (_, T, _), E, device = logits.shape, config.num_experts, logits.device
    settings, mask = launch.settings("load", device, T), logits if token_mask is None else token_mask
    loads = torch.empty(settings["SPLITS"], E + 1, device=device, dtype=torch.float32)
    launch.launch(
        load_kernel, (settings["SPLITS"],), logits, (logits, mask, loads, T),
        E=E, ALL_E=triton.next_power_of_2(E), K=config.num_experts_per_tok, PARTS=logits.shape[-1] // E,
        MASKED=token_mask is not None, **settings,
    )  # fmt: skip
    return loads, aux_weight, mask, {"BALANCE": True, "MASKED": token_mask is not None, "LOADS": loads.shape[0]}


def route_launch(logits: Tensor, config) -> Tensor:
    """Gates (T, E) from logits (S, T, E or 2E)."""
    (S, T, _), E = logits.shape, config.num_experts
    gates = torch.empty(T, E, device=logits.device, dtype=torch.float32)
    settings = launch.settings("route", logits.device, T)
    launch.launch(
        route_kernel, (triton.cdiv(T, settings["BLOCK_T"]),), logits, (logits, gates, T),
        E=E, ALL_E=triton.next_power_of_2(E), K=config.num_experts_per_tok, SPLITS=S, PARTS=logits.shape[-1] // E,
        NORMALISE=config.norm_topk_prob, **settings,
    )  # fmt: skip
    return gates


def route_backward_launch(
    dgates: Tensor, logits: Tensor, aux_weight: Tensor | None, token_mask: Tensor | None, config
) -> Tensor:
    """dlogits (T, E) of `route_launch`, the load-balancing gradient added."""
    (_, T, _), E = logits.shape, config.num_experts
    dlogits = torch.empty(T, E, device=logits.device, dtype=torch.float32)
    loads, weight, mask, constants = balance(logits, aux_weight, token_mask, config)
    settings = launch.settings("route", logits.device, T)
    launch.launch(
        route_backward_kernel, (triton.cdiv(T, settings["BLOCK_T"]),), logits,
        (dgates, logits, loads, weight, mask, dlogits, T),
        E=E, ALL_E=triton.next_power_of_2(E), K=config.num_experts_per_tok, PARTS=logits.shape[-1] // E,
        NORMALISE=config.norm_topk_prob, **constants, **settings,
    )  # fmt: skip
    return dlogits
