"""The steps with flat lists of tensors, as torch needs them: autograd Functions, and registered ops for torch.compile.

Eager calls run a Function, which costs little. Under torch.compile, the Triton backend runs registered ops, so that the
graph has no breaks: they have functional schemas, fake implementations and autograd. A schema has no optional outputs,
so an op returns an empty tensor for an absent one. Dynamo cannot trace kernels in Triton's interpreter, in which the
tests of torch.compile run without a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mos_kernels import steps
from mos_kernels.backends import load_backend, load_ffn
from mos_kernels.backends.eager import compute_dtype
from mos_kernels.backends.interface import FFNSaved, Saved
from mos_kernels.call import (
    FFNPlan,
    FFNTensors,
    LinearTensors,
    Plan,
    RouteTensors,
    Tensors,
    flattened,
    names,
    unflattened,
    without_autocast,
)
from mos_kernels.kept import expire


def linear(tensors: LinearTensors, plan: Plan) -> Tensor:
    """y (..., d_out), differentiable in the tensors up to the router."""
    if plan.backend == "triton" and torch.compiler.is_compiling():
        return linear_op(*flattened(tensors, plan))[0]
    return _MoSLinear.apply(plan, *tensors)


def ffn(tensors: FFNTensors, plan: FFNPlan) -> Tensor:
    """y (..., d_out), differentiable in x, gates, router and the adapters."""
    if plan.constants is not None:  # found without autocast
        return load_ffn(plan.backend).ffn_inference(tensors, plan)
    with without_autocast(tensors.x):
        if plan.differentiable:
            return _MoSFFN.apply(plan, *tensors.flat)
        return load_ffn(plan.backend).ffn_inference(tensors, plan)


def route(tensors: RouteTensors, plan: Plan) -> Tensor:
    """Gates (..., E), differentiable in x and the router."""
    if plan.backend == "triton" and torch.compiler.is_compiling():
        return route_op(*flattened(tensors, plan))[0]
    return _MoSRoute.apply(plan, *tensors)


class _MoSLinear(torch.autograd.Function):
    # The mask is not a saved tensor: checkpointing replaces these by recomputed ones, and their number must not change.

    @staticmethod
    def forward(ctx, plan, *tensors):
        given = LinearTensors(*tensors)
        y, saved = steps.linear_forward(given, plan)
        ctx.save_for_backward(*_wanted(given)._replace(token_mask=None), *saved)
        ctx.plan, ctx.token_mask = plan._replace(prepared=None), given.token_mask
        return y

    @staticmethod
    def backward(ctx, dy):
        _begin_backward()
        *tensors, p, n, logits, gram, z = ctx.saved_tensors
        given, needs = LinearTensors(*tensors), LinearTensors(*ctx.needs_input_grad[1:])
        given = given._replace(token_mask=ctx.token_mask)
        with without_autocast(dy):
            return None, *steps.linear_backward(dy, given, Saved(p, n, logits, gram, z), ctx.plan, needs)


class _MoSRoute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan, *tensors):
        given = RouteTensors(*tensors)
        gates, logits = steps.route_forward(given, plan)
        ctx.save_for_backward(*given._replace(token_mask=None), logits)
        ctx.plan, ctx.token_mask = plan, given.token_mask
        return gates

    @staticmethod
    def backward(ctx, dgates):
        _begin_backward()
        *tensors, logits = ctx.saved_tensors
        given, needs = RouteTensors(*tensors), RouteTensors(*ctx.needs_input_grad[1:])
        given = given._replace(token_mask=ctx.token_mask)
        with without_autocast(dgates):
            return None, *steps.route_backward(dgates, given, logits, ctx.plan, needs)


class _MoSFFN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan, *tensors):
        given = FFNTensors.of(tensors)
        y, saved = load_ffn(plan.backend).ffn_forward(given, plan)
        ctx.save_for_backward(*given._replace(token_mask=None).flat, *saved.flat)
        ctx.plan, ctx.token_mask, ctx.count = plan._replace(prepared=(), constants=None), given.token_mask, len(tensors)
        return y

    @staticmethod
    def backward(ctx, dy):
        _begin_backward()
        tensors, needs = ctx.saved_tensors, FFNTensors.of(ctx.needs_input_grad[1:])
        given = FFNTensors.of(tensors[: ctx.count])._replace(token_mask=ctx.token_mask)
        saved = FFNSaved.of(tensors[ctx.count :], len(given.reads))
        with without_autocast(dy):
            return None, *load_ffn(ctx.plan.backend).ffn_backward(dy, given, saved, ctx.plan, needs).flat


def _begin_backward() -> None:
    """Raise under create_graph=True, since the graph of the gradient would lack the adapter without an error."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "a Mixture-of-Space layer has no second derivatives: call backward or grad without create_graph=True"
        )
    expire()


