"""The scripts in examples/ do what they say, with small models."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from finetune_setup import save_bert
from pages import MODELS, prepare, save_chat

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *arguments: str) -> None:
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(list(arguments))


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {"plain_torch", "sft_peft", "classify"}


def test_plain_torch(capsys):
    run("plain_torch", "--width", "32", "--steps", "40")
    lines = [line for line in capsys.readouterr().out.splitlines() if "loss" in line]
    assert [line.partition(":")[0] for line in lines] == ["OwnRouters", "SharedRouter"]
    for line in lines:
        first, last = (float(word) for word in line.replace(",", "").split() if word[0].isdigit())
        assert last < first / 2


@pytest.mark.budget(8)
def test_sft_peft(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path)
    data = save_chat(tmp_path / "chat")
    run("sft_peft", "--model", MODELS[0], "--data", str(data), "--output", "out", "--max-steps", "2",
        "--batch-size", "2", "--max-new-tokens", "3", "--question", "the cat")  # fmt: skip
    assert "trainable params" in (out := capsys.readouterr().out) and "the cat\n" in out
    assert (tmp_path / "out/adapter_model.safetensors").is_file()


@pytest.mark.budget(8)
def test_classify(tmp_path, capsys):
    rows = "\n".join(f"{label}\tthe {word} sat" for label, word in [("animal", "cat"), ("thing", "house")] * 8)
    (tmp_path / "data.tsv").write_text(f"label\tsentence\n{rows}\n")
    model = save_bert(tmp_path / "bert")
    run("classify", "--model", str(model), "--train-file", str(tmp_path / "data.tsv"), "--epochs", "1",
        "--eval-file", str(tmp_path / "data.tsv"), "--output", str(tmp_path / "out"))  # fmt: skip
    out = capsys.readouterr().out
    assert "eval_accuracy" in out and "-> " in out and "aux loss" in out
