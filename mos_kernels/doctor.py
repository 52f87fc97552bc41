"""`python -m mos_kernels doctor`: which backend would run here, why, and whether it computes the right numbers."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

from mos_kernels import __version__
from mos_kernels.backends import resolve_backend, selected_backend, why_not_triton
from mos_kernels.config import MoSConfig
from mos_kernels.functional import mos_linear
from mos_kernels.layer import MoSLinear

PACKAGES = ("torch", "triton", "numpy", "transformers", "accelerate", "peft", "pytest", "hypothesis", "matplotlib")


def run() -> int:
    """Print the report; 0 if every check passed."""
    print(f"mos_kernels {__version__}, Python {platform.python_version()}, {platform.machine()}")
    print("packages: " + ", ".join(f"{name} {_version(name)}" for name in PACKAGES))
    failures = sum(_report(device) for device in _devices())
    print("all checks passed" if not failures else f"{failures} checks FAILED")
    return 1 if failures else 0


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _devices() -> list[torch.device]:
    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]


def _report(device: torch.device) -> int:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"threads: {torch.get_num_threads()}"
    probe = torch.empty(1, device=device)
    reason = why_not_triton(probe)
    try:
        source = "set_backend or MOS_BACKEND" if selected_backend() != "auto" else "the default"
        chosen = resolve_backend("auto", probe)
    except ValueError as error:
        print(f"{device} ({name}): {error}")
        return 1
    print(f"{device} ({name}): backend {chosen} (requested: {selected_backend()}, {source})")
    print("  FFN blocks: apply_mos(model, config).report() says which blocks of a model run as one operation")
    print(f"  triton: {'can run here' if reason is None else 'cannot run here: ' + reason}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("  TRITON_INTERPRET=1: kernels run in Triton's interpreter, for tests, thousands of times slower")
    backends = {chosen, "eager"} | ({"triton"} if reason is None else set())
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    return sum(_check(device, dtype, backend) for backend in sorted(backends) for dtype in dtypes)


def _check(device: torch.device, dtype: torch.dtype, backend: str) -> int:
    """Compare outputs and gradients of a small layer with float64; the bound is a few roundings of dtype."""
    torch.manual_seed(0)
    config = MoSConfig(router_scope="linear", init_lora_weights=False)
    layer = MoSLinear(48, 40, config=config)
    layer.weight.data, layer.bias.data = (t.data.to(dtype).float() for t in (layer.weight, layer.bias))
    x = torch.randn(33, 48).to(dtype)
    values = (x, layer.weight, layer.bias, layer.mos_lora_A, layer.mos_lora_B, layer.curvature, layer.mos_router)
    truth = _outputs(values, torch.float64, torch.float64, torch.device("cpu"), config, "eager")
    try:
        got = _outputs(values, dtype, torch.float32, device, config, backend)
    except Exception as error:  # a doctor reports what a user would meet, whatever it is
        print(f"  {backend:6} {str(dtype).removeprefix('torch.'):8} FAILED: {type(error).__name__}: {error}")
        return 1
    error = max(((a.double().cpu() - b).abs().max() / b.abs().max()).item() for a, b in zip(got, truth, strict=True))
    bound = 8 * torch.finfo(dtype).eps
    passed = error <= bound
    print(
        f"  {backend:6} {str(dtype).removeprefix('torch.'):8} {'ok' if passed else 'FAILED':6} "
        f"largest relative error of outputs and gradients {error:.1e} (bound {bound:.1e})"
    )
    return not passed


def _outputs(values, wide: torch.dtype, narrow: torch.dtype, device: torch.device, config, backend: str):
    tensors = [t.detach().to(device, wide if i < 3 else narrow).requires_grad_() for i, t in enumerate(values)]
    x, weight, bias, A, B, kappa, router = tensors
    y = mos_linear(x, weight, bias, A, B, kappa, router=router, config=config, backend=backend)
    y.sin().sum().backward()
    return [y.detach(), *(t.grad for t in tensors)]
