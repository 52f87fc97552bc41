"""A gated FFN with its adapters as one operation, forward and backward, in PyTorch.

    [p; logits] = [A_g; A_u; Router]·x    n = ‖x‖²    z_g, z_u = bridge    g = W_g x + B_g z_g    u = W_u x + B_u z_u
    h = φ(g)·u    p_d = A_d·h    n_d = ‖h‖²    z_d = bridge    y = W_d h + B_d z_d

For backward, x, g, u and a few numbers a token are saved; h, φ(g) and all z are computed again. Tensors as wide as the
FFN are read and written a few tokens at a time, so that they stay in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mos_kernels.backends import eager, eager_few
from mos_kernels.backends.interface import BridgeInputs, FFNSaved, Prepared
from mos_kernels.call import Adapted, FFNPlan, FFNTensors, flat, shaped
from mos_kernels.config import MoSConfig

CACHED = 1 << 17
"""Numbers of one wide tensor that are worked on at a time."""

aten = torch.ops.aten


def ffn_forward(t: FFNTensors, plan: FFNPlan) -> tuple[Tensor, FFNSaved]:
    """y (..., d_out), and what backward needs."""
    x, config, dtype = flat(t.x), plan.config, t.x.dtype
    kept_down, *kept = plan.prepared
    prepared = [_prepared(linear, dtype, config, made) for linear, made in zip(t.reads, kept, strict=True)]
    p, n, logits = _shrink(x, t.reads, t.router)
    gates = _gates(t, logits, config)
    z, _ = eager.bridge(_join(p, n, gates, t.reads, prepared, config), config)
    outputs = []
    for linear, made, part in zip(t.reads, prepared, z.chunk(len(t.reads), 1), strict=True):
        outputs.append(eager.expand(part, made, linear.bias, dtype).addmm_(x, linear.weight.t()))

    down, config = t.down, plan.down_config
    made = _prepared(down, dtype, config, kept_down)
    h, p_h, n_h = _activate(outputs, down.A, plan)
    z, _ = eager.bridge(BridgeInputs(p_h, n_h, gates, False, _curvature(down, dtype), made), config)
    y = eager.expand(z, made, down.bias, dtype).addmm_(h, down.weight.t())
    grams = tuple(each.gram for each in (*prepared, made))
    return shaped(y, t.x), FFNSaved(p, n, logits, p_h, n_h, None, None, grams, tuple(outputs))


class FewTokens(NamedTuple):
    """The cached constants for few tokens: of the linears that read x, and of the last one."""

    reads: eager_few.Constants
    down: eager_few.Constants


def constants(t: FFNTensors, plan: FFNPlan) -> FewTokens | None:
    """The constants that `ffn_inference` uses for few tokens, to be cached; None if it has no path for few tokens."""
    if not (t.x.is_cpu and eager_few.are_served(plan.config, plan.down_config)):
        return None
    dtype, router = t.x.dtype, t.router if t.gates is None else None
    kept_down, *kept = plan.prepared
    prepared = [_prepared(linear, dtype, plan.config, made) for linear, made in zip(t.reads, kept, strict=True)]
    down = _prepared(t.down, dtype, plan.down_config, kept_down)
    factors, kappa = [linear.A for linear in t.reads], [linear.kappa for linear in t.reads]
    return FewTokens(
        eager_few.constants(factors, kappa, [linear.B for linear in t.reads], prepared, router, dtype, plan.config),
        eager_few.constants([t.down.A], [t.down.kappa], [t.down.B], [down], None, dtype, plan.down_config),
    )


def ffn_inference(t: FFNTensors, plan: FFNPlan) -> Tensor:
    """y (..., d_out) if no backward follows. Few tokens take a bridge of fewer calls."""
    x = t.x if t.x.dim() == 2 else flat(t.x)
    made = plan.constants
    if not eager_few.are_few(x.shape[0]) or made is None and (made := constants(t, plan)) is None:
        return ffn_forward(t, plan)[0]
    with np.errstate(all="ignore"):
        p, n, logits = eager_few.shrink(x, made.reads)
        gates = eager_few.route(logits, plan.config) if t.gates is None else _gates(t, None, plan.config).numpy()
        z = eager_few.bridge(p, n, gates, made.reads).swapaxes(0, 1)
        outputs = [_few_expanded(x, *one) for one in zip(t.reads, z, made.reads.B, strict=True)]
        if plan.fused:
            outputs = outputs[0].chunk(2, -1)
        h = phi(outputs[0], plan.activation)
        if plan.gated:
            h *= outputs[1]
        p, n, _ = eager_few.shrink(h, made.down)
        (z,) = eager_few.bridge(p, n, gates, made.down).swapaxes(0, 1)
    y = _few_expanded(h, t.down, z, made.down.B[0])
    return y if x is t.x else y.resize_(*t.x.shape[:-1], y.shape[-1])  # no view, which could not be changed in place


def _few_expanded(x: Tensor, linear: Adapted, z: np.ndarray, B: Tensor) -> Tensor:
    """y = W x + b + B z (T, d_out). x (T, d_in), z (T, E·r), B (E·r, d_out)."""
    y, z = F.linear(x, linear.weight, linear.bias), torch.from_numpy(z)
    if y.dtype == B.dtype == z.dtype:
        return y.addmm_(z, B)
    return y.add_(torch.mm(z if z.dtype == B.dtype else eager.operand(z, B.dtype), B))


def ffn_backward(dy: Tensor, t: FFNTensors, saved: FFNSaved, plan: FFNPlan, needs: FFNTensors) -> FFNTensors:
    """The gradients of the tensors, each in its tensor's dtype, where `needs` asks for them; else None."""
    x, dtype, config = flat(t.x), t.x.dtype, plan.down_config
    dy, down, m = flat(dy), t.down, len(t.reads)
    gates = _gates(t, saved.logits, plan.config)

    *grams, gram_h = saved.grams
    made = eager.prepare(down.B, dtype, config, gram_h)
    curved = BridgeInputs(saved.p_h, saved.n_h, gates, False, _curvature(down, dtype), made)
    z, bridged = eager.bridge(curved, config)
    dz, dB = eager.expand_backward(dy, z, made, needs.down.B)
    d = eager.bridge_backward(dz, bridged, curved, None, None, config)
    dB = eager.add_norm_gradient(dB, down.B, d.M) if needs.down.B else None
    d_outputs, dA = _activate_backward(dy @ down.weight, saved.outputs, down.A, d.p, d.n, plan, needs.down.A)
    d_down = dA, dB, d.kappa

    config = plan.config
    prepared = [eager.prepare(linear.B, dtype, config, gram) for linear, gram in zip(t.reads, grams, strict=True)]
    curved = _join(saved.p, saved.n, gates, t.reads, prepared, config)
    z, bridged = eager.bridge(curved, config)
    dz, dBs = [], []
    for i, part in enumerate(z.chunk(m, 1)):
        one, dB = eager.expand_backward(d_outputs[i], part, prepared[i], needs.reads[i].B)
        dz.append(one)
        dBs.append(dB)
    dz = dz[0] if m == 1 else torch.cat(dz, 1)
    dgates = d.routed
    d = eager.bridge_backward(dz, bridged, curved, None, None, config)
    dgates = dgates + d.routed.unflatten(1, (m, -1)).sum(1)
    dlogits = None
    if t.gates is None:
        mask = None if t.token_mask is None else t.token_mask.reshape(-1)
        aux_weight = t.aux_weight if needs.router else None
        dlogits = eager.route_backward(dgates, saved.logits, aux_weight, mask, config)

    A = _stack(t.reads)
    dp = d.p.unflatten(1, (m, -1)).sum(2).flatten(1) if config.share_a and m > 1 else d.p
    needs_A = any(linear.A for linear in needs.reads)
    dx, dA, drouter = eager.shrink_backward(x, A, t.router, dp, d.n, dlogits, None, (needs.x, needs_A, needs.router))
    dAs = [None] * m if dA is None else dA.chunk(m, 0)
    if needs.x:
        for linear, d_output in zip(t.reads, d_outputs, strict=True):
            dx.addmm_(d_output, linear.weight)
    d_reads = []
    for i, (linear, M, dkappa) in enumerate(zip(t.reads, d.M.chunk(m), d.kappa.chunk(m), strict=True)):
        dB = eager.add_norm_gradient(dBs[i], linear.B, M) if needs.reads[i].B else None
        d_reads.append((dAs[i], dB, dkappa))
    return t.gradients(needs, dx, dgates, drouter, d_down, d_reads)


