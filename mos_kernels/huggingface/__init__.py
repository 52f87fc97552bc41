"""Mixture-of-Space adapters on transformers' models: apply, save, load and train them.

If peft is installed, importing this module registers the method MOSELORA with it.
"""

try:
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        "mos_kernels.huggingface needs transformers: pip install transformers accelerate safetensors"
    ) from error

from mos_kernels.huggingface.apply import activated_parameters, apply_mos, remove_mos
from mos_kernels.huggingface.attention_mask import follow_attention_mask
from mos_kernels.huggingface.callback import MoSCallback, mos_param_groups
from mos_kernels.huggingface.export_lora import ExportReport, export_lora
from mos_kernels.huggingface.files import load_adapter, save_adapter
from mos_kernels.huggingface.from_lora import start_from_lora
from mos_kernels.huggingface.participation import Idle, idle_tensors
from mos_kernels.huggingface.routing_report import routing_report
from mos_kernels.huggingface.targets import ffn_target_modules
from mos_kernels.run_report.log import last_complete_checkpoint

__all__ = [
    "ExportReport",
    "Idle",
    "MoSCallback",
    "activated_parameters",
    "apply_mos",
    "export_lora",
    "ffn_target_modules",
    "follow_attention_mask",
    "idle_tensors",
    "last_complete_checkpoint",
    "load_adapter",
    "mos_param_groups",
    "remove_mos",
    "routing_report",
    "save_adapter",
    "start_from_lora",
]

try:
    from mos_kernels.huggingface.peft.config import MoSPeftConfig
    from mos_kernels.huggingface.peft.model import MoSPeftModel

    __all__ += ["MoSPeftConfig", "MoSPeftModel"]
except ImportError as error:
    _why_no_peft = error

    def __getattr__(name: str):
        if name in ("MoSPeftConfig", "MoSPeftModel"):
            raise ImportError(f'{name} needs peft 0.21 or later: pip install "peft>=0.21"') from _why_no_peft
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
