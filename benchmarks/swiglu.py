"""silu(g)·u in one kernel, forward and backward: our stand-in for Liger's, and what the LoRA MLP of the peers uses.

Triton where it runs; elsewhere PyTorch, which saves as little and takes more passes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.providers import why_no_triton

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:
    triton = None

BLOCK = 1024

if triton is not None:

    @triton.jit
    def _forward_kernel(g_ptr, u_ptr, h_ptr, count, BLOCK: tl.constexpr):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        g = tl.load(g_ptr + at, at < count, 0.0).to(tl.float32)
        u = tl.load(u_ptr + at, at < count, 0.0).to(tl.float32)
        tl.store(h_ptr + at, g * tl.sigmoid(g) * u, at < count)

    @triton.jit
    def _backward_kernel(dh_ptr, g_ptr, u_ptr, h_ptr, dg_ptr, du_ptr, count, BLOCK: tl.constexpr):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        dh = tl.load(dh_ptr + at, at < count, 0.0).to(tl.float32)
        g = tl.load(g_ptr + at, at < count, 0.0).to(tl.float32)
        u = tl.load(u_ptr + at, at < count, 0.0).to(tl.float32)
        gate = tl.sigmoid(g)
        phi = g * gate
        tl.store(h_ptr + at, phi * u, at < count)
        tl.store(du_ptr + at, dh * phi, at < count)
        tl.store(dg_ptr + at, dh * u * (gate + phi * (1 - gate)), at < count)


def forward(g: Tensor, u: Tensor) -> Tensor:
    """h = silu(g)·u of contiguous g and u, rounded once."""
    if why_no_triton(g.device) is not None:
        return F.silu(g).mul_(u)
    h = torch.empty_like(g)
    _forward_kernel[(triton.cdiv(g.numel(), BLOCK),)](g, u, h, g.numel(), BLOCK=BLOCK)
    return h


def backward(dh: Tensor, g: Tensor, u: Tensor, inplace: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """h again, dg and du. inplace: the kernel writes them over dh, g and u."""
    if why_no_triton(g.device) is not None:
        phi = F.silu(g)
        return phi * u, torch.ops.aten.silu_backward(dh * u, g), dh * phi
    h, dg, du = (dh, g, u) if inplace else (torch.empty_like(g) for _ in range(3))
    _backward_kernel[(triton.cdiv(g.numel(), BLOCK),)](dh, g, u, h, dg, du, g.numel(), BLOCK=BLOCK)
    return h, dg, du


class SwiGLU(torch.autograd.Function):
    """silu(g)·u, which saves g and u alone."""

    @staticmethod
    def forward(ctx, g, u):
        ctx.save_for_backward(g, u)
        return forward(g, u)

    @staticmethod
    def backward(ctx, dh):
        _, dg, du = backward(dh.contiguous(), *ctx.saved_tensors)
        return dg, du


class LoRAMLP(torch.autograd.Function):
    """A gated FFN with plain LoRAs as one node over the library's products, in the way of unsloth's, written here.

    x, g and u are saved; h and the narrow products are formed again, and backward writes h, dg and du over buffers
    that it has no more use for, so it runs once. dx is a new tensor: the benchmark's x are used again.
    """

    @staticmethod
    def forward(ctx, x, gate, up, down, scaling, gate_A, gate_B, up_A, up_B, down_A, down_B):
        def linear(x, weight, A, B):
            return torch.mm(x, weight.t()).addmm_(x @ A.t(), B.t(), alpha=scaling)

        g, u = linear(x, gate, gate_A, gate_B), linear(x, up, up_A, up_B)
        y = linear(forward(g, u), down, down_A, down_B)
        ctx.save_for_backward(x, g, u, gate, up, down, gate_A, gate_B, up_A, up_B, down_A, down_B)
        ctx.scaling = scaling
        return y

    @staticmethod
    def backward(ctx, dy):
        x, g, u, gate, up, down, gate_A, gate_B, up_A, up_B, down_A, down_B = ctx.saved_tensors
        s = ctx.scaling

        def factors(dy, x, A, B):
            """dp = s dy·B, and the gradients of A and B."""
            dp = (dy @ B).mul_(s)
            return dp, dp.t() @ x, (dy.t() @ (x @ A.t())).mul_(s)

        dp = (dy @ down_B).mul_(s)
        h, dg, du = backward((dy @ down).addmm_(dp, down_A), g, u, inplace=True)
        d_down = dp.t() @ h, (dy.t() @ (h @ down_A.t())).mul_(s)
        dp_gate, *d_gate = factors(dg, x, gate_A, gate_B)
        dp_up, *d_up = factors(du, x, up_A, up_B)
        dx = (dg @ gate).addmm_(dp_gate, gate_A).addmm_(du, up).addmm_(dp_up, up_A)
        return dx, None, None, None, None, *d_gate, *d_up, *d_down
