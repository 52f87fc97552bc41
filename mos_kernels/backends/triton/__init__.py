"""The four steps as Triton kernels, for CUDA and ROCm, with the interface of the eager backend (float32 and below).

`ffn` composes the kernels for the linears of an FFN together.

p, n and logits are kept as planes (S, T, …): partial sums over S parts of d_in, which the bridge adds up in a fixed
order. S is 1 wherever a backward may follow. Logits of a half-precision x lie in two parts, high and low.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mos_kernels.backends.eager import operand
from mos_kernels.backends.interface import (
    BridgeExpandGradients,
    BridgeGradients,
    BridgeInputs,
    Dropout,
    Prepared,
    Shape,
    ShrinkWeights,
)
from mos_kernels.backends.triton import activated, decode
from mos_kernels.backends.triton import bridge as _bridge
from mos_kernels.backends.triton import expand as _expand
from mos_kernels.backends.triton import route as _route
from mos_kernels.backends.triton import shrink as _shrink
from mos_kernels.config import MoSConfig

MAX_RANK = 128
"""The kernels hold r × r numbers of an expert in one tile."""

KEEPS_Z = True
"""Backward would launch the bridge for z alone."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, whatever the input."""
    return torch.float32


def saved_shapes(
    tokens: int, dtype: torch.dtype, A: Tensor | None, router: Tensor | None
) -> tuple[Shape | None, Shape | None, Shape | None]:
    """One plane each: p (1, T, R), n (1, T) and logits (1, T, E), or (1, T, 2E) for a half-precision x."""
    shrunk = (None, None) if A is None else ((1, tokens, A.shape[:-1].numel()), (1, tokens))
    parts = 1 if dtype == torch.float32 else 2
    return *shrunk, None if router is None else (1, tokens, parts * router.shape[0])


def draw_dropout(x: Tensor, p: float) -> Dropout:
    """Draw the seed from x's device's own generator: no synchronisation, and a CUDA graph draws anew on replay."""
    return Dropout(torch.randint(0, 2**62, (1,), device=x.device), p)


def rows(t: Tensor) -> Tensor:
    """t with dense rows (autograd can hand over expanded gradients, whose strides are 0)."""
    return t if t.stride(1) == 1 or t.shape[1] == 1 and t.stride(0) > 0 else t.contiguous()


def factor(B: Tensor) -> Tensor:
    """B (d_out, E, r), contiguous. Raises ValueError for a rank beyond one tile."""
    if B.shape[2] > MAX_RANK:
        raise ValueError(f"r={B.shape[2]} exceeds {MAX_RANK}, the largest rank of the kernels: use backend='eager'")
    return B.contiguous()


def _stack(A: Tensor) -> Tensor:
    return A.flatten(0, -2).contiguous()


def shrink(x, A, router, dropout: Dropout | None, differentiable: bool, stack: Tensor | None = None):
    """Planes p (S, T, R), n (S, T) and logits (S, T, E or 2E) or None. With dropout the stack is not read."""
    seed, p_drop = (None, 0.0) if dropout is None else dropout
    router = None if router is None else router.contiguous()
    p, n, logits = _shrink.shrink_launch(
        rows(x), _stack(A), router, seed, p_drop, not differentiable, stack=None if dropout is not None else stack
    )
    return p, n, None if router is None else logits


def shrink_backward(x, A, router, dp, dn, dlogits, dropout: Dropout | None, needs: tuple[bool, bool, bool]):
    """dx₀, dA and dRouter; dA and dRouter in float32."""
    seed, p_drop = (None, 0.0) if dropout is None else dropout
    stacked, router = _stack(A), None if router is None else router.contiguous()
    dx, dw = _shrink.shrink_backward_launch(
        rows(x), stacked, router, dp, dn, dlogits, seed, p_drop, needs[0], needs[1] or needs[2]
    )
    if dw is None:
        return dx, None, None
    R = stacked.shape[0]
    return dx, dw[:R].view(A.shape), dw[R:] if needs[2] else None


def routing_logits(x, router, differentiable: bool = True):
    """Logits (S, T, E or 2E) of a router of its own."""
    return _shrink.shrink_launch(rows(x), None, router.contiguous(), None, 0.0, not differentiable)[2]


def routing_logits_backward(x, router, dlogits, needs: tuple[bool, bool]):
    """dx (T, d_in) and dRouter (E, d_in)."""
    return _shrink.shrink_backward_launch(rows(x), None, router.contiguous(), None, None, dlogits, None, 0.0, *needs)


