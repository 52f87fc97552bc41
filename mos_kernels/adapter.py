"""The layer as one differentiable operation: shrink, route, bridge, expand and the base product, in one autograd node.

The adapter goes first. expand writes y₀ and the base product accumulates into it; backward writes dx₀ and the base's
dy·W accumulates into that: no buffer is read twice, and there is one rounding fewer than in base + adapter.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mos_kernels.backends import load_backend, resolve_backend


def mos_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    kappa: Tensor,
    *,
    config,
    gates: Tensor | None = None,
    router: Tensor | None = None,
    aux_weight: Tensor | None = None,
    dropout_p: float = 0.0,
    prepared=None,
    backend: str = "auto",
) -> Tensor:
    """y = x·Wᵀ + b + (α/r) Σ_e g_e o_e (MATH.md, from the paper's eqs 5 to 8).

    Args:
        x: (..., d_in), of the weight's dtype, or any under autocast.
        weight, bias: the base, (d_out, d_in) and (d_out,); any strides. They get gradients where they are trainable.
        A, B: (r, d_in) or (E, r, d_in), and (d_out, E, r); any float dtype, rounded to x's for the wide products.
        kappa: (E,) curvature.
        gates: (..., E) routing weights from elsewhere; or
        router: (E, d_in), this linear's own router, with `aux_weight` (1,) the factor on the gradient of its
            load-balancing loss, injected in backward; None: no such gradient.
        dropout_p: dropout on the adapter's input.
        prepared: what the backend's `prepare` made of B, where B is frozen.

    Returns (..., d_out) in x's dtype. Second derivatives are not offered. Raises ValueError for shapes or dtypes that
    do not fit, before anything is computed.
    """
    x, weight, bias = _autocast(x, weight, bias)
    _check(x, weight, A, B, kappa, gates, router, config)
    backend = resolve_backend(backend, x)
    with torch.autocast(x.device.type, enabled=False):
        return _MoSLinear.apply(
            x, weight, bias, A, B, kappa, gates, router, aux_weight, dropout_p, prepared, config, backend
        )


def mos_route(
    x: Tensor,
    router: Tensor,
    *,
    config,
    aux_weight: Tensor | None = None,
    token_mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The gates of a router of its own: x (..., d_in), router (E, d_in) -> (..., E) in float32 (float64 for float64 x).

    aux_weight: as in `mos_linear`. token_mask (...,): False for tokens left out of load balancing (padding).
    """
    if x.shape[-1] != router.shape[-1]:
        raise ValueError(f"x has width {x.shape[-1]}, the router reads {router.shape[-1]}: pass the FFN block's input")
    if token_mask is not None and token_mask.shape != x.shape[:-1]:
        raise ValueError(
            f"token_mask has shape {tuple(token_mask.shape)}, the tokens {tuple(x.shape[:-1])}: pass one entry a token"
        )
    backend = resolve_backend(backend, x)
    with torch.autocast(x.device.type, enabled=False):
        return _MoSRoute.apply(x, router, aux_weight, token_mask, config, backend)


def _autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """What autocast does for nn.Linear: the wide operands in its dtype, differentiably. float64 is left alone."""
    device_type = x.device.type
    if not torch.is_autocast_enabled(device_type) or x.dtype == torch.float64:
        return x, weight, bias
    dtype = torch.get_autocast_dtype(device_type)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _check(x, weight, A, B, kappa, gates, router, config) -> None:
    d_out, d_in = weight.shape
    if x.shape[-1] != d_in:
        raise ValueError(f"x has width {x.shape[-1]} (shape {tuple(x.shape)}), the layer reads in_features={d_in}")
    if x.dtype != weight.dtype or not x.is_floating_point():
        raise ValueError(
            f"x is {x.dtype} and the weight is {weight.dtype}: cast one of them, or run under torch.autocast"
        )
    E, r = config.num_experts, config.r
    wanted = {
        "A": (r, d_in) if config.share_a else (E, r, d_in),
        "B": (d_out, E, r),
        "kappa": (E,),
        "router": (E, d_in),
    }
    for name, tensor in (("A", A), ("B", B), ("kappa", kappa), ("router", router)):
        if tensor is not None and tuple(tensor.shape) != wanted[name]:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, the configuration asks for {wanted[name]}")
    if gates is None and router is None:
        raise ValueError(
            "no gates were passed, and with router_scope='ffn' the layer has no router of its own: "
            "pass gates=MoSRouter(...)(block_input), or use router_scope='linear'"
        )
    if gates is not None and tuple(gates.shape) != (*x.shape[:-1], E):
        raise ValueError(f"gates have shape {tuple(gates.shape)}, x asks for {(*x.shape[:-1], E)}")


class _MoSLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x, weight, bias, A, B, kappa, gates, router, aux_weight, dropout_p, prepared, config, backend_name
    ):
        backend = load_backend(backend_name)
        compute = backend.compute_dtype(x.dtype)
        tokens, curvature = x.reshape(-1, x.shape[-1]), kappa.to(compute)
        dropout = backend.draw_dropout(tokens, dropout_p) if dropout_p > 0 else None
        p, n, logits = backend.shrink(tokens, A, router, dropout, differentiable=any(ctx.needs_input_grad))
        routed, own_router = _routed(gates, logits, compute)
        prepared = backend.prepare(B, x.dtype, config) if prepared is None else prepared
        if config.activation == "identity":
            z = backend.bridge(p, n, routed, own_router, curvature, prepared, config)
            y = backend.expand(z, prepared, bias, x.dtype)
        else:
            y = backend.bridge_expand(p, n, routed, own_router, curvature, prepared, bias, x.dtype, config)
        y.addmm_(tokens, weight.t())

        keep = None if dropout is None else dropout.keep_bits
        ctx.save_for_backward(x, weight, A, B, kappa, gates, router, aux_weight, p, n, logits, keep)
        ctx.config, ctx.backend_name, ctx.dropout_p = config, backend_name, dropout_p
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        with torch.autocast(dy.device.type, enabled=False):
            return _linear_backward(ctx, dy)


