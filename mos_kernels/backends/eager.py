"""The four steps in PyTorch, forward and backward: any device, any float dtype.

T tokens of width d_in; E experts of rank r; shapes are in each docstring. "Compute dtype" is float64 for float64 input
and float32 otherwise. The backward passes are written by hand and not left to autograd. So a linear saves p, n and the
logits or gates, and nothing as wide as its output.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mos_kernels import geometry, routing
from mos_kernels.backends import constant_under_compile
from mos_kernels.backends.interface import (
    BridgeExpandGradients,
    BridgeGradients,
    BridgeInputs,
    Dropout,
    Prepared,
    Shape,
    ShrinkWeights,
)
from mos_kernels.config import MoSConfig

ONE_PRODUCT = 256
"""E·r up to which products with one r×r matrix an expert are taken as one product with the block-diagonal matrix."""

KEEPS_Z = False
"""`bridge_backward` needs the values that z is made of, so they are computed again, and z with them."""

CHUNK = 1 << 22
"""Numbers of an expert's output that exist at a time when an activation keeps the Gram form from holding."""

CACHED = 1 << 18
"""Numbers whose float32 copy stays in a CPU's cache until it is read again."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of everything but the wide products: float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def operand(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t in the dtype of the wide products. float16 is clamped, since an infinity times B = 0 would be NaN."""
    if dtype == torch.float16 and t.dtype != torch.float16:
        limit = torch.finfo(torch.float16).max
        t = t.clamp(-limit, limit)
    return t.to(dtype)


def narrow_matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b with operands rounded to dtype and the result in the compute dtype. In float16 only b saturates.

    a is x, dy or a gradient: a gradient scaler is to see one that float16 cannot hold, and skip the step.
    """
    return _product(_widened(a.to(dtype)), _widened(operand(b, dtype)))


def _product(a: Tensor, b: Tensor) -> Tensor:
    narrow = a.dtype in (torch.float16, torch.bfloat16)
    return torch.mm(a, b, out_dtype=torch.float32) if narrow else a @ b


def _widened(t: Tensor) -> Tensor:
    """t as `_product` takes it: in float32 where no product of its dtype has a result in float32."""
    narrow = t.dtype in (torch.float16, torch.bfloat16)
    return t.float() if narrow and not (t.is_cuda and torch.version.hip is None) else t


def exact_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in IEEE arithmetic of the operands' dtype, even if the user has allowed TF32 for float32."""
    if is_reduced(a):
        return (a.double() @ b.double()).float()
    return a @ b


def is_reduced(t: Tensor) -> bool:
    """Whether products of float32 tensors like t are computed in TF32 or another reduced precision."""
    return t.dtype == torch.float32 and _float32_is_reduced(t.device.type)


@constant_under_compile
def _float32_is_reduced(device_type: str) -> bool:
    backend = torch.backends.cuda if device_type == "cuda" else torch.backends.mkldnn
    return backend.matmul.fp32_precision in ("tf32", "bf16")


