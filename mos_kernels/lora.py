"""A single Euclidean expert: a LoRA, y = base(x) + (α/r) B A x, without router and curvature.

The adapter's product is computed first, and the base's long product is added to it: this takes one pass over y less
than the other order. Backward is written by hand in the same way: the base's product is added to the gradient of x,
which is rounded once less than by autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import dropout, linear

from mos_kernels.call import autocast_dtype, is_autocast, without_autocast
from mos_kernels.functional import check_base_output, check_input
from mos_kernels.kept import is_transformed


def lora_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    *,
    base_output: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """x (..., d_in), A (r, d_in), B (d_out, r) -> (..., d_out). Base, dtypes and errors as in `mos_linear`.

    dropout_p: dropout on the input of A.
    """
    casts = is_autocast(x)
    check_input(x, None if casts else weight, A.shape[-1])
    if base_output is not None:
        check_base_output(x, base_output, B.shape[0])
    if casts:
        x = x.to(autocast_dtype(x))
        weight, bias = (None if t is None else t.to(x.dtype) for t in (weight, bias))
        with without_autocast(x):  # autocast would round a base's float32 output
            return _lora(x, weight, bias, A, B, scaling, base_output, dropout_p)
    return _lora(x, weight, bias, A, B, scaling, base_output, dropout_p)


def _lora(x, weight, bias, A, B, scaling, base_output, dropout_p) -> Tensor:
    differentiable = torch.is_grad_enabled()
    # Inductor fuses dropout and makes the backward; torch's transforms have no rule for a Function
    if dropout_p > 0 or torch.compiler.is_compiling() or differentiable and is_transformed():
        return composed(x, dropout(x, dropout_p), weight, bias, A, B, scaling, base_output)
    y, _ = (_LoRA.apply if differentiable else _forward)(x, weight, bias, A, B, scaling, base_output)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


def composed(x: Tensor, dropped: Tensor, weight, bias, A: Tensor, B: Tensor, scaling: float, base_output) -> Tensor:
    """The same with products that autograd and torch.compile trace. dropped: the input of A."""
    y_dtype = x.dtype if base_output is None else base_output.dtype
    low = _low(dropped, A, scaling, y_dtype)
    rows, factor = low.reshape(-1, low.shape[-1]), B.to(y_dtype).t()
    if base_output is not None:
        return base_output.reshape(-1, factor.shape[1]).addmm(rows, factor).view(base_output.shape)
    y = rows.mm(factor) if bias is None else torch.addmm(bias, rows, factor)
    return y.addmm(x.reshape(-1, x.shape[-1]), weight.t()).view(*x.shape[:-1], factor.shape[1])


def _forward(x, weight, bias, A, B, scaling, base_output) -> tuple[Tensor, Tensor]:
    """y in rows (T, d_out), and scaling·A x in rows (T, r) of y's dtype."""
    xs = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    y_dtype = x.dtype if base_output is None else base_output.dtype
    rows, B = _low(xs, A, scaling, y_dtype), B if B.dtype == y_dtype else B.to(y_dtype)
    if base_output is not None:
        return base_output.reshape(-1, B.shape[0]).addmm(rows, B.t()), rows
    return linear(rows, B, bias).addmm_(xs, weight.t()), rows


def _low(x: Tensor, A: Tensor, scaling: float, y_dtype: torch.dtype) -> Tensor:
    """scaling·A x in y_dtype."""
    dtype = x.dtype
    low = linear(x, A if A.dtype == dtype else A.to(dtype))
    if dtype == y_dtype != torch.float16:
        return low.mul(scaling)
    return _saturated(_saturated(low).to(y_dtype).mul(scaling))


def _saturated(t: Tensor) -> Tensor:
    """t, but float16 is clamped, since an infinity times B = 0 would be NaN."""
    limit = torch.finfo(torch.float16).max
    return t.clamp(-limit, limit) if t.dtype == torch.float16 else t


class _LoRA(torch.autograd.Function):
    """`_forward`, of any number of derivatives. Its outputs are no views: the caller may change y in place.

    The rows are an output because backward reads them: a second derivative goes through them to x and A.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, scaling, base_output):
        y, rows = _forward(x, weight, bias, A, B, scaling, base_output)
        to_x, to_weight, _, to_A, to_B, *_ = ctx.needs_input_grad
        ctx.save_for_backward(
            x if to_weight or to_A else None, weight if to_x else None, A if to_x else None,
            B if to_x or to_A else None, rows if to_B else None,
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.scaling, ctx.dtypes = scaling, (x.dtype, A.dtype, B.dtype)
        ctx.shapes = x.shape, None if base_output is None else base_output.shape
        return y, rows

    @staticmethod
    def backward(ctx, dy, drows):
        """drows: None, except in a second derivative, where dy may be None."""
        given = dy if drows is None else drows
        if given is None:
            return (None,) * 7
        with without_autocast(given):
            return _backward(ctx, dy, drows)


def _backward(ctx, dy, drows):
    x, weight, A, B, rows = ctx.saved_tensors
    x_dtype, A_dtype, B_dtype = ctx.dtypes
    to_x, to_weight, to_bias, to_A, to_B, _, to_base = ctx.needs_input_grad
    xs = None if x is None else x.reshape(-1, x.shape[-1])
    dx = dA = None
    if to_x or to_A:
        low = drows if dy is None else dy.mm(B.to(dy.dtype))
        low = (low if dy is None or drows is None else low + drows).mul(ctx.scaling).to(x_dtype)  # (T, r), of A x
        dA = low.t().mm(xs).to(A_dtype) if to_A else None
        if to_x:
            dx = low.mm(A.to(x_dtype))
            dx = (dx if weight is None or dy is None else dx.addmm_(dy, weight)).view(ctx.shapes[0])
    if dy is None:
        return dx, None, None, dA, None, None, None
    return (
        dx,
        dy.t().mm(xs) if to_weight else None,
        dy.sum(0) if to_bias else None,
        dA,
        dy.t().mm(rows).to(B_dtype) if to_B else None,
        None,
        dy.view(ctx.shapes[1]) if to_base else None,
    )
