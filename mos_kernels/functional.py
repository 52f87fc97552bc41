"""The layer as one differentiable operation: shrink, route, bridge, expand and the base product, in one autograd node.

Eager calls run an autograd.Function, whose cost is small; under torch.compile the Triton backend runs the registered
ops of `mos_kernels.ops` instead, which keep one graph. Both are `mos_kernels.steps` underneath.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mos_kernels import ops
from mos_kernels.backends import load_backend, resolve_backend
from mos_kernels.kept import count_backward
from mos_kernels.steps import linear_backward, linear_forward, route_backward, route_forward


def mos_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    kappa: Tensor,
    *,
    config,
    base_output: Tensor | None = None,
    gates: Tensor | None = None,
    router: Tensor | None = None,
    aux_weight: Tensor | None = None,
    token_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    inference: bool = False,
    prepared=None,
    backend: str = "auto",
) -> Tensor:
    """y = x·Wᵀ + b + (α/r) Σ_e g_e o_e, with o_e = e(q_e; κ_e) B_e h_e, h_e = λ(n; κ_e) A x (the paper's eqs 5 to 8).

    Args:
        x: (..., d_in), of the weight's dtype, or any under autocast.
        weight, bias: the base, (d_out, d_in) and (d_out,); any strides. They get gradients where they are trainable.
        base_output: (..., d_out), what a base that is no dense product (quantised, wrapped, another adapter) made of x;
            weight and bias are None then, and y = base_output + (α/r) Σ_e g_e o_e in base_output's dtype.
        A, B: (r, d_in) or (E, r, d_in), and (d_out, E, r); any float dtype, rounded to x's for the wide products.
        kappa: (E,) curvature.
        gates: (..., E) routing weights from elsewhere; or
        router: (E, d_in), this linear's own router, with `aux_weight` (1,) the factor on the gradient of its
            load-balancing loss, injected in backward; None: no such gradient.
        token_mask: (...,), False for tokens left out of load balancing (padding).
        dropout_p: dropout on the adapter's input.
        inference: without gradients, no backward follows, not even after a recomputation (checkpointing, in training
            mode): a backend may then sum in another order, which is faster for few tokens.
        prepared: what the backend's `prepare` made of B, where B is frozen.

    Returns (..., d_out) in x's dtype, or in base_output's, which may be another: the products with d_out are taken in
    it, those with d_in in x's (under autocast in autocast's). float64 goes only with float64. Second derivatives are
    not offered. Raises ValueError for shapes or dtypes that do not fit, before anything is computed.
    """
    refuse_transforms(x, weight, bias, A, B, kappa, gates, router, base_output)
    x, weight, bias = _autocast(x, weight, bias)
    _check(x, weight, bias, A, B, kappa, gates, router, base_output, config)
    _check_mask(x, token_mask)
    check_device(
        x, weight=weight, bias=bias, A=A, B=B, kappa=kappa, gates=gates, router=router, base_output=base_output,
        aux_weight=aux_weight, token_mask=None if aux_weight is None else token_mask,
    )  # fmt: skip
    backend = resolve_backend(backend, x)
    added = bias if base_output is None else base_output
    inputs = (x, weight, added, A, B, kappa, gates, router)
    differentiable = not inference or _needs_gradients(inputs)
    with without_autocast(x):
        # Drawn out here: a recomputation inside torch.compile draws again only what it sees drawn.
        dropout = load_backend(backend).draw_dropout(x, dropout_p) if dropout_p > 0 else (None,)
        inputs = (*inputs, aux_weight, dropout[0], token_mask, dropout_p)
        if backend == "triton" and torch.compiler.is_compiling():
            return ops.linear(*inputs, config.json, backend, differentiable)[0]
        return _MoSLinear.apply(*inputs, prepared, config, backend, differentiable)


def mos_route(
    x: Tensor,
    router: Tensor,
    *,
    config,
    aux_weight: Tensor | None = None,
    token_mask: Tensor | None = None,
    inference: bool = False,
    backend: str = "auto",
) -> Tensor:
    """The gates of a router of its own: x (..., d_in), router (E, d_in) -> (..., E) in float32 (float64 for float64 x).

    aux_weight, token_mask, inference: as in `mos_linear`.
    """
    refuse_transforms(x, router)
    if x.shape[-1] != router.shape[-1]:
        raise ValueError(f"x has width {x.shape[-1]}, the router reads {router.shape[-1]}: pass the FFN block's input")
    _check_mask(x, token_mask)
    check_device(x, router=router, aux_weight=aux_weight, token_mask=None if aux_weight is None else token_mask)
    backend = resolve_backend(backend, x)
    differentiable = not inference or _needs_gradients((x, router))
    with without_autocast(x):
        if backend == "triton" and torch.compiler.is_compiling():
            return ops.route(x, router, aux_weight, token_mask, config.json, backend, differentiable)[0]
        return _MoSRoute.apply(x, router, aux_weight, token_mask, config, backend, differentiable)


def _needs_gradients(inputs: tuple[Tensor | None, ...]) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)


def _is_autocast(x: Tensor) -> bool:
    """Whether autocast would cast x. It leaves float64 alone, and there is none for the meta device."""
    return not x.is_meta and x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a dense base and its adapter read x: autocast's where it is on, else x's."""
    return torch.get_autocast_dtype(x.device.type) if _is_autocast(x) else x.dtype


def without_autocast(x: Tensor):
    """A context in which autocast is off on x's device."""
    return contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def _autocast(x: Tensor, *base: Tensor | None) -> tuple[Tensor | None, ...]:
    """What autocast does for nn.Linear: the wide operands in its dtype, differentiably."""
    if not _is_autocast(x):
        return x, *base
    dtype = autocast_dtype(x)
    return tuple(None if t is None else t.to(dtype) for t in (x, *base))


