"""The code in docs/peft.md runs, and its migration from LoRA is what it says."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from tiny_models import ids, tiny

PAGE = (Path(__file__).parents[2] / "docs" / "peft.md").read_text(encoding="utf-8")


def test_the_examples_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny(dtype=torch.float32).save_pretrained("base")
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    outputs = []
    for block in blocks:
        scope = {"input_ids": ids()}
        exec(block, scope)
        if "model" in scope:
            with torch.no_grad():
                outputs.append(scope["model"].eval()(ids()).logits)
    assert len(outputs) == 3 and all(torch.equal(outputs[0], output) for output in outputs)
    assert "mos_router" in capsys.readouterr().out


def test_the_migration_is_five_changed_lines_and_both_sides_run():
    (diff,) = re.findall(r"```diff\n(.*?)```", PAGE, re.DOTALL)
    lines = diff.splitlines()
    assert len([line for line in lines if line[0] in "+-"]) == 5
    for side in "-+":
        code = "\n".join(line[1:] for line in lines if line[0] in f" {side}")
        scope = {"model": tiny(dtype=torch.float32)}
        exec(code, scope)
        assert scope["model"](ids()).logits.shape == (2, 7, 48)
