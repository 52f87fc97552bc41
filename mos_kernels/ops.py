"""The steps as registered ops, for torch.compile: functional schemas, fake implementations, autograd.

What an op does not return is an empty tensor, since a schema has no optional outputs.
"""

from __future__ import annotations

import functools
import json

import torch
from torch import Tensor

from mos_kernels import steps
from mos_kernels.backends.eager import compute_dtype
from mos_kernels.config import MoSConfig


@functools.lru_cache(maxsize=256)
def _config(text: str) -> MoSConfig:
    return MoSConfig.from_dict(json.loads(text))


def _absent(x: Tensor) -> Tensor:
    return x.new_empty(0)


def _owned(t: Tensor) -> Tensor:
    """t as a tensor of its own: outputs of an op may share no storage, as dA and dRouter do."""
    return (
        t.contiguous() if t.untyped_storage().nbytes() == t.nbytes else t.clone(memory_format=torch.contiguous_format)
    )


@torch.library.custom_op("mos_kernels::linear", mutates_args=())
def linear(
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
    token_mask: Tensor | None,
    dropout_p: float,
    config: str,
    backend: str,
    differentiable: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, p, n, logits and G; all but y empty unless differentiable. config: MoSConfig as JSON.

    added: the bias, or without a weight the base's output, as in `steps`. Nothing is drawn in here: an op with numbers
    of its own would draw others when it is run again.
    """
    y, *saved = steps.linear_forward(
        x, weight, added, A, B, kappa, gates, router, dropout_state, dropout_p, None, _config(config), backend,
        differentiable,
    )  # fmt: skip
    return y, *(_absent(x) if t is None or not differentiable else t for t in saved)


@linear.register_fake
def _(
    x, weight, added, A, B, kappa, gates, router, aux_weight, dropout_state, token_mask, dropout_p, config, backend,
    differentiable,
):  # fmt: skip
    y = x.new_empty(*x.shape[:-1], B.shape[0], dtype=x.dtype if weight is not None else added.dtype)
    if not differentiable:
        return y, *(_absent(x) for _ in range(4))
    T, wide = x.reshape(-1, x.shape[-1]).shape[0], compute_dtype(x.dtype)
    if backend == "triton":
        parts = 1 if x.dtype == torch.float32 else 2
        p, n = x.new_empty(1, T, A.shape[:-1].numel(), dtype=wide), x.new_empty(1, T, dtype=wide)
        logits = _absent(x) if router is None else x.new_empty(1, T, parts * router.shape[0], dtype=wide)
    else:
        p, n = x.new_empty(T, *A.shape[:-1], dtype=wide), x.new_empty(T, dtype=wide)
        logits = _absent(x) if router is None else x.new_empty(T, router.shape[0], dtype=wide)
    _, E, r = B.shape
    gram = x.new_empty(E, r, r, dtype=wide) if _config(config).activation == "identity" else _absent(x)
    return y, p, n, logits, gram


@torch.library.custom_op("mos_kernels::linear_backward", mutates_args=())
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
    token_mask: Tensor | None,
    p: Tensor,
    n: Tensor,
    logits: Tensor,
    gram: Tensor,
    dropout_p: float,
    config: str,
    backend: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the first eight arguments of `linear`; empty where `needs` does not ask for them.

    That of a base's output is dy, which an op may not return: `needs` never asks for it.
    """
    gradients = steps.linear_backward(
        dy, x, weight, added, A, B, kappa, gates, router, aux_weight, dropout_state, p, n,
        logits if gates is None else None, gram if gram.numel() else None, dropout_p,
        _config(config), backend, tuple(needs), token_mask,
    )  # fmt: skip
    return tuple(_absent(x) if t is None else _owned(t) for t in gradients)


@linear_backward.register_fake
def _(
    dy, x, weight, added, A, B, kappa, gates, router, aux_weight, dropout_state, token_mask, p, n, logits, gram,
    dropout_p, config, backend, needs,
):  # fmt: skip
    inputs = (x, weight, added, A, B, kappa, gates, router)
    return tuple(t.new_empty(t.shape) if need else _absent(x) for t, need in zip(inputs, needs, strict=True))


def _linear_setup(ctx, inputs, output) -> None:
    *tensors, dropout_p, config, backend, _ = inputs
    _, *saved = output
    if tensors[1] is None:  # backward has no use for the base's output
        tensors[2] = None
    ctx.save_for_backward(*tensors, *saved)
    ctx.options = (dropout_p, config, backend)


def _linear_backward(ctx, dy, *_):
    needs = list(ctx.needs_input_grad[:8])
    through_base = needs[2] and ctx.saved_tensors[1] is None
    needs[2] = needs[2] and not through_base
    gradients = linear_backward(dy.contiguous(), *ctx.saved_tensors, *ctx.options, needs)
    gradients = [g if need else None for g, need in zip(gradients, needs, strict=True)]
    if through_base:
        gradients[2] = dy
    return *gradients, *(None,) * 7


linear.register_autograd(_linear_backward, setup_context=_linear_setup)


@torch.library.custom_op("mos_kernels::route", mutates_args=())
def route(
    x: Tensor,
    router: Tensor,
    aux_weight: Tensor | None,
    token_mask: Tensor | None,
    config: str,
    backend: str,
    differentiable: bool,
) -> tuple[Tensor, Tensor]:
    """The gates of a router of its own, and its logits, which are empty unless differentiable."""
    gates, logits = steps.route_forward(x, router, _config(config), backend, differentiable)
    return gates, logits if differentiable else _absent(x)


@route.register_fake
def _(x, router, aux_weight, token_mask, config, backend, differentiable):
    T, E = x.reshape(-1, x.shape[-1]).shape[0], router.shape[0]
    wide = compute_dtype(x.dtype)
    parts = 1 if x.dtype == torch.float32 else 2
    logits = (1, T, parts * E) if backend == "triton" else (T, E)
    gates = x.new_empty(*x.shape[:-1], E, dtype=wide)
    return gates, x.new_empty(logits, dtype=wide) if differentiable else _absent(x)


@torch.library.custom_op("mos_kernels::route_backward", mutates_args=())
def route_backward(
    dgates: Tensor,
    x: Tensor,
    router: Tensor,
    aux_weight: Tensor | None,
    token_mask: Tensor | None,
    logits: Tensor,
    config: str,
    backend: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    """Gradients of x and router; empty where `needs` does not ask for them."""
    gradients = steps.route_backward(
        dgates, x, router, aux_weight, logits, _config(config), backend, tuple(needs), token_mask
    )
    return tuple(_absent(x) if t is None else _owned(t) for t in gradients)


@route_backward.register_fake
def _(dgates, x, router, aux_weight, token_mask, logits, config, backend, needs):
    return tuple(t.new_empty(t.shape) if need else _absent(x) for t, need in zip((x, router), needs, strict=True))


def _route_setup(ctx, inputs, output) -> None:
    *tensors, config, backend, _ = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.options = (config, backend)


def _route_backward(ctx, dgates, _):
    needs = list(ctx.needs_input_grad[:2])
    gradients = route_backward(dgates.contiguous(), *ctx.saved_tensors, *ctx.options, needs)
    return *(g if need else None for g, need in zip(gradients, needs, strict=True)), *(None,) * 5


route.register_autograd(_route_backward, setup_context=_route_setup)
