"""The model cards of an adapter and of its export: what it is, how to load it, and what servers would do to it."""

from __future__ import annotations

import os
from collections.abc import Sequence

from huggingface_hub import ModelCardData
from torch import nn

import mos_kernels
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
    return f"""{_metadata(base)}
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


def export_card(base: str | None, kind: type[nn.Module], lost: Sequence[str], table: Sequence[str]) -> str:
    """lost: what was lost, in lines of text. table: the same of each linear, in lines of Markdown."""
    return f"""{_metadata(base, library_name="peft")}
# A LoRA exported from a Mixture-of-Space adapter

A plain LoRA, fitted by mos_kernels {mos_kernels.__version__} to a Mixture-of-Space adapter on calibration data. It \
loads, merges and serves without mos_kernels:

```python
from peft import PeftModel
from transformers import {kind.__name__}

model = PeftModel.from_pretrained({kind.__name__}.from_pretrained({base or "the base model"!r}), "this folder")
model = model.merge_and_unload()
```

## What was lost

{chr(10).join(f"- {line}" for line in lost)}

{chr(10).join(table)}
"""


def _metadata(base: str | None, **entries: str) -> str:
    """The head of a card. A base that is a folder of this machine is not named."""
    named = None if base is None or os.path.exists(base) else base
    data = ModelCardData(base_model=named, tags=["lora", "mos-kernels"], **entries)
    return f"---\n{data.to_yaml()}\n---\n"
