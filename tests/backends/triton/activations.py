"""The activations by themselves: a kernel that writes φ and φ', and how far they are from float64."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from cases import compare

from mos_kernels.backends import eager, eager_ffn
from mos_kernels.backends.triton.activations import CODES, activation


@triton.jit
def activation_kernel(v, u, slope, N, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_u, b_slope = activation(tl.load(v + o, mask=o < N, other=0.0), ACTIVATION)
    tl.store(u + o, b_u, mask=o < N)
    tl.store(slope + o, b_slope, mask=o < N)


def failures(name: str) -> list[str]:
    """One line where the kernel is worse than twice torch's float32, over all that v can be."""
    near = torch.linspace(-8, 8, 4000)
    v = torch.cat([near, near**3, near / 1000, torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e4, -1e4])])
    kernels = {"u": torch.empty_like(v), "slope": torch.empty_like(v)}
    grid, block = (triton.cdiv(v.numel(), 1024),), {"ACTIVATION": CODES[name], "BLOCK": 1024}
    activation_kernel[grid](v, *kernels.values(), v.numel(), **block)
    return compare(kernels, _by_torch(v, name), _by_torch(v.double(), name))


def _by_torch(v: torch.Tensor, name: str) -> dict[str, torch.Tensor]:
    if name != "gelu_tanh":
        return {"u": eager._activation(v, name), "slope": eager._activation_slope(v, name)}
    slope = torch.empty_like(v)
    eager_ffn._phi_backward(torch.ones_like(v), v, name, slope)
    return {"u": eager_ffn.phi(v, name), "slope": slope}
