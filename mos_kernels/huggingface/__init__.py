"""Mixture-of-Space adapters on transformers' models: apply, save and load, training helpers.

Where peft is installed, importing this registers the method MOSELORA with it.
"""

import importlib.util

try:
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError('mos_kernels.huggingface needs transformers: pip install "mos_kernels[hf]"') from error

from mos_kernels.huggingface.apply import activated_parameters, apply_mos, remove_mos
from mos_kernels.huggingface.files import load_adapter, save_adapter
from mos_kernels.huggingface.report import routing_report
from mos_kernels.huggingface.targets import ffn_target_modules
from mos_kernels.huggingface.training import MoSCallback, mos_param_groups

__all__ = [
    "MoSCallback",
    "activated_parameters",
    "apply_mos",
    "ffn_target_modules",
    "load_adapter",
    "mos_param_groups",
    "remove_mos",
    "routing_report",
    "save_adapter",
]

if importlib.util.find_spec("peft") is not None:
    from mos_kernels.huggingface.peft_config import MoSPeftConfig
    from mos_kernels.huggingface.peft_tuner import MoSPeftModel

    __all__ += ["MoSPeftConfig", "MoSPeftModel"]
else:

    def __getattr__(name: str):
        if name in ("MoSPeftConfig", "MoSPeftModel"):
            raise ImportError(f'{name} needs peft: pip install "mos_kernels[peft]"')
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
