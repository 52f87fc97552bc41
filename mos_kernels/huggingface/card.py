"""The model card of an adapter: what it is, how to load it, and what servers would do to it."""

from __future__ import annotations

import os

from torch import nn

from mos_kernels.config import MoSConfig, listed

_NO_MERGE = """It cannot be merged into the base model, since what it adds depends on the token.
`mos_kernels.huggingface.export_lora` writes the nearest plain LoRA, which can be merged. With vLLM, SGLang and
llama.cpp, serve that LoRA: they refuse this adapter or leave it out, in some cases without an error."""


def with_import_note(card: str) -> str:
    """The model card, with a note on what to import before loading the adapter."""
    if "mos_kernels.huggingface" in card:
        return card
    note = f"""## Loading

This is a Mixture-of-Space adapter: MOSELORA, a peft method of the package `mos_kernels`, which must be
imported first:

```python
import mos_kernels.huggingface  # first
from peft import AutoPeftModelForCausalLM  # or PeftModel.from_pretrained(base, ...)

model = AutoPeftModelForCausalLM.from_pretrained("this folder")
```

{_NO_MERGE}
"""
    return f"{card.rstrip()}\n\n{note}".lstrip()


def adapter_card(base: str | None, kind: type[nn.Module], config: MoSConfig) -> str:
    is_hub_id = base is not None and not os.path.exists(base)
    elsewhere = "".join(
        f"Linears that match `{k}` have {listed(v)}.\n" for k, v in (config.spaces_pattern or {}).items()
    )
    is_transformers = kind.__module__.startswith("transformers.")
    own = f"\nmodel = ...  # the {kind.__name__} that the adapter was trained on"
    if is_transformers:
        own = f"from transformers import {kind.__name__}\n\n"
        own += f"model = {kind.__name__}.from_pretrained({base or 'the base model'!r})"
    by_peft = """
Or, where peft is installed:

```python
import mos_kernels.huggingface  # first
from peft import AutoPeftModel

model = AutoPeftModel.from_pretrained("this folder")
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