def _curvature(linear: Adapted, dtype: torch.dtype) -> Tensor:
    return linear.kappa.to(eager.compute_dtype(dtype))


def _prepared(linear: Adapted, dtype: torch.dtype, config: MoSConfig, kept: Prepared | None) -> Prepared:
    return eager.prepare(linear.B, dtype, config) if kept is None else kept


def _stack(linears: Sequence[Adapted]) -> Tensor:
    """The A of the linears, (m·r, d_in) or (m·E, r, d_in)."""
    return linears[0].A if len(linears) == 1 else torch.cat([linear.A for linear in linears])


def _gates(t: FFNTensors, logits: Tensor | None, config: MoSConfig) -> Tensor:
    if t.gates is None:
        return eager.route(logits, config)
    return flat(t.gates).to(eager.compute_dtype(t.x.dtype))


def _shrink(x: Tensor, linears: Sequence[Adapted], router: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `eager.shrink`; p and logits are one product if both read x in the compute dtype."""
    if router is None or x.dtype != eager.compute_dtype(x.dtype) or eager.is_reduced(x):
        return eager.shrink(x, _stack(linears), router, None, True)
    stack = torch.cat([*(linear.A.flatten(0, -2).to(x.dtype) for linear in linears), router.to(x.dtype)])
    experts = router.shape[0]
    p, logits = (x @ stack.t()).tensor_split([stack.shape[0] - experts], 1)
    p = p.unflatten(1, (-1, linears[0].A.shape[-2])) if linears[0].A.dim() == 3 else p
    return p, eager.squared_norm(x), logits.contiguous()


def _join(
    p: Tensor, n: Tensor, gates: Tensor, linears: Sequence[Adapted], prepared: Sequence[Prepared], config: MoSConfig
) -> BridgeInputs:
    """Of the m linears that read x, as one linear with m·E experts."""
    m = len(linears)
    made, kappa = prepared[0], linears[0].kappa
    if m > 1:
        if config.share_a:
            p = p.unflatten(1, (m, 1, -1)).expand(-1, -1, config.num_experts, -1).flatten(1, 2)
        gates = gates.repeat(1, m)
        kappa = torch.cat([linear.kappa for linear in linears])
        made = Prepared(made.B, *(torch.cat([each[i] for each in prepared]) for i in range(1, 4)))
    return BridgeInputs(p, n, gates, False, kappa.to(n.dtype), made)


def _tokens_at_a_time(outputs: Sequence[Tensor]) -> Iterator[slice]:
    """As many tokens as fit into a CPU's cache; on other devices all of them, since calls cost more there."""
    tokens, width = outputs[0].shape
    step = max(CACHED // width, 1) if outputs[0].is_cpu else max(tokens, 1)
    return (slice(start, min(start + step, tokens)) for start in range(0, max(tokens, 1), step))


def _halves(outputs: Sequence[Tensor], part: slice, plan: FFNPlan) -> tuple[Tensor, Tensor | None]:
    """g and, if the FFN is gated, u, for a few tokens."""
    first, *second = (output[part] for output in outputs)
    if plan.fused:
        return first.chunk(2, -1)
    return first, second[0] if second else None


def phi(g: Tensor, name: str) -> Tensor:
    """The activation of an FFN, as an `FFNPlan` names it."""
    if name == "silu":
        return F.silu(g)
    return F.gelu(g, approximate="tanh" if name == "gelu_tanh" else "none")


def _phi_backward(gradient: Tensor, g: Tensor, name: str, out: Tensor) -> None:
    if name == "silu":
        aten.silu_backward(gradient, g, grad_input=out)
    else:
        aten.gelu_backward(gradient, g, approximate="tanh" if name == "gelu_tanh" else "none", grad_input=out)


def _activate(outputs: Sequence[Tensor], A: Tensor, plan: FFNPlan) -> tuple[Tensor, Tensor, Tensor]:
    """h (T, d) in the outputs' dtype, p_h = A·h and n_h = ‖h‖²."""
    (tokens, width), like = outputs[0].shape, outputs[0]
    h = like.new_empty(tokens, width // 2 if plan.fused else width)
    rows = A.flatten(0, -2).t()
    p, n = [], []
    for part in _tokens_at_a_time(outputs):
        g, u = _halves(outputs, part, plan)
        phi_g, few = phi(g, plan.activation), h[part]
        few.copy_(phi_g) if u is None else torch.mul(phi_g, u, out=few)
        p.append(eager.narrow_matmul(few, rows, like.dtype))
        n.append(eager.squared_norm(few))
    p, n = (parts[0] if len(parts) == 1 else torch.cat(parts) for parts in (p, n))
    return h, p.unflatten(-1, A.shape[:-1]), n


def _activate_backward(
    dh: Tensor, outputs: Sequence[Tensor], A: Tensor, dp: Tensor, dn: Tensor, plan: FFNPlan, needs_A: bool
) -> tuple[list[Tensor], Tensor | None]:
    """The gradients of the outputs and of A. dh: the gradient of h through the base only; it is overwritten.

    dh = dy·W + dp·A + 2 dn h    du = dh φ(g)    dg = dh u φ'(g)    dA = dpᵀ h
    """
    dtype, (dp, rows) = dh.dtype, (dp.flatten(1), A.flatten(0, -2))
    dA = torch.zeros_like(rows, dtype=dp.dtype) if needs_A else None
    if plan.fused:
        gradients = [torch.empty_like(outputs[0])]
    else:
        gradients = [torch.empty_like(outputs[0]), *([dh] if plan.gated else [])]
    for part in _tokens_at_a_time(outputs):
        g, u = _halves(outputs, part, plan)
        dg, du = _halves(gradients, part, plan)
        phi_g, few = phi(g, plan.activation), dh[part]
        h = phi_g if u is None else phi_g * u
        if needs_A:
            dA += eager.narrow_matmul(dp[part].t(), h, dtype)
        twice = 2 * dn[part].unsqueeze(-1)
        if dtype == dp.dtype:
            few.addmm_(dp[part], rows.to(dtype)).addcmul_(h, twice)
        else:
            total = eager.narrow_matmul(dp[part], rows, dtype).add_(few).addcmul_(h.to(dp.dtype), twice)
            few.copy_(total)  # float16 infinite where it was, which a gradient scaler looks for
        _phi_backward(few if u is None else few * u, g, plan.activation, dg)
        if u is not None:
            torch.mul(few, phi_g, out=du)
    return gradients, None if dA is None else dA.view(A.shape)
