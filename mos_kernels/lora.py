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
        x, weight, bias = (None if t is None else t.to(autocast_dtype(x)) for t in (x, weight, bias))
        with without_autocast(x):  # autocast would round a base's float32 output
            return _lora(x, weight, bias, A, B, scaling, base_output, dropout_p)
    return _lora(x, weight, bias, A, B, scaling, base_output, dropout_p)


def _lora(x, weight, bias, A, B, scaling, base_output, dropout_p) -> Tensor:
    if dropout_p > 0 or torch.compiler.is_compiling():  # Inductor fuses it, and makes the backward
        return composed(x, dropout(x, dropout_p), weight, bias, A, B, scaling, base_output)
    if torch.is_grad_enabled():
        return _LoRA.apply(x, weight, bias, A, B, scaling, base_output)
    return _forward(x, weight, bias, A, B, scaling, base_output)[0]


def composed(x: Tensor, dropped: Tensor, weight, bias, A: Tensor, B: Tensor, scaling: float, base_output) -> Tensor:
    """The same with products that autograd and torch.compile trace. dropped: the input of A."""
    y_dtype = x.dtype if base_output is None else base_output.dtype
    low = linear(dropped, A.to(x.dtype)).to(y_dtype).mul(scaling)
    rows, factor = low.reshape(-1, low.shape[-1]), B.to(y_dtype).t()
    if base_output is not None:
        return base_output.reshape(-1, factor.shape[1]).addmm(rows, factor).view(base_output.shape)
    y = rows.mm(factor) if bias is None else torch.addmm(bias, rows, factor)
    return y.addmm(x.reshape(-1, x.shape[-1]), weight.t()).view(*x.shape[:-1], factor.shape[1])


def _forward(x, weight, bias, A, B, scaling, base_output) -> tuple[Tensor, Tensor]:
    """y, and scaling·A x in rows (T, r) of y's dtype."""
    xs = x.reshape(-1, x.shape[-1])
    rows = linear(xs, A.to(x.dtype))
    if base_output is not None:
        rows, y = rows.to(base_output.dtype).mul_(scaling), base_output.reshape(-1, B.shape[0])
        return y.addmm(rows, B.to(y.dtype).t()).view(base_output.shape), rows
    rows, factor = rows.mul_(scaling), B.to(x.dtype).t()
    y = rows.mm(factor) if bias is None else torch.addmm(bias, rows, factor)
    return y.addmm_(xs, weight.t()).view(*x.shape[:-1], y.shape[-1]), rows


class _LoRA(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, A, B, scaling, base_output):
        y, rows = _forward(x, weight, bias, A, B, scaling, base_output)
        to_x, to_weight, _, to_A, to_B, *_ = ctx.needs_input_grad
        ctx.save_for_backward(
            x if to_weight or to_A else None, weight if to_x else None, A if to_x else None,
            B if to_x or to_A else None, rows if to_B else None,
        )  # fmt: skip
        ctx.scaling, ctx.shape, ctx.dtypes = scaling, x.shape, (x.dtype, A.dtype, B.dtype)
        return y

    @staticmethod
    def backward(ctx, gradient):
        x, weight, A, B, rows = ctx.saved_tensors
        x_dtype, A_dtype, B_dtype = ctx.dtypes
        needs = ctx.needs_input_grad
        flat = gradient.reshape(-1, gradient.shape[-1])
        xs = None if x is None else x.reshape(-1, x.shape[-1])
        to_x = None
        low = None if B is None else flat.mm(B.to(flat.dtype)).mul(ctx.scaling).to(x_dtype)  # (T, r), of A x
        if needs[0]:
            A = A.to(x_dtype)
            to_x = low.mm(A)
            to_x = (to_x if weight is None else to_x.addmm_(flat, weight)).view(ctx.shape)
        return (
            to_x,
            flat.t().mm(xs) if needs[1] else None,
            flat.sum(0) if needs[2] else None,
            low.t().mm(xs).to(A_dtype) if needs[3] else None,
            flat.t().mm(rows).to(B_dtype) if needs[4] else None,
            None,
            gradient if needs[6] else None,
        )
