"""Small models of every family, and snapshots that show whether a model was changed."""

from __future__ import annotations

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from mos_kernels import MoSConfig

# torch.device("meta") remembers the constructors that it redirects at its first use: let those be torch's own, and not
# the ones that conftest.py poisons during a test, or what is made under it later is real memory
torch.utils._device._device_constructors()

VOCABULARY = 48
_COMMON = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2, "head_dim": 8}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": VOCABULARY}

FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, _GROUPED),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {**_COMMON, "num_key_value_heads": 2}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, _GROUPED),
    "mistral": (MistralForCausalLM, MistralConfig, _GROUPED),
    "gemma": (GemmaForCausalLM, GemmaConfig, _GROUPED),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, _GROUPED),
    "phi3": (Phi3ForCausalLM, Phi3Config, {**_COMMON, "num_key_value_heads": 2}),
    "bert": (BertForSequenceClassification, BertConfig, _COMMON),
    "gpt2": (GPT2LMHeadModel, GPT2Config, {**_GPT2, "bos_token_id": 1, "eos_token_id": 2}),
    "phi": (PhiForCausalLM, PhiConfig, _COMMON),
    "gpt_neox": (GPTNeoXForCausalLM, GPTNeoXConfig, _COMMON),
}

MATRIX = ("llama", "qwen2", "gemma", "bert")
"""The families of the tables in docs/, through which every row goes; BERT is the one that does not generate."""
DECODERS = MATRIX[:3]


def tiny(family: str = "llama", dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """A model of the family with random weights, no dropout, in eval mode."""
    kind, config, options = FAMILIES[family]
    torch.manual_seed(seed)
    model = kind(config(**options))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.normal_(module.bias, std=0.1)
    return model.to(dtype).eval()


def mos(model: nn.Module, **options) -> MoSConfig:
    """A configuration for the model's FFN blocks, whose adapter has an effect from the start."""
    from mos_kernels.huggingface import ffn_target_modules

    where = {} if "target_modules" in options else {"target_modules": ffn_target_modules(model)}
    return MoSConfig(**{"r": 4, "init_lora_weights": False, **where, **options})


def ids(seed: int = 0, batch: int = 2, length: int = 7) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def aligned(model: nn.Module) -> nn.Module:
    """The model, a file's tensors moved to where others start: elsewhere, some CPUs sum in another order."""
    for tensor in [*model.parameters(), *model.buffers()]:
        if type(tensor) in (torch.Tensor, nn.Parameter) and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()
    return model


def logits(model: nn.Module) -> torch.Tensor:
    """Of `ids()`."""
    with torch.no_grad():
        return aligned(model)(ids()).logits


def batch(family: str = "llama", seed: int = 0, batch: int = 2, length: int = 7) -> dict[str, torch.Tensor]:
    """Tokens and labels: the tokens again, or a class for each sequence."""
    tokens = ids(seed, batch, length)
    return {"input_ids": tokens, "labels": torch.arange(batch) % 2 if family == "bert" else tokens}


def layers_of(model: nn.Module) -> nn.ModuleList:
    return model.bert.encoder.layer if hasattr(model, "bert") else model.model.layers


def ffn_of(layer: nn.Module) -> list[tuple[nn.Module, str]]:
    """Where the linears of the layer's FFN are, the one that widens first: (module, attribute)."""
    if hasattr(layer, "mlp"):
        return [(layer.mlp, name) for name in ("up_proj", "gate_proj", "down_proj")]
    return [(layer.intermediate, "dense"), (layer.output, "dense")]


def first_linear(model: nn.Module) -> nn.Module:
    """The first FFN linear that widens."""
    return getattr(*ffn_of(layers_of(model)[0])[0])


def snapshot(model: nn.Module) -> dict:
    """All that an operation which fails must leave alone."""
    return {
        "types": {name: type(module) for name, module in model.named_modules(remove_duplicate=False)},
        "modules": {name: id(module) for name, module in model.named_modules(remove_duplicate=False)},
        "forwards": {name: vars(module).get("forward") for name, module in model.named_modules()},
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "hooks": {name: len(module._forward_pre_hooks) for name, module in model.named_modules()},
        "training": {name: module.training for name, module in model.named_modules()},
        "state": {name: (id(t), t._version) for name, t in model.state_dict(keep_vars=True).items()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
    }
