"""Damaged adapter files of every family, through both doors: refused with the reason, and the model is as it was.

What else can be wrong with files is in test_adapter_files.py and test_peft_files.py, on a Llama.
"""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from peft_setup import peft_model
from safetensors.torch import load_file, save_file
from tiny_models import MATRIX, snapshot, tiny

from mos_kernels.huggingface import load_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def truncate(folder):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def change(folder, make):
    tensors = load_file(folder / WEIGHTS)
    name = next(name for name in tensors if name.endswith("mos_lora_B"))
    save_file({**tensors, name: make(tensors[name])}, folder / WEIGHTS)


def configure(folder, **values):
    found = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**found, **values}))


DAMAGES = {
    "truncated": (truncate, "truncated or damaged"),
    "not finite": (lambda folder: change(folder, lambda B: B * torch.inf), "not finite"),
    "an expert less": (lambda folder: change(folder, lambda B: B[:, 1:].contiguous()), "shape"),
    "whole numbers": (lambda folder: change(folder, lambda B: B.int()), "int32"),
    "no such k": (lambda folder: configure(folder, num_experts_per_tok=9), "num_experts_per_tok=9 exceeds"),
    "from the future": (lambda folder: configure(folder, from_the_future=3), "from_the_future"),
    "a pickle": (lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"), "pickles are never loaded"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("family", MATRIX)
@pytest.mark.one_at_a_time("family", "damage")
def test_refused_through_both_doors(family, damage, tmp_path):
    peft_model(family).save_pretrained(tmp_path)
    for door in (load_adapter, PeftModel.from_pretrained):  # both open them whole
        door(tiny(family), tmp_path)
    spoil, message = DAMAGES[damage]
    spoil(tmp_path)
    model = tiny(family)
    before = snapshot(model)
    for door in (load_adapter, PeftModel.from_pretrained):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            door(model, tmp_path)
        assert snapshot(model) == before