def route(logits, config: MoSConfig):
    """Gates (T, E)."""
    return _route.route_launch(logits, config)


def route_backward(dgates, logits, aux_weight, token_mask, config: MoSConfig):
    """dlogits (T, E)."""
    return _route.route_backward_launch(dgates.contiguous(), logits, aux_weight, route_bytes(token_mask), config)


def route_bytes(token_mask):
    return None if token_mask is None else token_mask.to(torch.uint8).contiguous()


def prepare(
    B, dtype: torch.dtype, config: MoSConfig, gram: Tensor | None = None, weights: ShrinkWeights | None = None
) -> Prepared:
    """`Prepared` of B (d_out, E, r). Raises ValueError for a rank beyond one tile.

    gram: that of an earlier call with the same B, which spares its kernel. The stack costs no launch: there is none
    where G is not computed, unless A is the stack as it is.
    """
    B, stack, sources = factor(B), None, ()
    if weights is not None:
        A, router = _stack(weights.A), None if weights.router is None else weights.router.contiguous()
        if router is None and A.dtype == weights.dtype:
            stack = A
        else:
            sources = ([A], router, weights.dtype)
    if config.activation != "identity" or gram is not None:
        return Prepared(operand(B, dtype), gram, stack=stack)
    (wide,), (gram,), made = _expand.gram_launch([B], dtype, True, *sources)
    return Prepared(wide, gram, stack=made if stack is None else stack)


def _curved(t: BridgeInputs) -> tuple:
    """All but `prepared`, dense as the kernels read it; logits are the kernels' own, and so are p and n."""
    return t.p, t.n, t.routed if t.own_router else t.routed.contiguous(), t.own_router, t.kappa


def bridge(t: BridgeInputs, config: MoSConfig):
    """z (T, E·r) in the dtype of the wide products, and None: `bridge_backward` needs nothing more."""
    return _bridge.bridge_launch(*_curved(t), t.prepared.gram, t.prepared.B.dtype, config), None


def bridge_backward(dz, bridged, t: BridgeInputs, aux_weight, token_mask, config: MoSConfig):
    """Gradients of `bridge`; dz in planes (S, T, E·r)."""
    mask = route_bytes(token_mask)
    return BridgeGradients(*_bridge.bridge_backward_launch(dz, *_curved(t), t.prepared.gram, aux_weight, mask, config))


def expand(z, prepared: Prepared, added, dtype: torch.dtype):
    """y₀ (T, d_out) in dtype. added: the bias (d_out,), or a base's output (T, d_out)."""
    return _expand.expand_launch(z, prepared.B, None if added is None else added.contiguous())


def expand_backward(dy, z, prepared: Prepared, needs_dB: bool):
    """dz in planes (S, T, E·r) and dyᵀz in planes (chunks, d_out, E·r) or None."""
    return _expand.expand_backward_launch(rows(dy), z, prepared.B, needs_dB)


def add_norm_gradient(dB, B, M):
    """dB (d_out, E, r), the planes added up and 2 B M added to them."""
    return _expand.norm_gradient_launch(dB, B.contiguous(), M)


def bridge_expand(t: BridgeInputs, added, dtype: torch.dtype, config: MoSConfig):
    """y₀ (T, d_out), z or u never stored where there are few tokens or an activation; added as in `expand`."""
    few = shares_launches(t.n.shape[1], config)
    if config.activation == "identity" and not few:
        z, _ = bridge(t, config)
        return expand(z, t.prepared, added, dtype)
    added = None if added is None else added.contiguous()
    if few:
        return decode.bridge_expand_launch(*_curved(t), t.prepared.gram, t.prepared.B, added, config)
    return activated.activated_launch(*_curved(t), t.prepared.B, added, config)


def shares_launches(T: int, config: MoSConfig) -> bool:
    """Whether bridge and expand of T tokens are one launch."""
    return config.activation == "identity" and decode.is_few(T, config)


def bridge_expand_backward(dy, t: BridgeInputs, aux_weight, token_mask, config: MoSConfig):
    """Gradients of `bridge_expand` with an activation."""
    mask = route_bytes(token_mask)
    return BridgeExpandGradients(
        *activated.activated_backward_launch(rows(dy), *_curved(t), t.prepared.B, aux_weight, mask, config)
    )
