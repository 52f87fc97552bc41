"""The layer expert by expert, vectorised over tokens, in eager PyTorch: the peers that benchmarks compare with.

Both materialise each expert's vectors in full width, and leave the backward to autograd. `mos_linear_as_printed` writes
the paper's equations down one after the other. `mos_linear_per_expert` has every option and guard, and does nothing
needlessly slow: a guard, the scale of its map and the gate are one number a token, and touch the vector once; the two
things that a careful user would then optimise are options, to be shown beside it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from reference.guards import HYPERBOLIC_EXP_LIMIT, SATURATION
from reference.layer import ACTIVATIONS, check_choices, dropped, resolve_gates
from reference.manifold import (
    held_off_zero,
    signed_arcsinc,
    signed_inverse_projection,
    signed_lift,
    signed_projection,
    signed_sinc,
    squared_norm,
)


def mos_linear_as_printed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    kappa: Tensor,
    *,
    gates: Tensor | None = None,
    router: Tensor | None = None,
    scaling: float = 1.0,
    num_experts_per_tok: int | None = None,
    norm_topk_prob: bool = True,
) -> Tensor:
    """Equations 5 to 8 for every expert, in signed form and without guards; φ is the identity. As `mos_linear`."""
    gates = resolve_gates(x, B, gates, router, num_experts_per_tok, norm_topk_prob)
    A, B, kappa = A.to(x.dtype), B.to(x.dtype), kappa.to(gates.dtype)
    y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    for e in range(kappa.shape[0]):
        _, s = signed_inverse_projection(x, kappa[e])
        u = F.linear(F.linear(s, A if A.dim() == 2 else A[e]), B[:, e])
        o = signed_projection(signed_lift(u, kappa[e]), u, kappa[e])
        y = y + (scaling * gates[..., e : e + 1]).to(x.dtype) * o
    return y


def mos_linear_per_expert(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    kappa: Tensor,
    *,
    gates: Tensor | None = None,
    router: Tensor | None = None,
    scaling: float = 1.0,
    num_experts_per_tok: int | None = None,
    norm_topk_prob: bool = True,
    activation: str = "identity",
    mapping: str = "stereographic",
    domain: str = "ball",
    boundary_eps: float = 4e-3,
    dropout_p: float = 0.0,
    keep: Tensor | None = None,
    routed_only: bool = False,
    fused_norm: bool = False,
) -> Tensor:
    """As `reference.layer.mos_linear`, with its arguments and shapes.

    routed_only: each expert gathers the tokens that use it, instead of computing all of them and weighting some by 0.
        The gate of an expert that a token does not use then gets no gradient (no routing needs it).
    fused_norm: ‖v‖² as the square of `torch.linalg.vector_norm`, which makes no full-width temporary, instead of
        `v.square().sum(-1)` as the formula reads.
    """
    check_choices(activation, mapping, domain)
    gates = resolve_gates(x, B, gates, router, num_experts_per_tok, norm_topk_prob)
    norm_squared = _fused_squared_norm if fused_norm else squared_norm
    options = {"mapping": mapping, "domain": domain, "boundary_eps": boundary_eps}
    phi = ACTIVATIONS[activation]
    A, B, kappa = A.to(x.dtype), B.to(x.dtype), kappa.to(gates.dtype)

    shape = (*x.shape[:-1], weight.shape[0])
    y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)).reshape(-1, weight.shape[0])
    n = norm_squared(x).clamp(max=SATURATION).reshape(-1, 1)
    tokens = dropped(x, keep, dropout_p).reshape(-1, x.shape[-1])
    gates = gates.reshape(-1, gates.shape[-1])
    for e in range(kappa.shape[0]):
        A_e, B_e = A if A.dim() == 2 else A[e], B[:, e]
        users = gates[:, e].nonzero().squeeze(-1) if routed_only else slice(None)
        s = (scale_into(n[users], kappa[e], **options) * tokens[users]).to(x.dtype)
        u = phi(F.linear(F.linear(s, A_e), B_e))
        q = norm_squared(u).clamp(max=SATURATION)
        weight_e = scaling * gates[users, e].unsqueeze(-1) * scale_back(q, kappa[e], **options)
        o = weight_e.to(x.dtype) * u
        y = y.index_add(0, users, o) if routed_only else y + o
    return y.reshape(shape)


def scale_into(n: Tensor, kappa: Tensor, *, mapping: str, domain: str, boundary_eps: float) -> Tensor:
    """λ of s = λ x, guards included. n: (T, 1) squared norms of the tokens; kappa: (). Returns (T, 1)."""
    rho = 1 - boundary_eps
    if mapping == "exp_log":
        m = _hold(-kappa * n, HYPERBOLIC_EXP_LIMIT) * _hold(kappa * n, rho * math.pi / 2)
        return m * signed_sinc(kappa * n * m**2)
    if domain == "ball":
        m = _hold(-kappa * n, rho)
        return 2 * m / (1 + kappa * n * m**2)
    return 2 / held_off_zero(1 + kappa * n, boundary_eps)


def scale_back(q: Tensor, kappa: Tensor, *, mapping: str, domain: str, boundary_eps: float) -> Tensor:
    """e of o = e u, guards included. q: (T, 1) squared norms of the expert's outputs; kappa: (). Returns (T, 1)."""
    m = _hold(kappa * q, 1 - boundary_eps)
    a = kappa * q * m**2
    return m * (signed_arcsinc(a) if mapping == "exp_log" else 1 / (1 + (1 - a).sqrt()))


def _fused_squared_norm(v: Tensor) -> Tensor:
    dtype = torch.promote_types(v.dtype, torch.float32)
    return torch.linalg.vector_norm(v, dim=-1, keepdim=True, dtype=dtype).square()


def _hold(a: Tensor, radius: float) -> Tensor:
    """The factor that takes a vector with curvature·norm² = a onto the sphere of that radius, 1 inside it."""
    outside = a > radius**2
    return torch.where(outside, radius / torch.where(outside, a, 1.0).sqrt(), 1.0)
