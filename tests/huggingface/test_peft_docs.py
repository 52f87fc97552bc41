"""The code in docs/peft.md runs, and its migration from LoRA is what it says."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tiny_models import ids, tiny

PAGE = (Path(__file__).parents[2] / "docs" / "peft.md").read_text(encoding="utf-8")


def test_the_examples_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny(dtype=torch.float32).save_pretrained("base")
    lora = LoraConfig(r=4, target_modules=["up_proj", "down_proj"], task_type="CAUSAL_LM")
    get_peft_model(tiny(dtype=torch.float32), lora).save_pretrained("lora")
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 4
    outputs = []
    for block in blocks:
        scope = {"input_ids": ids()}
        exec(block, scope)
        with torch.no_grad():
            outputs.append(scope["model"].eval()(ids()).logits)
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[1], outputs[2])
    assert "mos_router" in capsys.readouterr().out and (tmp_path / "mixture" / "adapter_model.safetensors").is_file()


def test_the_migration_is_five_changed_lines_and_both_sides_run():
    (diff,) = re.findall(r"```diff\n(.*?)```", PAGE, re.DOTALL)
    lines = diff.splitlines()
    assert len([line for line in lines if line[0] in "+-"]) == 5
    for side in "-+":
        code = "\n".join(line[1:] for line in lines if line[0] in f" {side}")
        scope = {"model": tiny(dtype=torch.float32)}
        exec(code, scope)
        assert scope["model"](ids()).logits.shape == (2, 7, 48)
