"""`python -m mos_kernels export-lora`: from a saved adapter and a text file to a peft LoRA folder; bad input."""

from __future__ import annotations

import json

import pytest
import torch
from finetune_setup import save_bert, save_llama, sentences, write_tsv
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from mos_kernels import MoSConfig
from mos_kernels.__main__ import main
from mos_kernels.huggingface import apply_mos, ffn_target_modules, save_adapter


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny Llama and a tiny BERT with a head of two classes, an adapter of each, and rows."""
    folder = tmp_path_factory.mktemp("export")
    save_llama(folder / "llama")
    save_bert(folder / "bert")
    for name, kind, options in (
        ("llama", AutoModelForCausalLM, {}),
        ("bert", AutoModelForSequenceClassification, {"num_labels": 2}),
    ):
        model = kind.from_pretrained(folder / name, **options)
        torch.manual_seed(0)
        config = MoSConfig(r=2, init_lora_weights=False, target_modules=ffn_target_modules(model))
        apply_mos(model, config)
        if name == "bert":
            model.classifier.requires_grad_(True)
        save_adapter(model, folder / f"{name}-mos")
    write_tsv(folder / "rows.tsv", sentences(30))
    return folder


def command(place, name: str, output, **options) -> int:
    given = {
        "model": place / name, "adapter": place / f"{name}-mos", "output": output, "data_file": place / "rows.tsv",
        "text_column": "sentence", "device": "cpu", **options,
    }  # fmt: skip
    arguments = [part for option, value in given.items() for part in (f"--{option.replace('_', '-')}", str(value))]
    return main(["export-lora", *arguments])


def test_of_a_decoder(place, tmp_path, capsys):
    assert command(place, "llama", tmp_path / "lora", rank=2, batch_size=7, target_column="label") == 0
    printed = capsys.readouterr().out
    assert "LoRA of rank 2 on 6 linears" in printed and "loss" in printed and "PeftModel.from_pretrained" in printed
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["task_type"], config["r"]) == ("LORA", "CAUSAL_LM", 2)
    assert config["base_model_name_or_path"] == str(place / "llama")


def test_of_a_classifier_with_its_head_and_fewer_rows(place, tmp_path, capsys):
    write_tsv(tmp_path / "more.tsv", sentences(9, seed=1))
    assert (
        command(place, "bert", tmp_path / "lora", label_column="label", rows=12, eval_file=tmp_path / "more.tsv") == 0
    )
    printed = capsys.readouterr().out
    assert "accuracy" in printed and "over 9 predictions" in printed
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS" and "classifier" in config["modules_to_save"]
    assert command(place, "bert", tmp_path / "without") == 0
    assert "no loss: the batches have no labels" in capsys.readouterr().out


def test_distillation(place, tmp_path, capsys):
    assert command(place, "bert", tmp_path / "lora", distill_steps=3, learning_rate=1e-3, rank=2) == 0
    assert "distilled in 3 steps: KL(mixture, LoRA)" in capsys.readouterr().out
    assert "distilled in 3 steps" in (tmp_path / "lora" / "README.md").read_text()


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("llama", {"rank": 0}, "rank=0"),
        ("llama", {"distill_steps": -1}, "distill_steps=-1 must be an integer of at least 0"),
        ("llama", {"distill_steps": 1, "learning_rate": -1.0}, "learning_rate=-1.0 must be a positive number"),
        ("llama", {"rows": 0}, "--rows 0 must be at least 1"),
        ("llama", {"adapter": "nowhere"}, "nowhere"),
        ("llama", {"data_file": "nowhere.tsv"}, "nowhere.tsv: no such file"),
        ("llama", {"text_column": "words"}, "there is no column 'words'"),
        ("llama", {"label_column": "label"}, "--label-column does not go with a LlamaForCausalLM"),
        ("bert", {"target_column": "label"}, "--target-column does not go with a BertForSequenceClassification"),
        ("bert", {"label_column": "sentence"}, "the adapter is for 2 classes, and"),
        ("llama", {"model": "./nowhere"}, "nowhere"),
        ("llama", {"max_length": 0}, "--max-length 0 must be at least 1"),
        ("llama", {"eval_file": "nowhere.tsv"}, "nowhere.tsv: no such file"),
        ("bert", {"model": "other"}, "llama"),
    ],
)  # fmt: skip
def test_bad_input_is_said_and_nothing_is_written(place, name, options, message, tmp_path, capsys):
    if options.get("model") == "other":
        options = {"model": place / "llama"}
    assert command(place, name, tmp_path / "lora", **options) == 2
    assert "error: " in (error := capsys.readouterr().err) and message in error
    assert not (tmp_path / "lora").exists()


def test_an_output_that_is_there_is_left_alone(place, tmp_path, capsys):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "mine").write_text("mine")
    assert command(place, "llama", tmp_path / "lora") == 2
    assert "is there already" in capsys.readouterr().err and (tmp_path / "lora" / "mine").read_text() == "mine"