def is_observed() -> bool:
    """Whether operations may be recorded as a graph: under torch.compile, and under any dispatch mode."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


# shrink: x -> p, n, logits


def saved_shapes(
    tokens: int, dtype: torch.dtype, A: Tensor | None, router: Tensor | None
) -> tuple[Shape | None, Shape | None, Shape | None]:
    """p (T, r) or (T, E, r), n (T,) and logits (T, E)."""
    shrunk = (None, None) if A is None else ((tokens, *A.shape[:-1]), (tokens,))
    return *shrunk, None if router is None else (tokens, router.shape[0])


def draw_dropout(x: Tensor, p: float) -> Dropout:
    """Draw which elements of x (..., d_in) are kept, one bit each: state (T, ceil(d_in / 8)) uint8."""
    keep = torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - p)
    padded = F.pad(keep, (0, -x.shape[-1] % 8)).unflatten(-1, (-1, 8))
    bits = (padded * _bit_values(x.device)).sum(-1, dtype=torch.uint8)
    return Dropout(bits.reshape(-1, bits.shape[-1]), p)


def drop(x: Tensor, dropout: Dropout | None) -> Tensor:
    """x, or with dropout, its kept elements times 1 / (1 - p)."""
    if dropout is None:
        return x
    bits = dropout.state.unsqueeze(-1).bitwise_and(_bit_values(x.device))
    keep = bits.ne(0).flatten(-2)[..., : x.shape[-1]]
    scaled = operand(x.to(compute_dtype(x.dtype)) * (1 / (1 - dropout.p)), x.dtype)  # float16 may overflow
    return torch.where(keep, scaled, 0)


def _bit_values(device: torch.device) -> Tensor:
    return torch.bitwise_left_shift(
        torch.ones(8, dtype=torch.uint8, device=device), torch.arange(8, device=device).byte()
    )


def squared_norm(x: Tensor) -> Tensor:
    """n = ‖x‖² (T,), saturated. Summed from squares, a few rows at a time, so that no copy of x (T, d) is made.

    A norm squared would round twice more, and a norm's own sum loses more digits: near κn = -1 they are ∂λ/∂κ's first.
    """
    dtype = compute_dtype(x.dtype)
    parts = [x[rows].to(dtype).square().sum(-1) for rows in _chunks(*x.shape, CACHED if x.is_cpu else CHUNK)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).clamp(max=geometry.SATURATION)


def shrink(
    x: Tensor,
    A: Tensor,
    router: Tensor | None,
    dropout: Dropout | None,
    differentiable: bool,
    stack: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """p = A·drop(x), n = ‖x‖² and, with a router (E, d_in), logits = Router·x, all in the compute dtype.

    x (T, d_in), A (r, d_in) or (E, r, d_in) -> p (T, r) or (T, E, r), n (T,), logits (T, E) or None. `differentiable`
    says whether a backward may follow. If none does, a backend may return partial results, which the bridge adds up.
    stack: `Prepared.stack`, which this backend does not make.
    """
    p = narrow_matmul(drop(x, dropout), A.flatten(0, -2).t(), x.dtype)
    logits = None if router is None else routing_logits(x, router)
    return p.unflatten(-1, A.shape[:-1]), squared_norm(x), logits


def shrink_backward(
    x: Tensor,
    A: Tensor,
    router: Tensor | None,
    dp: Tensor,
    dn: Tensor,
    dlogits: Tensor | None,
    dropout: Dropout | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx₀ = drop(dp·A) + dlogits·Router + 2 dn x (T, d_in) in x's dtype, dA = dpᵀ drop(x), dRouter = dlogitsᵀ x.

    needs: which of the three to compute. The caller adds the base's dy·W to dx₀.
    """
    needs_x, needs_A, needs_router = needs
    dp, stacked = dp.flatten(1), A.flatten(0, -2)
    dA = narrow_matmul(dp.t(), drop(x, dropout), x.dtype).view(A.shape) if needs_A else None
    dx0 = None
    if needs_x:
        dx0 = x.to(dp.dtype) * (2 * dn).unsqueeze(-1)
        if dropout is None:
            _add_product(dx0, dp, stacked, x.dtype)
        else:
            dx0 += drop(narrow_matmul(dp, stacked, x.dtype), dropout)
        if dlogits is not None:
            _add_product(dx0, dlogits, router, x.dtype)
        dx0 = dx0.to(x.dtype)
    drouter = narrow_matmul(dlogits.t(), x, x.dtype) if needs_router else None
    return dx0, dA, drouter


def _add_product(total: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype) -> None:
    if total.dtype == dtype:
        total.addmm_(a, b.to(dtype))
    else:
        total += narrow_matmul(a, b, dtype)


# route: x -> logits -> gates, for a router of its own or within the bridge


def routing_logits(x: Tensor, router: Tensor, differentiable: bool = True) -> Tensor:
    """Router·x (T, E) in the compute dtype, from x (T, d_in) and router (E, d_in)."""
    compute = compute_dtype(x.dtype)
    return exact_matmul(x.to(compute), router.to(compute).t())


