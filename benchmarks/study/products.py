"""Products in bfloat16 on a CPU that has no instructions for them.

torch's own take 10 to 60 times as long as in float32 there. Here the bfloat16 operands are widened, multiplied in
float32 and the result rounded once, which is what the instructions compute, but for the order of the sums.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

NATIVE = "native"
WIDENED = "widened to float32"

_overrides: torch.library.Library | None = None
"""torch forgets an override with the object that made it."""


def kind() -> str:
    """How this process takes products in bfloat16."""
    return NATIVE if _overrides is None else WIDENED


def prepare() -> None:
    """Widen the products of this process, unless the CPU has instructions for bfloat16."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        widen()


def widen() -> None:
    """Replace torch's products of bfloat16 matrices on the CPU, for the whole process."""
    global _overrides
    if _overrides is not None:
        return
    _overrides = torch.library.Library("aten", "IMPL")
    replaced = {"mm": _mm, "bmm": _bmm, "addmm": _addmm, "addmm_": _addmm_, "baddbmm": _baddbmm}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that kernels are replaced is the purpose
        for name, product in replaced.items():
            _overrides.impl(name, product, "CPU")


# The variants with out= are operators of their own, and so still torch's.


def _mm(a: Tensor, b: Tensor) -> Tensor:
    return _rounded(torch.mm, a, b)


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    return _rounded(torch.bmm, a, b)


def _addmm(added: Tensor, a: Tensor, b: Tensor, *, beta=1, alpha=1) -> Tensor:
    return _rounded(torch.addmm, added, a, b, beta=beta, alpha=alpha)


def _addmm_(total: Tensor, a: Tensor, b: Tensor, *, beta=1, alpha=1) -> Tensor:
    return total.copy_(_rounded(torch.addmm, total, a, b, beta=beta, alpha=alpha))


def _baddbmm(added: Tensor, a: Tensor, b: Tensor, *, beta=1, alpha=1) -> Tensor:
    return _rounded(torch.baddbmm, added, a, b, beta=beta, alpha=alpha)


def _rounded(product, *operands: Tensor, **factors) -> Tensor:
    dtype = operands[0].dtype
    wide = [t.float() for t in operands] if dtype == torch.bfloat16 else operands
    return product(*wide, **factors, out=wide[0].new_empty(0)).to(dtype)
