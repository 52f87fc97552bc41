"""Batches of like lengths, and methods of the caller's own, through the finetune command."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from finetune_setup import KillAt, Killed, run, save_bert, sentences, strings, write_tsv
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from mos_kernels.finetune import FinetuneError, Method, finetune
from mos_kernels.finetune.training import FinetuneTrainer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run of 16 steps, 8 an epoch, with a checkpoint every 6: the second is in the middle of an epoch."""
    folder = tmp_path_factory.mktemp("methods")
    rows = write_tsv(folder / "train.tsv", sentences(40)), write_tsv(folder / "test.tsv", sentences(10, seed=1))
    source = ("--model", save_bert(folder / "bert"), "--train-file", rows[0], "--eval-file", rows[1])
    columns = ("--text-column", "sentence", "--label-column", "label", "--batch-size", 5, "--epochs", 2)
    return (*source, *columns, "--eval-steps", 6, "--logging-steps", 1, "--learning-rate", 1e-1)


def killed_and_resumed(step, output, *arguments):
    arguments = (*arguments, "--output", output, "--no-plots")
    with pytest.raises(Killed):
        finetune(strings(*arguments), callbacks=[KillAt(step)])
    assert not (output / "metrics.json").exists()
    assert run(*arguments, "--resume") == 0


def losses(output):
    entries = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in entries if "loss" in entry]


def weights(output):
    return load_file(output / "adapter" / "adapter_model.safetensors")


def batches_of(monkeypatch, *arguments):
    """The input ids of every training batch of a run."""
    seen, step = [], FinetuneTrainer.training_step

    def training_step(self, model, inputs, *args, **kwargs):
        seen.append(inputs["input_ids"].tolist())
        return step(self, model, inputs, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(FinetuneTrainer, "training_step", training_step)
        assert run(*arguments, "--no-plots") == 0
    return seen


def padding(batches):
    return sum(ids.count(0) for batch in batches for ids in batch)


@pytest.mark.full
def test_like_lengths_share_a_batch_and_every_method_gets_the_same_ones(base, tmp_path, monkeypatch):
    random = batches_of(monkeypatch, *base, "--method", "lora", "--output", tmp_path / "random")
    grouped = {
        method: batches_of(monkeypatch, *base, "--method", method, "--group-by-length", "--output", tmp_path / method)
        for method in ("lora", "mos", "frozen")
    }
    assert grouped["lora"] == grouped["mos"] == grouped["frozen"]
    assert padding(grouped["lora"]) < padding(random)  # within pairs of batches alone, at this size
    epochs = [sorted(filter(None, sum(sum(part, []), []))) for part in (grouped["lora"][:8], grouped["lora"][8:])]
    assert epochs[0] == epochs[1] and grouped["lora"][:8] != grouped["lora"][8:]


@pytest.mark.full
def test_a_run_with_like_lengths_resumes_in_the_middle_of_an_epoch(base, tmp_path):
    arguments = (*base, "--method", "mos", "--r", 2, "--group-by-length")
    assert run(*arguments, "--output", tmp_path / "whole", "--no-plots") == 0
    killed_and_resumed(14, tmp_path / "run", *arguments)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


@pytest.mark.budget(12)
def test_evaluation_keeps_the_order_of_the_data(base, tmp_path):
    arguments = (*base, "--method", "frozen", "--group-by-length", "--no-plots")
    assert run(*arguments, "--eval-batch-size", 3, "--output", tmp_path / "run") == 0
    assert run(*arguments, "--eval-batch-size", 1, "--output", tmp_path / "one") == 0
    rows = [[json.loads(line) for line in (tmp_path / name / "predictions.jsonl").open()] for name in ("run", "one")]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(base[1])
    with torch.no_grad():
        logits = model.eval()(**tokenizer([r["text"] for r in rows[0]], padding=True, return_tensors="pt")).logits
    assert logits.std(0).min() > 1e-6  # the rows can be told apart
    for found in rows:
        np.testing.assert_allclose([row["logits"] for row in found], logits.numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.budget(9)
def test_a_method_of_the_callers_own(base, tmp_path):
    from peft import LoraConfig

    def config(fields, steps):
        seen.append((steps, list(fields["modules_to_save"])))
        return LoraConfig(**fields, lora_bias=True)

    seen, methods = [], {"shift": Method(("r", "target_modules"), config)}
    arguments = strings(*base, "--method", "shift", "--output", tmp_path / "run", "--no-plots", "--r", 3)
    finetune(arguments, methods)
    assert seen == [(16, ["classifier"])] and not (tmp_path / "run" / "report.html").exists()
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["parameters"]["adapter"] == sum(3 * (16 + 32) + d_out for d_out in (16, 32)) * 2
    assert any(name.endswith("lora_B.bias") for name in weights(tmp_path / "run"))
    assert math.isfinite(metrics["final"]["loss"])
    with pytest.raises(FinetuneError, match="--lora-alpha: no effect with this method, which takes --r, --target-modu"):
        finetune([*arguments, "--lora-alpha", "3"], methods)
