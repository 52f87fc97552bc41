"""What the layer is compared with: LoRA, HydraLoRA, mixture of LoRA, and the curved layers expert by expert.

Functions on plain tensors, with the shapes of `reference.layer.mos_linear`, and modules that own their parameters for
benchmarks. Each is the method's published form: one full-width vector an expert, and the backward by autograd.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reference.layer import dropped
from reference.per_expert import mos_linear_per_expert
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


class _Adapted(nn.Module):
    """A frozen linear's weight (d_out, d_in) and bias, and trainable A (kaiming-uniform), B (zero) and router."""

    def __init__(self, linear: nn.Linear, r: int, lora_alpha: float, lora_dropout: float, experts: int, share_a: bool):
        super().__init__()
        d_out, d_in = linear.weight.shape
        self.scaling, self.lora_dropout = lora_alpha / r, lora_dropout
        self.weight = nn.Parameter(linear.weight.data, requires_grad=False)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.data, requires_grad=False)
        dtype = torch.float64 if linear.weight.dtype == torch.float64 else torch.float32
        bound = 1 / math.sqrt(d_in)
        empty = linear.weight.new_empty
        self.A = nn.Parameter(empty((r, d_in) if share_a else (experts, r, d_in), dtype=dtype).uniform_(-bound, bound))
        self.B = nn.Parameter(torch.zeros(d_out, experts, r, dtype=dtype, device=linear.weight.device))
        self.router = nn.Parameter(empty((experts, d_in), dtype=dtype).normal_(std=0.02))

    def _options(self, x: Tensor) -> dict:
        if not (self.training and self.lora_dropout > 0):
            return {"scaling": self.scaling}
        keep = torch.rand(x.shape, device=x.device) >= self.lora_dropout
        return {"scaling": self.scaling, "dropout_p": self.lora_dropout, "keep": keep}


class LoRALinear(_Adapted):
    """`lora_linear` of a frozen linear: x (..., d_in) -> (..., d_out)."""

    def __init__(self, linear: nn.Linear, *, r: int = 8, lora_alpha: float = 16.0, lora_dropout: float = 0.0):
        super().__init__(linear, r, lora_alpha, lora_dropout, experts=1, share_a=True)
        self.router = None

    def forward(self, x: Tensor) -> Tensor:
        return lora_linear(x, self.weight, self.bias, self.A, self.B[:, 0], **self._options(x))


class HydraLoRALinear(_Adapted):
    """`hydralora_linear` of a frozen linear: x (..., d_in) -> (..., d_out)."""

    def __init__(
        self,
        linear: nn.Linear,
        *,
        num_experts: int = 8,
        r: int = 8,
        lora_alpha: float = 16.0,
        lora_dropout: float = 0.0,
    ):
        super().__init__(linear, r, lora_alpha, lora_dropout, num_experts, share_a=True)

    def forward(self, x: Tensor) -> Tensor:
        return hydralora_linear(x, self.weight, self.bias, self.A, self.B, self.router, **self._options(x))


class MixtureOfLoRALinear(_Adapted):
    """`mixture_of_lora_linear` of a frozen linear, an A an expert: x (..., d_in) -> (..., d_out)."""

    def __init__(
        self, linear: nn.Linear, *, num_experts: int = 8, num_experts_per_tok: int = 4, norm_topk_prob: bool = True,
        r: int = 8, lora_alpha: float = 16.0, lora_dropout: float = 0.0,
    ):  # fmt: skip
        super().__init__(linear, r, lora_alpha, lora_dropout, num_experts, share_a=False)
        self.routing = {"num_experts_per_tok": num_experts_per_tok, "norm_topk_prob": norm_topk_prob}

    def forward(self, x: Tensor) -> Tensor:
        options = self._options(x)
        return mixture_of_lora_linear(
            x, self.weight, self.bias, self.A, self.B, router=self.router, **self.routing, **options
        )


class MoSPerExpertLinear(_Adapted):
    """`mos_linear_per_expert` of a frozen linear, kappa (E,) trained as it is: x (..., d_in) -> (..., d_out).

    forward(x, gates=None): gates (..., E) from an FFN block's router, or None for the layer's own. options: activation,
    mapping ("exp_log" for the exponential and logarithmic map), domain, boundary_eps, routed_only, fused_norm.
    """

    def __init__(
        self, linear: nn.Linear, kappa: Tensor, *, num_experts_per_tok: int = 4, norm_topk_prob: bool = True,
        share_a: bool = True, r: int = 8, lora_alpha: float = 16.0, lora_dropout: float = 0.0, **options,
    ):  # fmt: skip
        super().__init__(linear, r, lora_alpha, lora_dropout, kappa.numel(), share_a)
        self.kappa = nn.Parameter(kappa.detach().to(self.A.device, self.A.dtype).clone())
        self.routing = {"num_experts_per_tok": num_experts_per_tok, "norm_topk_prob": norm_topk_prob}
        self.options = options

    def forward(self, x: Tensor, gates: Tensor | None = None) -> Tensor:
        return mos_linear_per_expert(
            x, self.weight, self.bias, self.A, self.B, self.kappa, gates=gates,
            router=self.router if gates is None else None, **self.routing, **self.options, **self._options(x),
        )  # fmt: skip
