"""A single Euclidean expert: a LoRA, y = base(x) + (α/r) B A x, without router and curvature.

It takes two products of rank r beside the base's product. The second one is added to the base's output in place.
"""

from __future__ import annotations

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
    x_dtype = autocast_dtype(x)
    check_input(x, None if is_autocast(x) else weight, A.shape[-1])
    if base_output is not None:
        check_base_output(x, base_output, B.shape[0])
    y = linear(x, weight, bias) if base_output is None else base_output
    low = linear(dropout(x, dropout_p) if dropout_p > 0 else x, A.to(x_dtype))
    rows, factor = low.reshape(-1, low.shape[-1]).to(y.dtype), B.to(y.dtype).t()
    with without_autocast(x):  # autocast would round y
        if base_output is None:  # nothing else reads y, so it may be changed in place
            return y.view(-1, y.shape[-1]).addmm_(rows, factor, alpha=scaling).view(y.shape)
        return y.reshape(-1, y.shape[-1]).addmm(rows, factor, alpha=scaling).view(y.shape)