UNSUPPORTED = (
    "a Mixture-of-Space layer does not support {}: its gradients are written out, for torch.autograd alone. Call it as "
    "it is, under torch.compile, or through torch.export.export (from which torch.onnx.export(..., dynamo=True) starts)"
)


def refuse_transforms(*tensors: Tensor | None) -> None:
    """Raise NotImplementedError under torch.jit.trace, torch.func's transforms (vmap, grad, jvp, …), and for duals."""
    if torch.compiler.is_compiling():
        return
    if torch.jit.is_tracing():
        raise NotImplementedError(UNSUPPORTED.format("torch.jit.trace"))
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(UNSUPPORTED.format("the transforms of torch.func (vmap, grad, vjp, jvp, …)"))
    if forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    ):
        raise NotImplementedError(UNSUPPORTED.format("forward-mode derivatives (jvp)"))


def refuse_scripting() -> None:
    """Raise NotImplementedError: what a module's `__prepare_scriptable__` does under torch.jit.script."""
    raise NotImplementedError(UNSUPPORTED.format("torch.jit.script"))


def _check(x, weight, bias, A, B, kappa, gates, router, base_output, config) -> None:
    if (weight is None) == (base_output is None) or (weight is None and bias is not None):
        raise ValueError("pass the base as weight and bias, or as base_output, what it made of x: one of the two")
    d_out, d_in = weight.shape if weight is not None else (B.shape[0], A.shape[-1])
    check_input(x, weight, d_in)
    if base_output is not None:
        _check_base_output(x, base_output, d_out)
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


def check_input(x: Tensor, weight: Tensor | None, d_in: int) -> None:
    """Raise ValueError unless x (..., d_in) fits the width, and the dtype of a dense base."""
    if x.dim() == 0:
        raise ValueError(f"x is a single number (0-d): the layer reads (..., {d_in})")
    if x.shape[-1] != d_in:
        raise ValueError(f"x has width {x.shape[-1]} (shape {tuple(x.shape)}), the layer reads in_features={d_in}")
    if weight is not None and (x.dtype != weight.dtype or not x.is_floating_point()):
        raise ValueError(
            f"x is {x.dtype} and the weight is {weight.dtype}: cast one of them, or run under torch.autocast"
        )


def _check_base_output(x: Tensor, base_output: Tensor, d_out: int) -> None:
    if tuple(base_output.shape) != (*x.shape[:-1], d_out):
        raise ValueError(f"base_output has shape {tuple(base_output.shape)}, x and B ask for {(*x.shape[:-1], d_out)}")
    is_float = x.is_floating_point() and base_output.is_floating_point()
    if not is_float or (x.dtype == torch.float64) != (base_output.dtype == torch.float64):
        raise ValueError(
            f"x is {x.dtype} and base_output is {base_output.dtype}: both must be float64, or both other floats"
        )


def _check_mask(x: Tensor, token_mask: Tensor | None) -> None:
    if token_mask is not None and token_mask.shape != x.shape[:-1]:
        raise ValueError(
            f"token_mask has shape {tuple(token_mask.shape)}, the tokens {tuple(x.shape[:-1])}: pass one entry a token"
        )


def check_device(x: Tensor, **others: Tensor | None) -> None:
    """A kernel would read another device's memory by its address."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} and x on {x.device}: move one of them")


def _refuse_second_derivatives() -> None:
    """Raise under create_graph=True, where the gradient's own graph would silently miss the adapter."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "a Mixture-of-Space layer has no second derivatives: call backward or grad without create_graph=True"
        )


class _MoSLinear(torch.autograd.Function):
    # The mask is no saved tensor: checkpointing replaces those by what it recomputes, and wants as many of them then.

    @staticmethod
    def forward(
        ctx, x, weight, added, A, B, kappa, gates, router, aux_weight, dropout_state, token_mask, dropout_p, prepared,
        config, backend, differentiable,
    ):  # fmt: skip
        y, *saved = linear_forward(
            x, weight, added, A, B, kappa, gates, router, dropout_state, dropout_p, prepared, config, backend,
            differentiable,
        )  # fmt: skip
        added = added if weight is not None else None  # backward has no use for the base's output
        ctx.save_for_backward(x, weight, added, A, B, kappa, gates, router, aux_weight, dropout_state, *saved)
        ctx.token_mask = token_mask
        ctx.options = (dropout_p, config, backend)
        return y

    @staticmethod
    def backward(ctx, dy):
        _refuse_second_derivatives()
        count_backward()
        with without_autocast(dy):
            gradients = linear_backward(
                dy, *ctx.saved_tensors, *ctx.options, needs=ctx.needs_input_grad[:8], token_mask=ctx.token_mask
            )
        return *gradients, *(None,) * 8


class _MoSRoute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, router, aux_weight, token_mask, config, backend, differentiable):
        gates, logits = route_forward(x, router, config, backend, differentiable)
        ctx.save_for_backward(x, router, aux_weight, logits)
        ctx.token_mask = token_mask
        ctx.options = (config, backend)
        return gates

    @staticmethod
    def backward(ctx, dgates):
        _refuse_second_derivatives()
        with without_autocast(dgates):
            gradients = route_backward(
                dgates, *ctx.saved_tensors, *ctx.options, needs=ctx.needs_input_grad[:2], token_mask=ctx.token_mask
            )
        return *gradients, *(None,) * 5
