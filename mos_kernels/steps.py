"""The four steps composed: shrink, route, bridge, expand and the base product, forward and backward, without autograd.

The adapter goes first. expand writes y₀ and the base product accumulates into it; backward writes dx₀ and the base's
dy·W accumulates into that: no buffer is read twice, and there is one rounding fewer than in base + adapter.

A base that is no dense product (quantised, wrapped, another adapter) runs by itself, before. Then `weight` is None,
`added` is its output (..., d_out) in the place of the bias, and expand writes the sum. Products with d_out are taken
in that output's dtype, which is y's, products with d_in in x's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mos_kernels.backends import load_backend

Gradients = tuple[Tensor | None, ...]


class Operands(NamedTuple):
    """A linear without its router: what `linear_forward` takes under these names."""

    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    kappa: Tensor
    prepared: tuple | None


def linear_forward(
    x: Tensor,
    weight: Tensor | None,
    added: Tensor | None,
    A: Tensor,
    B: Tensor,
    kappa: Tensor,
    gates: Tensor | None,
    router: Tensor | None,
    dropout_state: Tensor | None,
    dropout_p: float,
    prepared: tuple | None,
    config,
    backend: str,
    differentiable: bool,
    ffn_logits: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """y, and what backward wants besides the arguments: p, n, the logits of a router of its own, and G.

    dropout_state: what the backend's `draw_dropout` drew. differentiable: whether a backward may follow. ffn_logits:
    of the router that other linears on as many tokens share, instead of gates; no backward may follow.
    """
    steps = load_backend(backend)
    compute = steps.compute_dtype(x.dtype)
    tokens, curvature = x.reshape(-1, x.shape[-1]), kappa.to(compute)
    dtype = x.dtype if weight is not None else added.dtype
    addend = added if weight is not None else added.reshape(-1, added.shape[-1])
    dropout = None if dropout_state is None else steps.Dropout(dropout_state, dropout_p)
    p, n, logits = steps.shrink(tokens, A, router, dropout, differentiable)
    routed, own_router = _routed(gates, logits if ffn_logits is None else ffn_logits, compute)
    prepared = steps.prepare(B, dtype, config) if prepared is None else prepared
    y = steps.bridge_expand(p, n, routed, own_router, curvature, prepared, addend, dtype, config)
    if weight is not None:
        y.addmm_(tokens, weight.t())
    return _shaped(y, x), p, n, logits, prepared.gram


def pair_forward(x: Tensor, linears: Sequence[Operands], router: Tensor, config) -> tuple[list[Tensor], Tensor]:
    """y of two linears of one shape and configuration that read x, and their router's logits. No backward may follow.

    Through the kernels, for so few tokens that linears share launches there.
    """
    steps = load_backend("triton")
    compute, tokens = steps.compute_dtype(x.dtype), x.reshape(-1, x.shape[-1])
    p, n, logits = steps.shrink_pair(tokens, [linear.A for linear in linears], router)
    prepared = [
        steps.prepare(linear.B, x.dtype, config) if linear.prepared is None else linear.prepared for linear in linears
    ]
    curvatures, biases = [linear.kappa.to(compute) for linear in linears], [linear.bias for linear in linears]
    both = steps.bridge_expand_pair(p, n, logits, curvatures, prepared, biases, config)
    for y, linear in zip(both, linears, strict=True):
        y.addmm_(tokens, linear.weight.t())
    return [_shaped(y, x) for y in both], logits


def linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    added: Tensor | None,
    A: Tensor,
    B: Tensor,
    kappa: Tensor,
    gates: Tensor | None,
    router: Tensor | None,
    aux_weight: Tensor | None,
    dropout_state: Tensor | None,
    p: Tensor,
    n: Tensor,
    logits: Tensor | None,
    gram: Tensor | None,
    dropout_p: float,
    config,
    backend: str,
    needs: tuple[bool, ...],
    token_mask: Tensor | None = None,
) -> Gradients:
    """Gradients of x, weight, added, A, B, kappa, gates and router, each in its tensor's dtype, where `needs` asks.

    That of a base's output is dy itself.
    """
    needs_x, needs_weight, needs_added, needs_A, needs_B, needs_kappa, needs_gates, needs_router = needs
    steps = load_backend(backend)
    compute = steps.compute_dtype(x.dtype)
    upstream, dy = dy, dy.reshape(-1, dy.shape[-1])
    tokens, curvature = x.reshape(-1, x.shape[-1]), kappa.to(compute)
    dropout = None if dropout_state is None else steps.Dropout(dropout_state, dropout_p)
    routed, own_router = _routed(gates, logits, compute)
    aux_weight = aux_weight if needs_router else None
    mask = None if token_mask is None or aux_weight is None else token_mask.reshape(-1)

    prepared = steps.prepare(B, dy.dtype, config, gram)
    if config.activation == "identity":
        z, bridged = steps.bridge(p, n, routed, own_router, curvature, prepared, config)
        dz, dB = steps.expand_backward(dy, z, prepared, needs_B)
        d = steps.bridge_backward(dz, bridged, p, n, routed, own_router, curvature, prepared, aux_weight, mask, config)
        del z, dz, bridged  # before dx is allocated
        dB = steps.add_norm_gradient(dB, B, d.M) if needs_B else None
    else:
        d = steps.bridge_expand_backward(dy, p, n, routed, own_router, curvature, prepared, aux_weight, mask, config)
        dB = d.B
    dlogits = d.routed if own_router else None
    dx, dA, drouter = steps.shrink_backward(
        tokens, A, router, d.p, d.n, dlogits, dropout, (needs_x, needs_A, needs_router)
    )
    if needs_x:
        dx = (dx if weight is None else dx.addmm_(dy, weight)).view(x.shape)
    dadded = None
    if needs_added:
        dadded = upstream if weight is None else dy.sum(0, dtype=compute).to(added.dtype)
    return (
        dx,
        (dy.t() @ tokens).to(weight.dtype) if needs_weight else None,
        dadded,
        dA.to(A.dtype) if needs_A else None,
        dB.to(B.dtype) if needs_B else None,
        d.kappa.to(kappa.dtype) if needs_kappa else None,
        d.routed.view(gates.shape).to(gates.dtype) if needs_gates else None,
        drouter.to(router.dtype) if needs_router else None,
    )


def _shaped(y: Tensor, x: Tensor) -> Tensor:
    """y (T, ·) in x's shape; no view, which autograd would not let anyone change in place."""
    return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1]))


