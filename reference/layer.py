"""The Mixture-of-Space layer, token by token and expert by expert, with the points on the manifold visible."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from reference import manifold
from reference.guards import HYPERBOLIC_EXP_LIMIT, radial_projection, saturated
from reference.routing import router_logits, top_k_gates

ACTIVATIONS = {"identity": lambda v: v, "tanh": torch.tanh, "silu": F.silu, "gelu": F.gelu}
MAPPINGS = ("stereographic", "exp_log")
DOMAINS = ("ball", "raw")

MAPS = {  # into the space, lift to the manifold, back out of it
    ("stereographic", "literal"): (manifold.inverse_projection, manifold.lift, manifold.projection),
    ("stereographic", "signed"): (
        manifold.signed_inverse_projection, manifold.signed_lift, manifold.signed_projection,
    ),
    ("exp_log", "literal"): (manifold.exp_map, manifold.lift, manifold.log_map),
    ("exp_log", "signed"): (manifold.signed_exp_map, manifold.signed_lift, manifold.signed_log_map),
}  # fmt: skip


class ExpertPoints(NamedTuple):
    """What one expert does to one token, step by step; times (1,) are ξ (literal) or √|κ| ξ (signed)."""

    time_in: Tensor
    space_in: Tensor  # (d_in,), before dropout
    time_out: Tensor
    space_out: Tensor  # (d_out,), inside the domain of the way back
    output: Tensor  # (d_out,), o


def mos_expert(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    kappa: Tensor,
    *,
    activation: str = "identity",
    mapping: str = "stereographic",
    domain: str = "ball",
    boundary_eps: float = 4e-3,
    dropout_p: float = 0.0,
    keep: Tensor | None = None,
    formula: str = "signed",
) -> ExpertPoints:
    """Equations 5 to 8 for a token x (d_in,) and an expert A (r, d_in), B (d_out, r), kappa (). Options: mos_linear."""
    check_choices(activation, mapping, domain)
    if formula not in ("signed", "literal"):
        raise ValueError(f"formula={formula!r} must be 'signed' or 'literal'")
    into, lift, out = MAPS[mapping, formula]
    rho = 1 - boundary_eps
    options = {}

    x, stretch = saturated(x)
    if mapping == "exp_log":
        x = radial_projection(x, -kappa, HYPERBOLIC_EXP_LIMIT)
        x = radial_projection(x, kappa, rho * math.pi / 2)
    elif domain == "ball":
        x = radial_projection(x, -kappa, rho)
    else:
        options["pole_eps"] = boundary_eps
    time_in, space_in = into(x, kappa, **options)
    space_in = manifold.scaled(stretch, space_in)

    u = ACTIVATIONS[activation](B @ (A @ dropped(space_in, keep, dropout_p)))

    u, stretch = saturated(u)
    u = radial_projection(u, kappa, rho)
    time_out = lift(u, kappa)
    return ExpertPoints(time_in, space_in, time_out, u, manifold.scaled(stretch, out(time_out, u, kappa)))


def mos_linear(
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
    formula: str = "signed",
) -> Tensor:
    """y = W x + b + scaling·Σ_e g_e o_e. Returns (..., d_out) in x's dtype.

    Args:
        x: (..., d_in), any float dtype; the other tensors are cast to it (gates and kappa to float32 at least).
        weight, bias: (d_out, d_in), (d_out,).
        A, B: (r, d_in) or (E, r, d_in), and (d_out, E, r).
        kappa: (E,) curvatures.
        gates: (..., E) routing weights; or
        router: (E, d_in), routed by its logits: `num_experts_per_tok` (default: all) and `norm_topk_prob`.
        keep, dropout_p: (..., d_in) bool, the components of x that dropout left; they are divided by 1 - dropout_p.
            Norms and routing read the undropped token.
        activation, mapping, domain, boundary_eps: as in MoSConfig.
        formula: "signed" (every κ), or "literal", the paper's equations as printed (κ ≠ 0; exp/log also x, u ≠ 0).
    """
    gates = resolve_gates(x, B, gates, router, num_experts_per_tok, norm_topk_prob)
    A, B, kappa = A.to(x.dtype), B.to(x.dtype), kappa.to(gates.dtype)
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if x.numel() == 0:
        return F.linear(x, weight, bias)
    rows = []
    tokens, token_gates = x.reshape(-1, x.shape[-1]), gates.reshape(-1, gates.shape[-1])
    keeps = None if keep is None else keep.reshape(tokens.shape)
    for t in range(tokens.shape[0]):
        y = weight @ tokens[t]
        if bias is not None:
            y = y + bias
        for e in range(kappa.shape[0]):
            points = mos_expert(
                tokens[t], A if A.dim() == 2 else A[e], B[:, e], kappa[e],
                activation=activation, mapping=mapping, domain=domain, boundary_eps=boundary_eps,
                dropout_p=dropout_p, keep=None if keeps is None else keeps[t], formula=formula,
            )  # fmt: skip
            y = y + scaling * token_gates[t, e] * points.output
        rows.append(y)
    return torch.stack(rows).reshape(*x.shape[:-1], weight.shape[0])


def dropped(x: Tensor, keep: Tensor | None, dropout_p: float) -> Tensor:
    """x where it is kept, divided by 1 - dropout_p; zero elsewhere."""
    return x if keep is None else x * keep / (1 - dropout_p)


def resolve_gates(
    x: Tensor,
    B: Tensor,
    gates: Tensor | None,
    router: Tensor | None,
    num_experts_per_tok: int | None,
    norm_topk_prob: bool,
) -> Tensor:
    """The gates (..., E), given or routed, in float32 at least. Raises ValueError unless they have one source."""
    if (gates is None) == (router is None):
        raise ValueError("pass either gates (..., E) or router (E, d_in), not both")
    E = B.shape[1]
    if gates is None:
        gates = top_k_gates(router_logits(x, router), num_experts_per_tok or E, norm_topk_prob)
    if gates.shape != (*x.shape[:-1], E):
        raise ValueError(f"gates have shape {tuple(gates.shape)}, x and B ask for {(*x.shape[:-1], E)}")
    return gates.to(torch.promote_types(x.dtype, torch.float32))


def check_choices(activation: str, mapping: str, domain: str) -> None:
    """Raise ValueError for an option that does not exist."""
    for name, value, choices in (
        ("activation", activation, tuple(ACTIVATIONS)), ("mapping", mapping, MAPPINGS), ("domain", domain, DOMAINS),
    ):  # fmt: skip
        if value not in choices:
            raise ValueError(f"{name}={value!r} must be one of {choices}")
