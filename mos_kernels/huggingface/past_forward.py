"""Linears whose weight a model reads without calling them. An adapter on them would have no effect, or a wrong one.

The table was made from the sources of torch 2.13 and transformers 5.24. `tests/huggingface/test_past_forward.py` reads
the sources of the installed transformers, and fails for modules that are not in this table.
"""

from __future__ import annotations

from torch import nn

_FAST_PATH = "reads its weight itself in inference, in a fast path that never calls it"
_KERNELS = "hands its weight to fused kernels, or to a scan, and does not call it there"
_ATTENTION = "hands its weight to torch's multi_head_attention_forward and never calls it"
_CONVOLUTION = "uses its weight as a convolution's and never calls it"
_TABLE = "uses its weight as a table or a matrix and does not call it"
_CLIPPED = "clips its weight in training and does not call it"
_RESCALED = "divides its weight by powers of 2 in inference, but would not divide the adapter"
_SLICED = "multiplies by slices of its weight where config.pretraining_tp > 1 and config.slow_but_exact"

_MAMBA2 = "Mamba2Mixer BambaMixer FalconH1Mixer GraniteMoeHybridMambaLayer NemotronHMamba2Mixer Zamba2MambaMixer"
_READERS = {
    "TransformerEncoderLayer": ("linear1 linear2", _FAST_PATH),
    "MambaMixer": ("x_proj dt_proj out_proj", _KERNELS),
    "FalconMambaMixer": ("x_proj dt_proj out_proj", _KERNELS),
    "JambaMambaMixer": ("dt_proj", _KERNELS),
    **dict.fromkeys(_MAMBA2.split(), ("out_proj", _KERNELS)),
    "WavLMAttention": ("q_proj k_proj v_proj out_proj", _ATTENTION),
    "TDNNLayer": ("kernel", _CONVOLUTION),
    "DetrMHAttentionMap": ("k_proj", _CONVOLUTION),
    "ConditionalDetrMHAttentionMap": ("k_proj", _CONVOLUTION),
    "MaskFormerDetrMHAttentionMap": ("k_proj", _CONVOLUTION),
    "DabDetrMHAttentionMap": ("k_linear", _CONVOLUTION),
    "LayoutLMv2Encoder": ("rel_pos_bias rel_pos_x_bias rel_pos_y_bias", _TABLE),
    "LSHSelfAttention": ("query_key value", _TABLE),
    "LongcatFlashTopkRouter": ("classifier", _TABLE),
    "MobileBertLMPredictionHead": ("dense decoder", _TABLE),
    "NeoMMEForMaskedLM": ("unembedding_projection", _TABLE),
    "Gemma4AssistantForCausalLM": ("lm_head", _TABLE),
    "Gemma4UnifiedAssistantForCausalLM": ("lm_head", _TABLE),
    "Gemma3nTextAltUp": ("correction_coefs", _CLIPPED),
    "RwkvSelfAttention": ("output", _RESCALED),
    "RwkvFeedForward": ("value", _RESCALED),
    "BloomAttention": ("dense", _SLICED),
    "BloomMLP": ("dense_4h_to_h", _SLICED),
}
"""By class of the parent: the linears that it uses in this way, and how."""


def why_past_forward(parent: nn.Module, child: str) -> str | None:
    """How `parent` reads the weight of its linear `child` without calling it; None if it calls it."""
    for kind in type(parent).__mro__:
        if kind.__module__.partition(".")[0] not in ("torch", "transformers", "transformers_modules"):
            continue  # a class of the same name in another library
        children, why = _READERS.get(kind.__name__, ("", ""))
        if child in children.split() and (why != _SLICED or _is_sliced(parent)):
            return f"{type(parent).__name__} {why}"
    return None


def _is_sliced(block: nn.Module) -> bool:
    return block.pretraining_tp > 1 and block.slow_but_exact