def _routed(gates: Tensor | None, logits: Tensor | None, compute: torch.dtype) -> tuple[Tensor, bool]:
    """What the bridge routes by, (T, E), and whether that is a router's logits, the linear's own as a rule."""
    if gates is None:
        return logits, True
    return gates.reshape(-1, gates.shape[-1]).to(compute), False


def route_forward(x: Tensor, router: Tensor, config, backend: str, differentiable: bool) -> tuple[Tensor, Tensor]:
    """The gates of a router of its own, and its logits."""
    steps = load_backend(backend)
    logits = steps.routing_logits(x.reshape(-1, x.shape[-1]), router, differentiable)
    return _shaped(steps.route(logits, config), x), logits


def route_backward(
    dgates: Tensor,
    x: Tensor,
    router: Tensor,
    aux_weight: Tensor | None,
    logits: Tensor,
    config,
    backend: str,
    needs: tuple[bool, bool],
    token_mask: Tensor | None = None,
) -> Gradients:
    """Gradients of x and router."""
    steps = load_backend(backend)
    mask = None if token_mask is None else token_mask.reshape(-1)
    dgates = dgates.reshape(-1, dgates.shape[-1])
    dlogits = steps.route_backward(dgates, logits, aux_weight if needs[1] else None, mask, config)
    dx, drouter = steps.routing_logits_backward(x.reshape(-1, x.shape[-1]), router, dlogits, needs)
    return dx.view(x.shape) if needs[0] else None, drouter.to(router.dtype) if needs[1] else None