def routing_logits_backward(
    x: Tensor, router: Tensor, dlogits: Tensor, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """dx = dlogits·Router (T, d_in) in x's dtype and dRouter = dlogitsᵀ x (E, d_in), each if `needs` says so."""
    dx = narrow_matmul(dlogits, router, x.dtype).to(x.dtype) if needs[0] else None
    return dx, narrow_matmul(dlogits.t(), x, x.dtype) if needs[1] else None


def route(logits: Tensor, config: MoSConfig) -> Tensor:
    """Gates (T, E) from logits (T, E)."""
    return routing.route(logits, config.num_experts_per_tok, config.norm_topk_prob)


def route_backward(
    dgates: Tensor, logits: Tensor, aux_weight: Tensor | None, token_mask: Tensor | None, config: MoSConfig
) -> Tensor:
    """dlogits (T, E), plus aux_weight times the gradient of the load-balancing loss if aux_weight is given."""
    return _route_backward(dgates, route(logits, config), logits, aux_weight, token_mask, config)


def _route_backward(
    dgates: Tensor,
    gates: Tensor,
    logits: Tensor,
    aux_weight: Tensor | None,
    token_mask: Tensor | None,
    config: MoSConfig,
) -> Tensor:
    k = config.num_experts_per_tok
    dlogits = routing.route_backward(dgates, gates, logits, k, config.norm_topk_prob)
    if aux_weight is not None:
        dlogits += aux_weight.to(dlogits.dtype) * routing.load_balancing_backward(logits, k, token_mask)
    return dlogits


# bridge: p, n, gates or logits, κ, G -> z


class Curved(NamedTuple):
    """The bridge's intermediate values. Backward computes them again instead of saving them."""

    scale: Tensor  # λ (T, E)
    scale_dn: Tensor  # ∂λ/∂n (T, E)
    scale_dkappa: Tensor  # ∂λ/∂κ (T, E)
    p: Tensor  # (T, 1 or E, r)
    h: Tensor  # λ p (T, E, r)


def prepare(
    B: Tensor,
    dtype: torch.dtype,
    config: MoSConfig,
    gram: Tensor | None = None,
    weights: ShrinkWeights | None = None,
) -> Prepared:
    """`Prepared` of B (d_out, E, r), for input of `dtype`, without a stack of the weights.

    gram: the result of an earlier call with the same B.
    """
    wide = operand(B, dtype)
    if config.activation != "identity":
        return Prepared(wide, None)
    gram = _gram(B.to(compute_dtype(dtype))) if gram is None else gram
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    return Prepared(wide, gram, gram / trace.clamp(min=torch.finfo(trace.dtype).tiny)[:, None, None], trace)


def _gram(B: Tensor) -> Tensor:
    """B_eᵀ B_e (E, r, r). For few experts of low rank, one product of E times the arithmetic, without a copy of B."""
    (_, E, r), flat = B.shape, B.flatten(1)
    if E * r > ONE_PRODUCT:
        columns = B.permute(1, 2, 0)
        return exact_matmul(columns, columns.mT)
    return exact_matmul(flat.t(), flat).view(E, r, E, r).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def _gates(t: BridgeInputs, config: MoSConfig) -> Tensor:
    return route(t.routed, config) if t.own_router else t.routed


def _into_space(t: BridgeInputs, config: MoSConfig) -> Curved:
    scale, scale_dn, scale_dkappa = geometry.inverse_projection_scale(t.n, t.kappa, config)
    p = t.p.unsqueeze(1) if t.p.dim() == 2 else t.p
    return Curved(scale, scale_dn, scale_dkappa, p, scale.unsqueeze(-1) * p)


def _squared_output_norm(h: Tensor, prepared: Prepared) -> tuple[Tensor, Tensor]:
    """q = hᵀGh (T, E), saturated, and G h / trace (T, E, r).

    With a huge h, terms of both signs overflow float32, and their sum would be inf - inf. They are then summed in
    float64 if the device has it. If testing for it would wait for the device, or make a graph depend on data, both sums
    are computed.
    """
    unit_gh = exact_matmul(h.transpose(0, 1), prepared.unit_gram).transpose(0, 1)
    total = (h * unit_gh).sum(-1)
    is_known = h.is_cpu and type(h) is Tensor and not is_observed()
    if h.device.type != "mps" and not (is_known and math.isfinite(total.sum())):
        total = torch.where(total.isfinite(), total, (h.double() * unit_gh.double()).sum(-1))
    return (total * prepared.trace).clamp_(0.0, geometry.SATURATION).to(h.dtype), unit_gh


class Bridged(NamedTuple):
    """The bridge's values, computed once for z and for the gradients."""

    curved: Curved
    gates: Tensor  # (T, E)
    unit_gh: Tensor  # G h / trace (T, E, r)
    e: Tensor  # (T, E)
    e_dq: Tensor  # ∂e/∂q (T, E)
    e_dkappa: Tensor  # ∂e/∂κ (T, E)
    weight: Tensor  # (α/r) g e (T, E, 1)


def bridge(t: BridgeInputs, config: MoSConfig) -> tuple[Tensor, Bridged]:
    """z = (α/r) g e(q; κ) h with h = λ(n; κ) p and q = hᵀGh, (T, E·r) in the compute dtype, and what it was made from.

    p (T, r) or (T, E, r), n (T,), gates or logits (T, E).
    """
    gates, curved = _gates(t, config), _into_space(t, config)
    q, unit_gh = _squared_output_norm(curved.h, t.prepared)
    e, e_dq, e_dkappa = geometry.projection_scale(q, t.kappa, config)
    weight = (config.scaling * gates * e).unsqueeze(-1)
    return (weight * curved.h).flatten(1), Bridged(curved, gates, unit_gh, e, e_dq, e_dkappa, weight)


def bridge_backward(
    dz: Tensor,
    bridged: Bridged,
    t: BridgeInputs,
    aux_weight: Tensor | None,
    token_mask: Tensor | None,
    config: MoSConfig,
) -> BridgeGradients:
    """Gradients of `bridge`, in rank space. dz (T, E·r); aux_weight, token_mask as in `route_backward`.

    dg = (α/r) e (dz·h)    dq = (α/r) g (dz·h) ∂e/∂q    dh = (α/r) g e dz + 2 dq G h    dp = Σ_e λ_e dh_e
    dn = Σ_e (dh_e·p) ∂λ_e/∂n    dκ = Σ_T [(α/r) g (dz·h) ∂e/∂κ + (dh·p) ∂λ/∂κ]    M_e = Σ_T dq h hᵀ
    """
    curved, gates, unit_gh, e, e_dq, e_dkappa, weight = bridged
    h, dz = curved.h, dz.unflatten(-1, curved.h.shape[1:])
    dz_h = (dz * h).sum(-1)
    de = config.scaling * gates * dz_h
    dq = de * e_dq
    dh = weight * dz + (2 * dq * t.prepared.trace).unsqueeze(-1) * unit_gh
    dkappa, dn, dp = _into_space_backward(dh, curved, t.p.dim() == 2)
    M = exact_matmul((dq.unsqueeze(-1) * h).transpose(0, 1).mT, h.transpose(0, 1))
    drouted = config.scaling * e * dz_h
    if t.own_router:
        drouted = _route_backward(drouted, gates, t.routed, aux_weight, token_mask, config)
    return BridgeGradients(drouted, dkappa + _bounded(de * e_dkappa).sum(0), dn, dp, M)


def _bounded(terms: Tensor) -> Tensor:
    """A token's terms of dκ, kept finite: at κ = 0 they grow like a squared norm, and inf - inf would be NaN."""
    limit = torch.finfo(terms.dtype).max * 1e-6
    return terms.clamp(-limit, limit)


def _into_space_backward(dh: Tensor, curved: Curved, shared_p: bool) -> tuple[Tensor, Tensor, Tensor]:
    dscale = (dh * curved.p).sum(-1)
    dp = curved.scale.unsqueeze(-1) * dh
    return (
        _bounded(dscale * curved.scale_dkappa).sum(0),
        (dscale * curved.scale_dn).sum(-1),
        dp.sum(1) if shared_p else dp,
    )


# expand: z, B and what is added -> y₀


def expand(z: Tensor, prepared: Prepared, added: Tensor | None, dtype: torch.dtype) -> Tensor:
    """y₀ = z·Bcatᵀ + added (T, d_out) in `dtype`.

    added: the bias (d_out,), if the base's x·Wᵀ is added later; or the output (T, d_out) of a base that ran before.
    """
    z, Bcat = operand(z, dtype), prepared.B.flatten(1).t()
    return z @ Bcat if added is None else torch.addmm(added.to(dtype), z, Bcat)


def expand_backward(dy: Tensor, z: Tensor, prepared: Prepared, needs_dB: bool) -> tuple[Tensor, Tensor | None]:
    """dz = dy·Bcat (T, E·r) and the part dyᵀz (d_out, E, r) of dB, compute dtype. dy (T, d_out), z (T, E·r)."""
    z, dy = operand(z, dy.dtype), _widened(dy)  # widened once: dy is as wide as the output
    dz = _product(dy, _widened(prepared.B.flatten(1)))
    return dz, _product(dy.t(), _widened(z)).view(prepared.B.shape) if needs_dB else None


def add_norm_gradient(dB: Tensor, B: Tensor, M: Tensor) -> Tensor:
    """dB + 2 B M, where 2 B M is the part of the gradient that comes through q. Overwrites dB (d_out, E, r)."""
    B, (E, r) = B.to(M.dtype), B.shape[1:]
    if E * r > ONE_PRODUCT:
        return dB.add_(exact_matmul(B.transpose(0, 1), M).transpose(0, 1), alpha=2)
    return dB.add_(exact_matmul(B.flatten(1), torch.block_diag(*M)).view(dB.shape), alpha=2)


# bridge and expand in one; for φ ≠ identity the Gram form does not hold, so u = φ(B h) is formed, a chunk at a time


def _activation(v: Tensor, name: str) -> Tensor:
    if name == "tanh":
        return v.tanh()
    return F.silu(v) if name == "silu" else F.gelu(v)


def _activation_slope(v: Tensor, name: str) -> Tensor:
    if name == "tanh":
        return 1 - v.tanh().square()
    if name == "silu":
        s = v.sigmoid()
        return s * (1 + v * (1 - s))
    density = torch.exp(-0.5 * v * v) * 0.3989422804014327
    return 0.5 * (1 + torch.erf(v * 0.7071067811865476)) + v * density


def _chunks(tokens: int, width: int, numbers: int) -> list[slice]:
    """Slices of rows with at most this many numbers, or one row; at least one slice."""
    if torch.compiler.is_compiling():  # a loop over chunks would make the graph depend on the number of tokens
        return [slice(0, tokens)]
    step = max(numbers // max(width, 1), 1)
    return [slice(start, min(start + step, tokens)) for start in range(0, max(tokens, 1), step)]


def bridge_expand(t: BridgeInputs, added: Tensor | None, dtype: torch.dtype, config: MoSConfig) -> Tensor:
    """y₀ = added + (α/r) Σ_e g_e e_e φ(B_e h_e) (T, d_out) in `dtype`; added as in `expand`."""
    if config.activation == "identity":
        z, _ = bridge(t, config)
        return expand(z, t.prepared, added, dtype)
    B, gates, h = t.prepared.B, _gates(t, config), _into_space(t, config).h
    y0 = torch.empty(h.shape[0], B.shape[0], dtype=dtype, device=h.device)
    for chunk in _chunks(*y0.shape, CHUNK):
        total = torch.zeros(y0[chunk].shape, dtype=h.dtype, device=h.device)
        if added is not None:
            total += added[chunk] if added.dim() == 2 else added
        for expert in range(B.shape[1]):
            h_tile = operand(h[chunk, expert], dtype)
            u = _activation(narrow_matmul(h_tile, B[:, expert].t(), dtype), config.activation)
            q = squared_norm(u)
            e, _, _ = geometry.projection_scale(q, t.kappa[expert], config)
            total.addcmul_(u, (config.scaling * gates[chunk, expert] * e).unsqueeze(-1))
        y0[chunk] = operand(total, dtype)
    return y0


def bridge_expand_backward(
    dy: Tensor, t: BridgeInputs, aux_weight: Tensor | None, token_mask: Tensor | None, config: MoSConfig
) -> BridgeExpandGradients:
    """Gradients of `bridge_expand` with an activation; dy (T, d_out) is read, and u formed again, a chunk at a time."""
    B, gates, curved = t.prepared.B, _gates(t, config), _into_space(t, config)
    h, dh = curved.h, torch.empty_like(curved.h)
    dgates, e_dkappa = torch.empty_like(curved.scale), torch.zeros_like(t.kappa, dtype=h.dtype)
    dB = torch.zeros(B.shape, dtype=h.dtype, device=B.device)
    for chunk in _chunks(h.shape[0], B.shape[0], CHUNK):
        upstream = dy[chunk].to(h.dtype)
        for expert in range(B.shape[1]):
            h_tile = operand(h[chunk, expert], dy.dtype)
            v = narrow_matmul(h_tile, B[:, expert].t(), dy.dtype)
            u = _activation(v, config.activation)
            q = squared_norm(u)
            e, e_dq, de_dkappa = geometry.projection_scale(q, t.kappa[expert], config)
            scaled_gates = config.scaling * gates[chunk, expert]
            dy_u = (upstream * u).sum(-1)
            dgates[chunk, expert] = config.scaling * e * dy_u
            e_dkappa[expert] += _bounded(scaled_gates * dy_u * de_dkappa).sum()
            du = upstream * (scaled_gates * e).unsqueeze(-1)
            du.addcmul_(u, (2 * scaled_gates * dy_u * e_dq).unsqueeze(-1))
            dv = du.mul_(_activation_slope(v, config.activation))
            dB[:, expert] += narrow_matmul(dv.t(), h_tile, dy.dtype)
            dh[chunk, expert] = narrow_matmul(dv, B[:, expert], dy.dtype)
    dkappa, dn, dp = _into_space_backward(dh, curved, t.p.dim() == 2)
    if t.own_router:
        dgates = _route_backward(dgates, gates, t.routed, aux_weight, token_mask, config)
    return BridgeExpandGradients(dgates, dkappa + e_dkappa, dn, dp, dB)
