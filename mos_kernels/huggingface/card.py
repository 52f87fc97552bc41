"""The model cards of an adapter and of its export: what it is, how to load it, and what servers would do to it."""

from __future__ import annotations

import os
from collections.abc import Sequence

from huggingface_hub import ModelCardData
from torch import nn

import mos_kernels
from mos_kernels.config import MoSConfig, listed

_ELSEWHERE = """With vLLM, SGLang and llama.cpp, serve that LoRA: none of them runs this adapter, and vLLM may leave it
out without an error."""


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


def with_import_note(card: str, config: MoSConfig, task_type: str | None = None) -> str:
    """The model card, with a note on what it is and what to import before loading it. task_type: of peft."""
    auto = f"AutoPeftModel{_AUTO.get(task_type or '', '')}"
    labels = ", num_labels=...)  # the number of classes" if task_type in ("SEQ_CLS", "TOKEN_CLS") else ")"
    if "mos_kernels.huggingface" in card:
        return card
    note = f"""## Loading

This is a Mixture-of-Space adapter: MOSELORA, a peft method of the package `mos_kernels`, which must be
imported first. {_experts(config)}

```python
import mos_kernels.huggingface  # first
from peft import {auto}  # or PeftModel.from_pretrained(base, ...)

model = {auto}.from_pretrained("this folder"{labels}
```

{_merging(config)}
"""
    return f"{card.rstrip()}\n\n{note}".lstrip()


def adapter_card(base: str | None, kind: type[nn.Module], config: MoSConfig, labels: str = "") -> str:
    """kind: the model's class. labels: what `classes_to_load` gives."""
    by_peft = f"""
Or, where peft is installed:

```python
import mos_kernels.huggingface  # first
from peft import AutoPeftModel

model = AutoPeftModel.from_pretrained("this folder"{labels})
```
"""
    return f"""{_metadata(base)}
# A Mixture-of-Space adapter

{_experts(config)}
{_merging(config)}

A process that loads it must import `mos_kernels.huggingface` first:

```python
import mos_kernels.huggingface  # first
from mos_kernels.huggingface import load_adapter
{_loading(base, kind, labels, "model")}
load_adapter(model, "this folder")
```
{by_peft if base and _is_transformers(kind) else ""}"""


def export_card(base: str | None, kind: type[nn.Module], labels: str, lost: Sequence[str], table: Sequence[str]) -> str:
    """kind, labels: as above. lost: what was lost, in lines of text. table: the same of each linear, in Markdown."""
    return f"""{_metadata(base, library_name="peft")}
# A LoRA exported from a Mixture-of-Space adapter

A plain LoRA, fitted by mos_kernels {mos_kernels.__version__} to a Mixture-of-Space adapter on calibration data. It \
loads, merges and serves without mos_kernels:

```python
from peft import PeftModel
{_loading(base, kind, labels, "base")}
model = PeftModel.from_pretrained(base, "this folder")
model = model.merge_and_unload()
```

## What was lost

{chr(10).join(f"- {line}" for line in lost)}

{chr(10).join(table)}
"""


def _experts(config: MoSConfig) -> str:
    """Which experts the linears have, in sentences."""
    count = "1 expert" if config.num_experts == 1 else f"{config.num_experts} experts"
    of = f"Rank {config.r}, {count} ({listed(config.spaces)}), {config.num_experts_per_tok} used by a token."
    patterns = (config.spaces_pattern or {}).items()
    return "\n".join([of, *(f"Linears that match `{key}` have {listed(spaces)}." for key, spaces in patterns)])


def _merging(config: MoSConfig) -> str:
    """What takes the place of a merge."""
    if config.is_lora and not config.spaces_pattern:
        text = """It is a plain LoRA, in a format that peft does not merge.
`mos_kernels.huggingface.export_lora` writes it as one of peft's."""
    else:
        text = """It cannot be merged into the base model, since what it adds depends on the token.
`mos_kernels.huggingface.export_lora` writes the nearest plain LoRA, which can be merged."""
    return f"{text} {_ELSEWHERE}"


def _loading(base: str | None, kind: type[nn.Module], labels: str, name: str) -> str:
    """Lines of Python that assign the base model to `name`."""
    if not _is_transformers(kind):
        return f"\n{name} = ...  # the {kind.__name__} that the adapter was trained on"
    loaded = f"{kind.__name__}.from_pretrained({base or 'the base model'!r}{labels})"
    return f"from transformers import {kind.__name__}\n\n{name} = {loaded}"


def _is_transformers(kind: type[nn.Module]) -> bool:
    return kind.__module__.startswith("transformers.")


def _metadata(base: str | None, **entries: str) -> str:
    """The head of a card. A base that is a folder of this machine is not named."""
    named = None if base is None or os.path.exists(base) else base
    data = ModelCardData(base_model=named, tags=["lora", "mos-kernels"], **entries)
    return f"---\n{data.to_yaml()}\n---\n"