def _wanted(tensors: LinearTensors) -> LinearTensors:
    """Without the base's output, which backward does not need."""
    return tensors if tensors.weight is not None else tensors._replace(added=None)


# registered ops; `text` comes from `flattened`, and names the tensors


@torch.library.custom_op("mos_kernels::linear", mutates_args=())
def linear_op(tensors: Sequence[Tensor], text: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y and the five tensors of `Saved`, which are empty unless differentiable.

    No random numbers are drawn here: a recomputation of the op would draw other ones.
    """
    given, plan = unflattened(LinearTensors, tensors, text)
    y, saved = steps.linear_forward(given, plan)
    p, n, logits, gram, z = (_absent(given.x) if t is None or not plan.differentiable else t for t in saved)
    return y, p, n, logits, gram, z


@linear_op.register_fake
def _(tensors, text):
    given, plan = unflattened(LinearTensors, tensors, text)
    x, B = given.x, given.B
    y = x.new_empty(*x.shape[:-1], B.shape[0], dtype=x.dtype if given.weight is not None else given.added.dtype)
    saved, gram, z = _fake_saved(x, given.A, given.router, plan), _absent(x), _absent(x)
    if plan.differentiable and plan.config.activation == "identity":
        gram = x.new_empty(B.shape[1], B.shape[2], B.shape[2], dtype=compute_dtype(x.dtype))
    if plan.differentiable and steps.keeps_z(plan):
        z = y.new_empty(_tokens(x), B.shape[1] * B.shape[2])
    return y, *saved, gram, z


@torch.library.custom_op("mos_kernels::linear_backward", mutates_args=())
def linear_backward_op(
    dy: Tensor, tensors: Sequence[Tensor], saved: Sequence[Tensor], text: str, needs: Sequence[bool]
) -> list[Tensor]:
    """The gradients of the tensors; empty if `needs` does not ask for them.

    The gradient of a base's output is dy, which an op must not return, so the output is not among the tensors.
    """
    given, plan = unflattened(LinearTensors, tensors, text)
    p, n, logits, gram, z = saved
    kept = z if steps.keeps_z(plan) else None
    there = Saved(p, n, logits if given.gates is None else None, gram if gram.numel() else None, kept)
    return _as_outputs(
        steps.linear_backward(dy, given, there, plan, _by_name(LinearTensors, text, needs)), text, tensors
    )


@linear_backward_op.register_fake
def _(dy, tensors, saved, text, needs):
    return _fake_gradients(tensors, needs)


def _linear_setup(ctx, inputs, output) -> None:
    given, plan = unflattened(LinearTensors, *inputs)
    _, *saved = output
    tensors, ctx.text = flattened(_wanted(given), plan)
    ctx.names = names(inputs[1])
    ctx.save_for_backward(*tensors, *saved)


def _linear_backward(ctx, dy, *_):
    count, wanted = len(names(ctx.text)), dict(zip(ctx.names, ctx.needs_input_grad[0], strict=True))
    tensors, saved = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
    needs = [wanted[name] for name in names(ctx.text)]
    found = linear_backward_op(dy.contiguous(), list(tensors), list(saved), ctx.text, needs)
    gradients = {name: t for name, t, need in zip(names(ctx.text), found, needs, strict=True) if need}
    if wanted.get("added") and "added" not in names(ctx.text):
        gradients["added"] = dy
    return [gradients.get(name) for name in ctx.names], None


linear_op.register_autograd(_linear_backward, setup_context=_linear_setup)


@torch.library.custom_op("mos_kernels::route", mutates_args=())
def route_op(tensors: Sequence[Tensor], text: str) -> tuple[Tensor, Tensor]:
    """The gates of a router of its own, and its logits, which are empty unless differentiable."""
    given, plan = unflattened(RouteTensors, tensors, text)
    gates, logits = steps.route_forward(given, plan)
    return gates, logits if plan.differentiable else _absent(given.x)


@route_op.register_fake
def _(tensors, text):
    given, plan = unflattened(RouteTensors, tensors, text)
    x = given.x
    gates = x.new_empty(*x.shape[:-1], given.router.shape[0], dtype=compute_dtype(x.dtype))
    return gates, _fake_saved(x, None, given.router, plan)[2]


@torch.library.custom_op("mos_kernels::route_backward", mutates_args=())
def route_backward_op(
    dgates: Tensor, tensors: Sequence[Tensor], logits: Tensor, text: str, needs: Sequence[bool]
) -> list[Tensor]:
    """The gradients of the tensors, empty where `needs` does not ask for them."""
    given, plan = unflattened(RouteTensors, tensors, text)
    gradients = steps.route_backward(dgates, given, logits, plan, _by_name(RouteTensors, text, needs))
    return _as_outputs(gradients, text, tensors)


@route_backward_op.register_fake
def _(dgates, tensors, logits, text, needs):
    return _fake_gradients(tensors, needs)


def _route_setup(ctx, inputs, output) -> None:
    tensors, ctx.text = inputs
    ctx.save_for_backward(*tensors, output[1])


def _route_backward(ctx, dgates, _):
    *tensors, logits = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[0])
    found = route_backward_op(dgates.contiguous(), tensors, logits, ctx.text, needs)
    return [t if need else None for t, need in zip(found, needs, strict=True)], None


route_op.register_autograd(_route_backward, setup_context=_route_setup)


def _absent(like: Tensor) -> Tensor:
    return like.new_empty(0)


def _fake_saved(x: Tensor, A: Tensor | None, router: Tensor | None, plan: Plan) -> list[Tensor]:
    """p, n and logits in the backend's shapes."""
    if not plan.differentiable:
        return [_absent(x) for _ in range(3)]
    shapes = load_backend(plan.backend).saved_shapes(_tokens(x), x.dtype, A, router)
    return [_absent(x) if shape is None else x.new_empty(shape, dtype=compute_dtype(x.dtype)) for shape in shapes]


def _tokens(x: Tensor) -> int:
    return x.reshape(-1, x.shape[-1]).shape[0]


def _by_name(kind: type[Tensors], text: str, values: Sequence) -> Tensors:
    """`kind` with these values for the tensors that the text names, and None for the others."""
    found = dict(zip(names(text), values, strict=True))
    by_field: list[Any] = [found.get(name) for name in kind._fields]
    return kind(*by_field)


def _as_outputs(gradients: LinearTensors | RouteTensors, text: str, tensors: Sequence[Tensor]) -> list[Tensor]:
    found = [getattr(gradients, name) for name in names(text)]
    return [_absent(t) if g is None else _owned(g) for g, t in zip(found, tensors, strict=True)]


def _owned(t: Tensor) -> Tensor:
    """t with a storage of its own. Outputs of an op must not share storage, as dA and dRouter do."""
    return (
        t.contiguous() if t.untyped_storage().nbytes() == t.nbytes else t.clone(memory_format=torch.contiguous_format)
    )


def _fake_gradients(tensors: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor]:
    return [t.new_empty(t.shape if need else 0) for t, need in zip(tensors, needs, strict=True)]
