"""Mixture-of-Space adapters (MoSELoRA, arXiv 2602.14490): routed, curved low-rank experts on a frozen linear."""

from mos_kernels.backends import set_backend
from mos_kernels.config import MoSConfig
from mos_kernels.layer import MoSConv1D, MoSLinear, MoSRouter, MoSWrapped
from mos_kernels.warmup import warmup

__all__ = ["MoSConfig", "MoSConv1D", "MoSLinear", "MoSRouter", "MoSWrapped", "__version__", "set_backend", "warmup"]
__version__ = "0.1.0"
