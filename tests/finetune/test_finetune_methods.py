"""AdaLoRA, batches of like lengths, and methods of the caller's own, through the finetune command."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from finetune_setup import KillAt, Killed, parse, run, save_bert, sentences, write_tsv
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from mos_kernels import finetune
from mos_kernels.finetune.adalora import schedule
from mos_kernels.finetune.model import Method
from mos_kernels.finetune.trainer import FinetuneTrainer

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run of 16 steps, 8 an epoch, with a checkpoint every 6: the second is in the middle of an epoch."""
    folder = tmp_path_factory.mktemp("methods")
    rows = write_tsv(folder / "train.tsv", sentences(40)), write_tsv(folder / "test.tsv", sentences(10, seed=1))
    source = ("--model", save_bert(folder / "bert"), "--train-file", rows[0], "--eval-file", rows[1])
    columns = ("--text-column", "sentence", "--label-column", "label", "--batch-size", 5, "--epochs", 2)
    return (*source, *columns, "--eval-steps", 6, "--logging-steps", 1, "--learning-rate", 1e-1, "--quiet")


def killed_and_resumed(step, output, *arguments):
    arguments = (*arguments, "--output", output, "--no-plots")
    with pytest.raises(Killed):
        finetune.run(parse("--device", "cpu", *arguments), callbacks=[KillAt(step)])
    assert not (output / "metrics.json").exists()
    assert run(*arguments, "--resume") == 0


def losses(output):
    entries = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in entries if "loss" in entry]


def weights(output):
    return load_file(output / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def adalora(base, tmp_path_factory):
    output = tmp_path_factory.mktemp("adalora") / "run"
    assert run(*base, "--method", "adalora", "--r", 2, "--output", output, "--no-plots") == 0
    return output


def test_adalora_takes_ranks_away_until_r_is_left_on_average(adalora):
    metrics = json.loads((adalora / "metrics.json").read_text())
    config = json.loads((adalora / "adapter" / "adapter_config.json").read_text())
    schedule = {"target_r": 2, "init_r": 3, "tinit": 1, "tfinal": 5, "total_step": 16}
    assert {name: config[name] for name in schedule} == schedule
    assert len(config["rank_pattern"]) == len(metrics["linears"]) == 4
    assert sum(sum(kept) for kept in config["rank_pattern"].values()) == 2 * 4
    values = [tensor for name, tensor in weights(adalora).items() if "lora_E" in name]
    assert sum(len(value) for value in values) == 8 and all((value != 0).all() for value in values)


def test_the_saved_adalora_predicts_what_was_measured(adalora, base):
    from peft import PeftModel

    model = AutoModelForSequenceClassification.from_pretrained(base[1], num_labels=2)
    model = PeftModel.from_pretrained(model, adalora / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(adalora / "adapter")
    rows = [json.loads(line) for line in (adalora / "predictions.jsonl").read_text().splitlines()]
    with torch.no_grad():
        logits = model(**tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")).logits
    np.testing.assert_allclose([row["logits"] for row in rows], logits.numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("step", [3, 14])
@pytest.mark.full
def test_adalora_resumes_with_the_ranks_and_averages_it_had(step, adalora, base, tmp_path):
    killed_and_resumed(step, tmp_path / "run", *base, "--method", "adalora", "--r", 2)
    assert losses(tmp_path / "run") == losses(adalora)
    for name, tensor in weights(adalora).items():
        assert torch.equal(weights(tmp_path / "run")[name], tensor), name


def test_adalora_refuses_what_has_no_effect_on_it(base, tmp_path, capsys):
    arguments = (*base, "--method", "adalora", "--output", tmp_path / "run")
    assert run(*arguments, "--use-rslora", "--rank-pattern", "dense=2") == 2
    assert "--use-rslora, --rank-pattern: no effect with --method adalora" in capsys.readouterr().err
    assert run(*arguments, "--max-steps", 3) == 2
    assert "at least 4 steps, and this run has 3" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_rank_schedule_starts_with_more_and_ends_in_time():
    for steps in (4, 5, 66, 804):
        phases = schedule(8, steps)
        assert phases["init_r"] == 12 and phases["tinit"] < steps - phases["tfinal"]


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
    model = AutoModelForSequenceClassification.from_pretrained(base[1], num_labels=2)
    trained = load_file(tmp_path / "run" / "adapter" / "trained.safetensors")
    model.load_state_dict(trained, strict=False)
    tokenizer = AutoTokenizer.from_pretrained(base[1])
    with torch.no_grad():
        logits = model.eval()(**tokenizer([r["text"] for r in rows[0]], padding=True, return_tensors="pt")).logits
    assert logits.std(0).min() > 1e-6  # the rows can be told apart
    for found in rows:
        np.testing.assert_allclose([row["logits"] for row in found], logits.numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.budget(9)
def test_a_method_of_the_callers_own(base, tmp_path, capsys):
    def add(model, config):
        model.bert.encoder.layer[0].lora_shift = torch.nn.Parameter(torch.full((config["r"],), 0.5))
        return ["bert.encoder.layer.0"]

    methods = {"shift": Method(("r", "target_modules"), add)}
    parser_arguments = [str(a) for a in (*base, "--method", "shift", "--output", tmp_path / "run", "--no-plots")]
    parser = finetune.argparse.ArgumentParser()
    finetune.add_arguments(parser, methods)
    assert finetune.run(parser.parse_args([*parser_arguments, "--r", "3"]), methods) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["parameters"]["adapter"] == 3 and metrics["linears"] == ["bert.encoder.layer.0"]
    saved = load_file(tmp_path / "run" / "adapter" / "trained.safetensors")
    assert set(saved) == {"bert.encoder.layer.0.lora_shift", "classifier.weight", "classifier.bias"}
    assert math.isfinite(metrics["final"]["loss"])
    assert finetune.run(parser.parse_args([*parser_arguments, "--lora-alpha", "3"]), methods) == 2
    assert "--lora-alpha: no effect with --method shift" in capsys.readouterr().err
