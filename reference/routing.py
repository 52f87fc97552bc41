"""Routing, from its definition: which experts a token uses, with what weight, and how evenly experts are used."""

from __future__ import annotations

import torch
from torch import Tensor


def router_logits(x: Tensor, router: Tensor) -> Tensor:
    """Router·x: (..., d_in), (E, d_in) -> (..., E), in float32 at least."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.to(dtype) @ router.to(dtype).T


def top_k(logits: Tensor, k: int) -> Tensor:
    """Which k experts a token uses: those with fewer than k ahead of them. (..., E) -> bool (..., E).

    Ahead of an expert is one of larger logit, or of equal logit and lower index.
    """
    E = logits.shape[-1]
    if not 1 <= k <= E:
        raise ValueError(f"k={k} experts of {E} cannot be kept: choose k in [1, {E}]")
    mine, other = logits.unsqueeze(-1), logits.unsqueeze(-2)
    lower_index = torch.ones(E, E, dtype=torch.bool, device=logits.device).tril(-1)
    ahead = (other > mine) | ((other == mine) & lower_index)
    return ahead.sum(-1) < k


def top_k_gates(logits: Tensor, k: int, norm_topk_prob: bool) -> Tensor:
    """The softmax over all experts, kept for the top k, and divided by their sum if asked. (..., E) -> (..., E)."""
    gates = logits.softmax(-1) * top_k(logits, k)
    return gates / gates.sum(-1, keepdim=True) if norm_topk_prob else gates


def load_balancing_loss(logits: Tensor, k: int, token_mask: Tensor | None = None) -> Tensor:
    """E·Σ_e f_e P_e, 0-d: f_e the share of the T·k assignments that went to expert e, P_e the mean softmax of expert e.

    logits (..., E); tokens where token_mask (...) is False are left out. Uniform routing gives 1, no tokens give 0.
    """
    E = logits.shape[-1]
    logits = logits.reshape(-1, E)
    if token_mask is not None:
        logits = logits[token_mask.reshape(-1)]
    T = logits.shape[0]
    if T == 0:
        return logits.sum()
    loss = 0
    for e in range(E):
        f = top_k(logits, k)[:, e].to(logits.dtype).sum() / (T * k)
        P = logits.softmax(-1)[:, e].mean()
        loss = loss + E * f * P
    return loss
