"""The model card of an adapter: what it is, how to load it, and what servers would do to it."""

from __future__ import annotations

import os

from torch import nn

from mos_kernels.config import MoSConfig, listed

_NO_MERGE = """It cannot be merged into the base model, since what it adds depends on the token.
`mos_kernels.huggingface.export_lora` writes the nearest plain LoRA, which can be merged. With vLLM, SGLang and
llama.cpp, serve that LoRA: they refuse this adapter or leave it out, in some cases without an error."""


_AUTO = {
    "CAUSAL_LM": "ForCausalLM", "SEQ_CLS": "ForSequenceClassification", "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering", "SEQ_2_SEQ_LM": "ForSeq2SeqLM",
    "FEATURE_EXTRACTION": "ForFeatureExtraction",
}  # fmt: skip


def classes_to_load(model: nn.Module) -> str:
    """What from_pretrained needs besides the base's name: for a classifier, another number of classes than 2."""
    labels = getattr(getattr(model, "config", None), "num_labels", 2)
    classifies = any(kind.__name__.endswith("Classification") for kind in type(model).__mro__)
    return f", num_labels={labels}" if classifies and labels != 2 else ""


def with_import_note(card: str, task_type: str | None = None) -> str:
    """The model card, with a note on what to import before loading the adapter. task_type: of peft."""
    auto = f"AutoPeftModel{_AUTO.get(task_type or '', '')}"
    labels = ", num_labels=...)  # the number of classes" if task_type in ("SEQ_CLS", "TOKEN_CLS") else ")"
    if "mos_kernels.huggingface" in card:
        return card
    note = f"""## Loading

This is a Mixture-of-Space adapter: MOSELORA, a peft method of the package `mos_kernels`, which must be
imported first:

```python
import mos_kernels.huggingface  # first
from peft import {auto}  # or PeftModel.from_pretrained(base, ...)

model = {auto}.from_pretrained("this folder"{labels}
```

{_NO_MERGE}
"""
    return f"{card.rstrip()}\n\n{note}".lstrip()


def adapter_card(base: str | None, kind: type[nn.Module], config: MoSConfig, labels: str = "") -> str:
    """The card of save_adapter. kind: the model's class. labels: what `classes_to_load` gives."""
    is_hub_id = base is not None and not os.path.exists(base)
    elsewhere = "".join(
        f"Linears that match `{k}` have {listed(v)}.\n" for k, v in (config.spaces_pattern or {}).items()
    )
    is_transformers = kind.__module__.startswith("transformers.")
    own = f"\nmodel = ...  # the {kind.__name__} that the adapter was trained on"
    if is_transformers:
        own = f"from transformers import {kind.__name__}\n\n"
        own += f"model = {kind.__name__}.from_pretrained({base or 'the base model'!r}{labels})"
    by_peft = f"""
Or, where peft is installed:

```python
import mos_kernels.huggingface  # first
from peft import AutoPeftModel

model = AutoPeftModel.from_pretrained("this folder"{labels})
```
"""
    base_line = f"base_model: {base}\n" if is_hub_id else ""
    return f"""---
{base_line}tags:
- mos-kernels
- lora
---

# A Mixture-of-Space adapter

Rank {config.r}, {config.num_experts} experts ({listed(config.spaces)}), {config.num_experts_per_tok} used by a token.
{elsewhere}{_NO_MERGE}

A process that loads it must import `mos_kernels.huggingface` first:

```python
import mos_kernels.huggingface  # first
from mos_kernels.huggingface import load_adapter
{own}
load_adapter(model, "this folder")
```
{by_peft if base and is_transformers else ""}"""
