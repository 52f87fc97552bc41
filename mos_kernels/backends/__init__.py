"""Which implementation of the four steps runs: shrink, route, bridge, expand."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mos_kernels.backends.interface import Backend, FFNBackend

BACKENDS = ("auto", "eager", "triton")

_selected: str | None = None


def constant_under_compile(function):
    """Make torch.compile treat the function's result as a constant.

    The same as torch.compiler.assume_constant_result, which would import torch._dynamo, and with it triton.
    """
    function._dynamo_marked_constant = True
    return function


def set_backend(name: str) -> None:
    """Set the default backend: "auto", "eager" or "triton". Calls with an argument `backend` do not use it.

    "auto" is triton for CUDA and ROCm tensors, and eager otherwise. The environment variable MOS_BACKEND also sets the
    default; this function takes precedence over it.
    """
    global _selected
    _selected = _checked(name, "set_backend")


def selected_backend() -> str:
    """The backend set by `set_backend`, else by MOS_BACKEND, else "auto"."""
    if _selected is not None:
        return _selected
    return _checked(os.environ.get("MOS_BACKEND", "auto"), "MOS_BACKEND")


def resolve_backend(requested: str, x: Tensor) -> str:
    """The backend for the input x, "eager" or "triton". Raises ValueError if the requested one cannot run it."""
    name = _checked(requested, "backend")
    if name == "auto":
        name = selected_backend()
    if name == "auto":
        name = "triton" if x.is_cuda and x.dtype != torch.float64 and has_triton() else "eager"
    if name == "triton":
        reason = why_not_triton(x)
        if reason:
            raise ValueError(f"backend='triton' cannot run this input: {reason}. Use backend='eager' or 'auto'")
    return name


def load_backend(name: str) -> Backend:
    """The module that has the four steps of a backend."""
    if name == "triton":
        from mos_kernels.backends import triton

        return triton
    from mos_kernels.backends import eager

    return eager


def load_ffn(name: str) -> FFNBackend:
    """The module of a backend that computes an FFN block as one operation."""
    if name == "triton":
        from mos_kernels.backends.triton import ffn

        return ffn
    from mos_kernels.backends import eager_ffn

    return eager_ffn


def why_not_triton(x: Tensor) -> str | None:
    """Why the Triton kernels cannot run on x, or None if they can."""
    if x.dtype == torch.float64:
        return "the input is float64, and the kernels compute in float32"
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the input is on {x.device}, and TRITON_INTERPRET=1 (Triton's interpreter, for tests) is not set"
    if not has_triton():
        return "the package triton is not installed (pip install triton)"
    return None


@constant_under_compile
def has_triton() -> bool:
    """Whether the package triton is installed."""
    return importlib.util.find_spec("triton") is not None


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: {name!r} is no backend: use one of {BACKENDS}")
    return name
