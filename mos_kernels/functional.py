"""The layer as one differentiable operation: shrink, route, bridge, expand and the base product, in one autograd node.

This module checks the arguments, and puts them into the two objects that the other modules take (`mos_kernels.call`).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mos_kernels import ops
from mos_kernels.backends import load_backend, resolve_backend
from mos_kernels.backends.interface import Prepared
from mos_kernels.call import LinearTensors, Plan, RouteTensors, autocast_dtype, is_autocast, without_autocast
from mos_kernels.config import MoSConfig


def mos_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    kappa: Tensor,
    *,
    config: MoSConfig,
    base_output: Tensor | None = None,
    gates: Tensor | None = None,
    router: Tensor | None = None,
    aux_weight: Tensor | None = None,
    token_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    inference: bool = False,
    prepared: Prepared | None = None,
    backend: str = "auto",
) -> Tensor:
    """y = x·Wᵀ + b + (α/r) Σ_e g_e o_e, with o_e = e(q_e; κ_e) B_e h_e, h_e = λ(n; κ_e) A x (the paper's eqs 5 to 8).

    Args:
        x: (..., d_in), in the weight's dtype, or any float dtype under autocast.
        weight: (d_out, d_in), of the base, with any strides. It gets a gradient if it is trainable, as does the bias.
        bias: (d_out,), of the base.
        base_output: (..., d_out), for a base that is not a dense product (quantised, wrapped, another adapter): its
            output on x. Then weight and bias are None, and y = base_output + (α/r) Σ_e g_e o_e in base_output's dtype.
        A: (r, d_in) or (E, r, d_in), in any float dtype. The wide products round it to x's, and B too.
        B: (d_out, E, r), in any float dtype.
        kappa: (E,), the curvatures in 1/length².
        gates: (..., E), if a router was called before. Pass either gates or a router.
        router: (E, d_in), the linear's own router.
        aux_weight: (1,), the factor on the gradient of the own router's load-balancing loss, which is added during
            backward. None: no such gradient.
        token_mask: (...,), False for tokens that load balancing leaves out (padding).
        dropout_p: dropout probability on the adapter's input.
        inference: no backward follows a call without gradients, not even after a recomputation (checkpointing in
            training mode). A backend may then sum in another order, which is faster for few tokens.
        prepared: the result of the backend's `prepare` for B (and A and the router), if it is cached.

    Returns (..., d_out) in x's dtype, or in that of base_output. Products with d_out are computed in the dtype of y,
    and products with d_in in that of x (under autocast, in autocast's dtype). float64 cannot be mixed with another
    dtype. There are no second derivatives. Raises ValueError for shapes or dtypes that do not fit, before anything is
    computed.
    """
    refuse_transforms(x, weight, bias, A, B, kappa, gates, router, base_output)
    weight, bias = _autocast(x, weight, bias)
    x = x.to(autocast_dtype(x))
    if (weight is None) == (base_output is None) or (weight is None and bias is not None):
        raise ValueError("pass the base as weight and bias, or as base_output, its output on x: one of the two")
    added = bias if base_output is None else base_output
    mask = None if aux_weight is None else token_mask
    tensors = LinearTensors(x, weight, added, A, B, kappa, gates, router, aux_weight, None, mask)
    _check(tensors, config)
    check_mask(x, token_mask)
    check_device(tensors)
    backend = resolve_backend(backend, x)
    differentiable = not inference or _needs_gradients(tensors)
    with without_autocast(x):
        if dropout_p > 0:  # outside the op, so that a recomputation under torch.compile draws the same
            tensors = tensors._replace(dropout_state=load_backend(backend).draw_dropout(x, dropout_p).state)
        return ops.linear(tensors, Plan(config, backend, differentiable, dropout_p, prepared))


def mos_route(
    x: Tensor,
    router: Tensor,
    *,
    config: MoSConfig,
    aux_weight: Tensor | None = None,
    token_mask: Tensor | None = None,
    inference: bool = False,
    backend: str = "auto",
) -> Tensor:
    """The gates of a router: x (..., d_in), router (E, d_in) -> (..., E) in float32 (float64 for float64 x).

    aux_weight, token_mask, inference: as in `mos_linear`.
    """
    refuse_transforms(x, router)
    if x.dim() == 0:
        raise ValueError(f"x is a single number (0-d): the router reads (..., {router.shape[-1]})")
    if x.shape[-1] != router.shape[-1]:
        raise ValueError(f"x has width {x.shape[-1]}, the router reads {router.shape[-1]}: pass the FFN block's input")
    if router.shape[0] != config.num_experts:
        raise ValueError(f"router has {router.shape[0]} rows, the configuration {config.num_experts} experts: one each")
    tensors = RouteTensors(x, router, aux_weight, None if aux_weight is None else token_mask)
    check_mask(x, token_mask)
    check_device(tensors)
    backend = resolve_backend(backend, x)
    differentiable = not inference or _needs_gradients(tensors)
    with without_autocast(x):
        return ops.route(tensors, Plan(config, backend, differentiable))


def _needs_gradients(tensors: LinearTensors | RouteTensors) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _autocast(x: Tensor, *base: Tensor | None) -> tuple[Tensor | None, ...]:
    """Weight and bias cast by autocast, as in nn.Linear, with gradients."""
    if not is_autocast(x):
        return base
    return tuple(None if t is None else t.to(autocast_dtype(x)) for t in base)


UNSUPPORTED = (
    "a Mixture-of-Space layer does not support {}: its gradients are written out, for torch.autograd alone. Call it as "
    "it is, under torch.compile, or through torch.export.export (from which torch.onnx.export(..., dynamo=True) starts)"
)


def refuse_transforms(*tensors: Tensor | None) -> None:
    """Raise NotImplementedError under a trace of torch.jit or torch.fx, transforms of torch.func, and forward mode."""
    if torch.compiler.is_compiling():
        return
    if isinstance(tensors[0], torch.fx.Proxy):
        raise NotImplementedError(UNSUPPORTED.format("torch.fx.symbolic_trace"))
    if torch.jit.is_tracing():
        raise NotImplementedError(UNSUPPORTED.format("torch.jit.trace"))
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(UNSUPPORTED.format("the transforms of torch.func (vmap, grad, vjp, jvp, …)"))
    if forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    ):
        raise NotImplementedError(UNSUPPORTED.format("forward-mode derivatives (jvp)"))


def refuse_scripting() -> None:
    """Raise NotImplementedError. torch.jit.script calls this through a module's `__prepare_scriptable__`."""
    raise NotImplementedError(UNSUPPORTED.format("torch.jit.script"))


def _check(t: LinearTensors, config: MoSConfig) -> None:
    """Raise ValueError for shapes or dtypes that do not fit."""
    x, E, r = t.x, config.num_experts, config.r
    d_out, d_in = t.weight.shape if t.weight is not None else (t.B.shape[0], t.A.shape[-1])
    check_input(x, t.weight, d_in)
    if t.weight is None:
        check_base_output(x, t.added, d_out)
    elif t.added is not None and tuple(t.added.shape) != (d_out,):
        raise ValueError(f"the bias has shape {tuple(t.added.shape)}, the weight asks for {(d_out,)}")
    wanted = {
        "A": (r, d_in) if config.share_a else (E, r, d_in),
        "B": (d_out, E, r),
        "kappa": (E,),
        "router": (E, d_in),
    }
    for name, shape in wanted.items():
        tensor = getattr(t, name)
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, the configuration asks for {shape}")
    if t.gates is None and t.router is None:
        raise ValueError(
            "no gates were passed, and with router_scope='ffn' the layer has no router of its own: "
            "pass gates=MoSRouter(...)(block_input), or use router_scope='linear'. If it is in an FFN block of "
            "transformers, something has replaced the block's forward, as Liger does: MoSCallback.add_to(trainer) puts "
            "it back"
        )
    if t.gates is not None:
        require_gates(t.gates, x, config)


def require_gates(gates: Tensor, x: Tensor, config: MoSConfig) -> None:
    """Raise ValueError unless there is one gate for each token and expert."""
    wanted = (*x.shape[:-1], config.num_experts)
    if tuple(gates.shape) != wanted:
        raise ValueError(f"gates have shape {tuple(gates.shape)}, x asks for {wanted}")


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


def check_base_output(x: Tensor, base_output: Tensor | None, d_out: int) -> None:
    assert base_output is not None
    if tuple(base_output.shape) != (*x.shape[:-1], d_out):
        raise ValueError(f"base_output has shape {tuple(base_output.shape)}, x and B ask for {(*x.shape[:-1], d_out)}")
    is_float = x.is_floating_point() and base_output.is_floating_point()
    if not is_float or (x.dtype == torch.float64) != (base_output.dtype == torch.float64):
        raise ValueError(
            f"x is {x.dtype} and base_output is {base_output.dtype}: both must be float64, or both other floats"
        )


def check_mask(x: Tensor, token_mask: Tensor | None) -> None:
    if token_mask is not None and token_mask.shape != x.shape[:-1]:
        raise ValueError(
            f"token_mask has shape {tuple(token_mask.shape)}, the tokens {tuple(x.shape[:-1])}: pass one entry a token"
        )


def check_device(tensors: LinearTensors | RouteTensors) -> None:
    """Raise ValueError unless all tensors are on x's device; a kernel would read wrong memory."""
    for name, tensor in zip(tensors._fields, tensors, strict=True):
        if tensor is not None and tensor.device != tensors.x.device:
            if name == "added":
                name = "base_output" if getattr(tensors, "weight", None) is None else "bias"
            raise ValueError(f"{name} is on {tensor.device} and x on {tensors.x.device}: move one of them")
