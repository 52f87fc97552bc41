"""Routing: which experts a token uses, with which gates, and the loss that keeps the experts evenly used."""

from __future__ import annotations

import torch
from torch import Tensor


def top_k_mask(logits: Tensor, k: int) -> Tensor:
    """Which logits are among the k largest of their token, (T, E) bool. Ties go to the lower index."""
    if k == logits.shape[-1]:
        return torch.ones_like(logits, dtype=torch.bool)
    if torch.compiler.is_exporting():  # ONNX has no stable sort
        return _rank(logits) < k
    order = logits.sort(dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, order[..., :k], True)


def _rank(logits: Tensor) -> Tensor:
    """How many experts precede each one. A larger logit precedes, and so does an equal logit at a lower index."""
    before, own = logits.unsqueeze(-2), logits.unsqueeze(-1)
    lower = torch.ones(before.shape[-1], before.shape[-1], dtype=torch.bool, device=logits.device).tril(-1)
    return ((before > own) | ((before == own) & lower)).sum(-1)


def route(logits: Tensor, k: int, norm_topk_prob: bool) -> Tensor:
    """The gates (T, E) of logits (T, E): the softmax over all experts for the k largest logits, and 0 for the others.

    norm_topk_prob: renormalise the k gates of a token to sum to 1.
    """
    kept = top_k_mask(logits, k)
    if norm_topk_prob:
        return logits.masked_fill(~kept, -torch.inf).softmax(-1)
    return logits.softmax(-1).masked_fill(~kept, 0)


def route_backward(dgates: Tensor, gates: Tensor, logits: Tensor, k: int, norm_topk_prob: bool) -> Tensor:
    """dlogits (T, E) of `route`."""
    if norm_topk_prob:
        return softmax_backward(gates, dgates)
    return softmax_backward(logits.softmax(-1), dgates.masked_fill(~top_k_mask(logits, k), 0))


def softmax_backward(probabilities: Tensor, gradient: Tensor) -> Tensor:
    """p (d - Σ p d). Centred twice, because if one p is nearly 1, the first difference is little more than rounding."""
    for _ in range(2):
        gradient = gradient - (probabilities * gradient).sum(-1, keepdim=True)
    return probabilities * gradient


def load(logits: Tensor, k: int, token_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """f, the share of the T·k assignments that each expert got (Σ f = 1), and P, the mean softmax. Each (E,).

    Tokens where token_mask (T,) is False (padding) are left out.
    """
    kept, probabilities = top_k_mask(logits, k).to(logits.dtype), logits.softmax(-1)
    tokens: int | Tensor = max(logits.shape[0], 1)
    if token_mask is not None:
        valid = token_mask.to(logits.dtype).unsqueeze(-1)
        kept, probabilities = kept * valid, probabilities * valid
        tokens = valid.sum().clamp(min=1)
    return kept.sum(0) / (tokens * k), probabilities.sum(0) / tokens


def load_balancing_loss(logits: Tensor, k: int, token_mask: Tensor | None = None) -> Tensor:
    """E·Σ f_e P_e of logits (T, E), 0-d. It is 1.0 at uniform routing; Mixtral's own form is k times larger."""
    share, mean_probability = load(logits, k, token_mask)
    return logits.shape[-1] * (share.detach() * mean_probability).sum()


def load_balancing_backward(logits: Tensor, k: int, token_mask: Tensor | None = None) -> Tensor:
    """The gradient of `load_balancing_loss` in the logits, (T, E)."""
    share, _ = load(logits, k, token_mask)
    gradient = softmax_backward(logits.softmax(-1), share)
    if token_mask is None:
        return gradient * (logits.shape[-1] / max(logits.shape[0], 1))
    valid = token_mask.to(logits.dtype).unsqueeze(-1)
    return gradient * (logits.shape[-1] * valid / valid.sum().clamp(min=1))