def _linear_backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, A, B, kappa, gates, router, aux_weight, p, n, logits, keep = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, needs_A, needs_B, needs_kappa, needs_gates, needs_router, *_ = (
        ctx.needs_input_grad
    )
    config, backend = ctx.config, load_backend(ctx.backend_name)
    compute = backend.compute_dtype(x.dtype)
    tokens, dy, curvature = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1]), kappa.to(compute)
    dropout = None if keep is None else backend.Dropout(keep, ctx.dropout_p)
    routed, own_router = _routed(gates, logits, compute)
    aux_weight = aux_weight if needs_router else None

    prepared = backend.prepare(B, x.dtype, config)
    if config.activation == "identity":
        z = backend.bridge(p, n, routed, own_router, curvature, prepared, config)
        dz, dB = backend.expand_backward(dy, z, prepared, needs_B)
        d = backend.bridge_backward(dz, p, n, routed, own_router, curvature, prepared, aux_weight, config)
        dB = backend.add_norm_gradient(dB, B, d.M) if needs_B else None
    else:
        d = backend.bridge_expand_backward(dy, p, n, routed, own_router, curvature, prepared, aux_weight, config)
        dB = d.B
    needs = (needs_x, needs_A, needs_router)
    dlogits = d.routed if own_router else None
    dx, dA, drouter = backend.shrink_backward(tokens, A, router, d.p, d.n, dlogits, dropout, needs)
    if needs_x:
        dx = dx.addmm_(dy, weight).view(x.shape)
    return (
        dx,
        (dy.t() @ tokens).to(weight.dtype) if needs_weight else None,
        dy.sum(0, dtype=compute).to(ctx.bias_dtype) if needs_bias else None,
        dA.to(A.dtype) if needs_A else None,
        dB.to(B.dtype) if needs_B else None,
        d.kappa.to(kappa.dtype) if needs_kappa else None,
        d.routed.view(gates.shape).to(gates.dtype) if needs_gates else None,
        drouter.to(router.dtype) if needs_router else None,
        *(None,) * 5,
    )


def _routed(gates: Tensor | None, logits: Tensor | None, compute: torch.dtype) -> tuple[Tensor, bool]:
    """What the bridge routes by, (T, E), and whether that is the logits of the linear's own router."""
    if gates is None:
        return logits, True
    return gates.reshape(-1, gates.shape[-1]).to(compute), False


class _MoSRoute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, router, aux_weight, token_mask, config, backend_name):
        backend = load_backend(backend_name)
        logits = backend.routing_logits(x.reshape(-1, x.shape[-1]), router)
        ctx.save_for_backward(x, router, aux_weight, token_mask, logits)
        ctx.config, ctx.backend_name = config, backend_name
        return backend.route(logits, config).view(*x.shape[:-1], router.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, dgates):
        x, router, aux_weight, token_mask, logits = ctx.saved_tensors
        needs, backend = ctx.needs_input_grad[:2], load_backend(ctx.backend_name)
        mask = None if token_mask is None else token_mask.reshape(-1)
        with torch.autocast(x.device.type, enabled=False):
            gates, dgates = backend.route(logits, ctx.config), dgates.reshape(logits.shape)
            aux_weight = aux_weight if needs[1] else None
            dlogits = backend.route_backward(dgates, gates, logits, aux_weight, mask, ctx.config)
            dx, drouter = backend.routing_logits_backward(x.reshape(-1, x.shape[-1]), router, dlogits, needs)
        dx = dx.view(x.shape) if needs[0] else None
        return dx, drouter.to(router.dtype) if needs[1] else None, None, None, None, None
