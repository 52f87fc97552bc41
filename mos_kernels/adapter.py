"""The layer as one differentiable operation: shrink, route, bridge, expand and the base product, in one autograd node.

The adapter goes first. expand writes y₀ and the base product accumulates into it; backward writes dx₀ and the base's
dy·W accumulates into that: no buffer is read twice, and there is one rounding fewer than in base + adapter.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mos_kernels import routing
from mos_kernels.backends import resolve_backend


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
    gram=None,
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
        gram: the backend's precomputed G of a frozen B.

    Returns (..., d_out) in x's dtype. Second derivatives are not offered. Raises ValueError for shapes or dtypes that
    do not fit, before anything is computed.
    """
    x, weight, bias = _autocast(x, weight, bias)
    _check(x, weight, A, B, kappa, gates, router, config)
    module = resolve_backend(backend, x)
    with torch.autocast(x.device.type, enabled=False):
        return _MoSLinear.apply(
            x, weight, bias, A, B, kappa, gates, router, aux_weight, dropout_p, gram, config, module
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
    module = resolve_backend(backend, x)
    with torch.autocast(x.device.type, enabled=False):
        return _MoSRoute.apply(x, router, aux_weight, token_mask, config, module)


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
        ctx, x, weight, bias, A, B, kappa, gates, router, aux_weight, dropout_p, gram, config, backend: ModuleType
    ):
        compute = backend.compute_dtype(x.dtype)
        tokens = x.reshape(-1, x.shape[-1])
        dropout = backend.draw_dropout(tokens, dropout_p) if dropout_p > 0 else None
        p, n = backend.shrink(tokens, A, dropout)
        routed = backend.routing_logits(tokens, router) if gates is None else gates.reshape(-1, gates.shape[-1])
        routing_weights = _gates(routed.to(compute), gates is None, config)
        curvature = kappa.to(compute)
        if config.activation == "identity":
            G = backend.gram(B, x.dtype) if gram is None else gram
            z = backend.bridge(p, n, routing_weights, curvature, G, config)
            y = backend.expand(z, B, bias, x.dtype)
        else:
            y = backend.bridge_expand(p, n, routing_weights, curvature, B, bias, x.dtype, config)
        y.addmm_(tokens, weight.t())

        ctx.save_for_backward(
            x, weight, A, B, kappa, gates, router, aux_weight, p, n, routed if gates is None else None,
            None if dropout is None else dropout.keep_bits,
        )  # fmt: skip
        ctx.config, ctx.backend, ctx.dropout_p = config, backend, dropout_p
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        with torch.autocast(dy.device.type, enabled=False):
            return _MoSLinear._backward(ctx, dy)

    @staticmethod
    def _backward(ctx, dy):
        x, weight, A, B, kappa, gates, router, aux_weight, p, n, logits, keep_bits = ctx.saved_tensors
        config, backend = ctx.config, ctx.backend
        needs = dict(
            zip(("x", "weight", "bias", "A", "B", "kappa", "gates", "router"), ctx.needs_input_grad, strict=False)
        )
        compute = backend.compute_dtype(x.dtype)
        tokens, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        dropout = None if keep_bits is None else backend.Dropout(keep_bits, ctx.dropout_p)
        routed = logits if gates is None else gates.reshape(-1, gates.shape[-1]).to(compute)
        routing_weights = _gates(routed, gates is None, config)
        curvature = kappa.to(compute)

        if config.activation == "identity":
            dz = backend.expand_backward_input(dy, B)
            d = backend.bridge_backward(dz, p, n, routing_weights, curvature, backend.gram(B, x.dtype), config)
            dB = backend.expand_backward_weight(dy, d.z, B, d.M) if needs["B"] else None
        else:
            d = backend.bridge_expand_backward(dy, p, n, routing_weights, curvature, B, config)
            dB = d.B
        dx, dA = backend.shrink_backward(tokens, A, d.p, d.n, dropout, needs["x"], needs["A"])

        dgates = drouter = None
        if gates is not None:
            dgates = d.gates.view(gates.shape).to(gates.dtype) if needs["gates"] else None
        elif needs["x"] or needs["router"]:
            dlogits = _dlogits(d.gates, routing_weights, logits, aux_weight if needs["router"] else None, None, config)
            dx_router, drouter = backend.routing_logits_backward(tokens, router, dlogits, needs["x"], needs["router"])
            dx = dx.add_(dx_router) if needs["x"] else None
        if needs["x"]:
            dx = dx.addmm_(dy, weight).view(x.shape)
        dweight = (dy.t() @ tokens).to(weight.dtype) if needs["weight"] else None
        dbias = dy.sum(0, dtype=compute).to(ctx.bias_dtype) if needs["bias"] else None
        return (
            dx, dweight, dbias, _cast(dA, A), _cast(dB, B) if needs["B"] else None,
            _cast(d.kappa, kappa) if needs["kappa"] else None, dgates, _cast(drouter, router), *(None,) * 5,
        )  # fmt: skip


class _MoSRoute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, router, aux_weight, token_mask, config, backend: ModuleType):
        logits = backend.routing_logits(x.reshape(-1, x.shape[-1]), router)
        ctx.save_for_backward(x, router, aux_weight, token_mask, logits)
        ctx.config, ctx.backend = config, backend
        return _gates(logits, True, config).view(*x.shape[:-1], router.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, dgates):
        x, router, aux_weight, token_mask, logits = ctx.saved_tensors
        needs_x, needs_router = ctx.needs_input_grad[:2]
        dgates = dgates.reshape(logits.shape)
        mask = None if token_mask is None else token_mask.reshape(-1)
        gates = _gates(logits, True, ctx.config)
        with torch.autocast(x.device.type, enabled=False):
            dlogits = _dlogits(dgates, gates, logits, aux_weight if needs_router else None, mask, ctx.config)
            tokens = x.reshape(-1, x.shape[-1])
            dx, drouter = ctx.backend.routing_logits_backward(tokens, router, dlogits, needs_x, needs_router)
        return None if dx is None else dx.view(x.shape), _cast(drouter, router), None, None, None, None


def _gates(routed: Tensor, are_logits: bool, config) -> Tensor:
    return routing.route(routed, config.num_experts_per_tok, config.norm_topk_prob) if are_logits else routed


def _dlogits(dgates, gates, logits, aux_weight, token_mask, config) -> Tensor:
    """The gates' gradient carried to the logits, with that of the load-balancing loss added to it."""
    k = config.num_experts_per_tok
    dlogits = routing.route_backward(dgates, gates, logits, k, config.norm_topk_prob)
    if aux_weight is None:
        return dlogits
    return dlogits + aux_weight.to(dlogits.dtype) * routing.load_balancing_backward(logits, k, token_mask)


def _cast(gradient: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    return None if gradient is None else gradient.to(parameter.dtype)
