"""What the layer is compared with: LoRA, HydraLoRA and mixture of LoRA, as functions like `reference.layer.mos_linear`.

Each is the method's published form: one full-width vector an expert, and the backward by autograd.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from reference.layer import dropped
from reference.routing import router_logits, top_k_gates


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, *,
    scaling: float = 1.0, dropout_p: float = 0.0, keep: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """LoRA (Hu et al., 2022): W x + b + scaling·B A drop(x). A (r, d_in), B (d_out, r)."""
    hidden = F.linear(dropped(x, keep, dropout_p), A.to(x.dtype))
    return F.linear(x, weight, bias) + scaling * F.linear(hidden, B.to(x.dtype))


def mixture_of_lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, *,
    gates: Tensor | None = None, router: Tensor | None = None, scaling: float = 1.0,
    num_experts_per_tok: int | None = None, norm_topk_prob: bool = True,
    dropout_p: float = 0.0, keep: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Mixture of LoRA experts (the paper's eqs 1 and 2): W x + b + scaling·Σ_e g_e B_e A_e drop(x).

    A (E, r, d_in), or (r, d_in) for one shared by all; B (d_out, E, r); gates (..., E) or router (E, d_in).
    """
    if gates is None:
        gates = top_k_gates(router_logits(x, router), num_experts_per_tok or B.shape[1], norm_topk_prob)
    A, B, gates = A.to(x.dtype), B.to(x.dtype), gates.to(x.dtype)
    tokens = dropped(x, keep, dropout_p)
    y = F.linear(x, weight, bias)
    hidden = F.linear(tokens, A) if A.dim() == 2 else None
    for e in range(B.shape[1]):
        hidden_e = F.linear(tokens, A[e]) if hidden is None else hidden
        y = y + (scaling * gates[..., e : e + 1]) * F.linear(hidden_e, B[:, e])
    return y


def hydralora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, router: Tensor, *,
    scaling: float = 1.0, dropout_p: float = 0.0, keep: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """HydraLoRA (Tian et al., 2024): one A (r, d_in), all B_e (d_out, E, r) mixed by softmax(router x)."""
    return mixture_of_lora_linear(
        x, weight, bias, A, B, router=router, scaling=scaling, norm_topk_prob=False, dropout_p=dropout_p, keep=keep
    )
