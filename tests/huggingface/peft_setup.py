"""What the tests of the peft method share: tiny models with an adapter by peft, and their outputs."""

from __future__ import annotations

import torch
from peft import PeftModel, get_peft_model
from tiny_models import MATRIX, tiny

from mos_kernels.huggingface import MoSPeftConfig

TASKS = {"bert": "SEQ_CLS"}
FAMILIES = MATRIX
SCOPES = ("ffn", "linear")


def config(family: str = "llama", **options) -> MoSPeftConfig:
    """A configuration for the FFN linears, whose adapter has an effect from the start."""
    return MoSPeftConfig(**{"r": 4, "init_lora_weights": False, "task_type": TASKS.get(family, "CAUSAL_LM"), **options})


def peft_model(family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float64, **options) -> PeftModel:
    """A tiny model with an adapter that was drawn from `seed`, in eval mode."""
    model = tiny(family, dtype)
    torch.manual_seed(seed)
    return get_peft_model(model, config(family, **options)).eval()


def in_file(name: str, adapter: str = "default") -> str:
    """What `save_adapter` calls a parameter or tensor of either door."""
    name = name.removeprefix("base_model.model.").replace(f".mos_adapter.{adapter}.", ".")
    return name.replace(f".mos_router.{adapter}.weight", ".mos_router.weight").removesuffix(f".{adapter}")
