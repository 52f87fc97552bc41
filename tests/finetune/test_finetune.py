"""`python -m mos_kernels finetune`, end to end in this process, on tiny models."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from finetune_setup import run, save_bert, save_llama, sentences, strings, write_tsv
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

from mos_kernels.config import MoSConfig
from mos_kernels.finetune import FinetuneError, finetune, results
from mos_kernels.finetune.options import FLAGS, parse
from mos_kernels.finetune.training import classification_scores
from mos_kernels.huggingface import apply_mos, load_adapter, save_adapter

FAST = ("--batch-size", 10, "--epochs", 2, "--learning-rate", 1e-2, "--logging-steps", 1)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    write_tsv(folder / "train.tsv", sentences(40))
    write_tsv(folder / "near.tsv", sentences(9, seed=1))
    write_tsv(folder / "far.tsv", sentences(14, seed=2))
    return folder


def classify(bert, files, output, *more):
    evaluation = ("--eval-file", files / "near.tsv", files / "far.tsv")
    text = ("--text-column", "sentence", "--label-column", "label")
    return run(
        "--model", bert, "--train-file", files / "train.tsv", *evaluation, *text, "--output", output, *FAST, *more
    )


def metrics_of(output):
    return json.loads((output / "metrics.json").read_text())


@pytest.fixture(scope="module")
def mos_run(bert, files, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "mos"
    assert (
        classify(
            bert,
            files,
            output,
            "--r",
            2,
            "--spaces",
            "hyperbolic=1,spherical=1,euclidean=1",
            "--num-experts-per-tok",
            2,
        )
        == 0
    )
    return output


def test_mos_writes_adapter_metrics_log_and_report(mos_run):
    metrics = metrics_of(mos_run)
    assert metrics["settings"]["method"] == "mos" and metrics["settings"]["adapter"]["r"] == 2
    assert metrics["steps"] == 8 and [e["step"] for e in metrics["evaluations"]] == [4, 8]
    assert metrics["final"] == metrics["evaluations"][-1]
    assert metrics["parameters"]["head"] == 16 * 2 + 2
    adapter = load_file(mos_run / "adapter" / "adapter_model.safetensors")
    assert metrics["parameters"]["trained"] == sum(tensor.numel() for tensor in adapter.values())
    assert metrics["versions"]["torch"] == torch.__version__ and metrics["memory"]["peak_rss_mib"] > 50

    log = [json.loads(line) for line in (mos_run / "log.jsonl").read_text().splitlines()]
    curvatures = [entry["curvature"] for entry in log if "curvature" in entry]
    assert [entry["step"] for entry in log if "curvature" in entry] == list(range(9))
    assert set(curvatures[0]) == set(metrics["linears"]) and len(metrics["linears"]) == 4
    assert all(values == [-0.3, 0.3, 0.0] for values in curvatures[0].values())
    assert all(values[2] == 0 and values[0] != -0.3 != values[1] for values in curvatures[-1].values())
    assert [e["seconds"] for e in log] == sorted(e["seconds"] for e in log)
    for summary in metrics["routing"].values():
        assert math.isclose(sum(summary["share"]), 1, rel_tol=1e-5)
    names = {"report.html", *(f"report-{chart}.svg" for chart in ("loss", "curvature", "routing"))}
    assert names < {path.name for path in mos_run.iterdir()}


def test_rows_that_training_drops_are_evaluated(bert, files, tmp_path):
    options = ("--dataloader_drop_last", "true", "--eval-batch-size", 4, "--max-steps", 1, "--r", 2)
    assert classify(bert, files, tmp_path / "out", *options) == 0
    assert len((tmp_path / "out" / "predictions.jsonl").read_text().splitlines()) == 9 + 14


@pytest.mark.budget(6)
def test_rows_without_tokens_are_said(files, tmp_path, capsys):
    """A tokenizer that adds no tokens of its own makes none of a blank."""
    llama = save_llama(tmp_path / "llama")
    settings = json.loads((llama / "tokenizer.json").read_text())
    (llama / "tokenizer.json").write_text(json.dumps({**settings, "post_processor": None}))
    write_tsv(tmp_path / "blank.tsv", [("no", " "), ("yes", "the cat"), ("no", " ")])
    rows = ("--train-file", files / "train.tsv", "--eval-file", tmp_path / "blank.tsv", "--text-column", "sentence")
    assert run("--model", llama, *rows, "--label-column", "label", "--output", tmp_path / "out") == 2
    assert "error: 2 rows have no tokens: their text is ' ': remove them" in capsys.readouterr().err
    rows = ("--task", "causal-lm", *rows, *FAST)
    assert run("--model", llama, *rows, "--output", tmp_path / "lm") == 0
    assert "note: 2 rows have nothing to learn" in capsys.readouterr().out
    assert run("--model", llama, *rows, "--output", tmp_path / "short", "--max-length", 1) == 2
    assert "error: no row is left: raise --max-length" in capsys.readouterr().err


def test_pooled_metrics_are_over_all_rows(mos_run):
    metrics = metrics_of(mos_run)
    near, far, final = metrics["final"]["files"]["near"], metrics["final"]["files"]["far"], metrics["final"]
    assert metrics["data"]["eval_rows"] == {"near": 9, "far": 14}
    for key in ("loss", "accuracy"):
        assert math.isclose(final[key], (9 * near[key] + 14 * far[key]) / 23, rel_tol=1e-9)


def predictions(model, tokenizer, texts):
    with torch.no_grad():
        return model.eval()(**tokenizer(texts, padding=True, return_tensors="pt")).logits


def test_the_saved_adapter_predicts_what_was_measured(mos_run, bert, files):
    metrics, rows = metrics_of(mos_run), sentences(14, seed=2)
    model = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2)
    load_adapter(model, mos_run / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(mos_run / "adapter")
    logits = predictions(model, tokenizer, [text for _, text in rows]).numpy()
    written = [json.loads(line) for line in (mos_run / "predictions.jsonl").read_text().splitlines()]
    assert [(row["file"], row["target"], row["text"]) for row in written[9:]] == [("far", *row) for row in rows]
    np.testing.assert_allclose([row["logits"] for row in written[9:]], logits, rtol=1e-4, atol=1e-6)
    labels = np.array([metrics["data"]["classes"].index(label) for label, _ in rows])
    scores = classification_scores(logits, labels)
    assert math.isclose(scores["exact_loss"], metrics["final"]["files"]["far"]["loss"], rel_tol=1e-5)
    assert scores["accuracy"] == metrics["final"]["files"]["far"]["accuracy"]


@pytest.mark.parametrize("method", ["lora", "dora", "frozen", "full", "hydralora", "mixture_of_lora"])
def test_every_method_trains_the_same_head_on_the_same_data(method, bert, files, tmp_path, mos_run, monkeypatch):
    options = () if method in ("frozen", "full") else ("--r", 2)
    assert classify(bert, files, tmp_path / method, "--method", method, *options) == 0
    metrics, other = metrics_of(tmp_path / method), metrics_of(mos_run)
    assert metrics["parameters"]["head"] == other["parameters"]["head"]
    assert sorted(metrics["linears"]) == ([] if method in ("frozen", "full") else sorted(other["linears"]))
    is_mos = method in ("hydralora", "mixture_of_lora")
    assert (tmp_path / method / "report-routing.svg").exists() == is_mos == bool(metrics["routing"])
    if method == "full":
        assert metrics["parameters"]["trained"] == metrics["parameters"]["total"]
    first, theirs = (
        json.loads((run / "log.jsonl").read_text().splitlines()[1]) for run in (tmp_path / method, mos_run)
    )
    assert math.isclose(first["loss"], theirs["loss"], rel_tol=1e-5)  # same head, batch and dropout; B is 0
    if method in ("lora", "frozen", "full"):  # what was saved opens as transformers and peft open it
        from peft import PeftModel

        saved = tmp_path / method / "adapter"
        model = AutoModelForSequenceClassification.from_pretrained(bert if method == "lora" else saved, num_labels=2)
        model = PeftModel.from_pretrained(model, saved) if method == "lora" else model
        logits = predictions(model, AutoTokenizer.from_pretrained(saved), [text for _, text in sentences(14, seed=2)])
        labels = np.array([metrics["data"]["classes"].index(label) for label, _ in sentences(14, seed=2)])
        loss = classification_scores(logits.numpy(), labels)["exact_loss"]
        assert math.isclose(loss, metrics["final"]["files"]["far"]["loss"], rel_tol=1e-5)


def greedy_is_right(model, tokenizer, row) -> bool:
    """Whether greedy decoding of the prompt gives the completion, token by token."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    prompt = tokenizer(row["prompt"])["input_ids"] if "prompt" in row else []
    text = row["prompt"] + row["completion"] if prompt else row["text"]
    whole = tokenizer(text + tokenizer.eos_token)["input_ids"]
    start = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt)) or 1
    with torch.no_grad():
        right = model(input_ids=torch.tensor([whole])).logits[0, :-1].argmax(-1) == torch.tensor(whole[1:])
    return bool(right[start - 1 :].all())


@pytest.mark.parametrize("method", ["mos", "lora"])
@pytest.mark.parametrize("target", [True, False])
def test_causal_language_model(method, target, llama, files, tmp_path):
    columns = ("--text-column", "sentence", *(("--target-column", "label", "--separator", " ") if target else ()))
    source = ("--dataset", files / "train.tsv", "--eval-size", 0.25, "--split-seed", 3)
    task = ("--task", "causal-lm", "--model", llama, "--output", tmp_path / "out")
    assert run(*task, *source, *columns, *FAST, "--method", method, "--r", 2, "--gradient-accumulation", 2) == 0
    metrics = metrics_of(tmp_path / "out")
    assert metrics["data"]["eval_rows"] == {"held_out": 10} and metrics["parameters"]["head"] == 0
    assert math.isclose(metrics["final"]["perplexity"], math.exp(metrics["final"]["loss"]), rel_tol=1e-9)
    assert metrics["evaluations"][0]["loss"] > metrics["final"]["loss"]
    rows = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    tokens = sum(row["tokens"] for row in rows)
    assert math.isclose(
        sum(row["loss"] * row["tokens"] for row in rows) / tokens, metrics["final"]["loss"], rel_tol=1e-6
    )
    if method == "mos":
        model = AutoModelForCausalLM.from_pretrained(llama)
        load_adapter(model, tmp_path / "out" / "adapter")
        assert [row["exact_match"] for row in rows] == [greedy_is_right(model.eval(), llama, row) for row in rows]
        assert len(metrics["routing"]) == 2  # a router for each FFN block


def test_accumulated_batches_count_as_one(bert, files, tmp_path):
    for name, more in (("whole", ()), ("halves", ("--batch-size", 5, "--gradient-accumulation", 2))):
        assert classify(bert, files, tmp_path / name, "--method", "frozen", "--max-steps", 1, *more) == 0
    whole, halves = (
        json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[1]) for name in ("whole", "halves")
    )
    assert math.isclose(whole["loss"], halves["loss"], rel_tol=0.01)  # up to dropout
    assert math.isclose(whole["grad_norm"], halves["grad_norm"], rel_tol=0.2)


@pytest.mark.budget(8)
def test_gradient_checkpointing_changes_nothing(llama, files, tmp_path):
    task = (
        "--task",
        "causal-lm",
        "--model",
        llama,
        "--dataset",
        files / "train.tsv",
        "--eval-size",
        4,
        "--text-column",
        "sentence",
    )
    for name, more in (("plain", ()), ("recomputed", ("--gradient-checkpointing",))):
        assert run(*task, *FAST, "--max-steps", 3, "--r", 2, "--output", tmp_path / name, *more) == 0
    plain, recomputed = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("plain", "recomputed")
    )
    for name, tensor in plain.items():
        torch.testing.assert_close(recomputed[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.budget(8)
def test_json_pairs_and_renamed_labels(bert, tmp_path, capsys):
    rows = [{"Body": text, "Question": "cat or dog", "Type": label} for label, text in sentences(40)]
    rows[3]["Type"] = "noo"
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    base = ("--model", bert, "--train-file", tmp_path / "rows.json", "--eval-size", 0.3, "--label-column", "Type")
    columns = ("--text-column", "Body", "Question")
    assert run(*base, *columns, *FAST, "--output", tmp_path / "as-is") == 2
    assert "merge rare classes with --rename-label" in capsys.readouterr().err
    renamed = ("--rename-label", "noo=no")
    assert run(*base, *columns, *renamed, *FAST, "--max-steps", 2, "--output", tmp_path / "renamed") == 0
    assert metrics_of(tmp_path / "renamed")["data"]["classes"] == ["no", "yes"]


def test_a_file_without_a_header(bert, tmp_path):
    (tmp_path / "t.tsv").write_text("".join(f'gj04\t{label}\t*\t{text} "cat\n' for label, text in sentences(20)))
    base = ("--model", bert, "--train-file", tmp_path / "t.tsv", "--eval-file", tmp_path / "t.tsv", "--max-steps", 1)
    columns = ("--column-names", "source,label,mark,sentence", "--text-column", "sentence", "--label-column", "label")
    assert run(*base, *columns, *FAST, "--output", tmp_path / "out") == 0
    assert metrics_of(tmp_path / "out")["data"]["eval_rows_also_in_train"] == 20


# errors, all before a model is loaded


ERRORS = [
    (("--train-file", "{}/missing.tsv"), "missing.tsv: no such file"),
    (("--label-column", "lable"), "line 2: there is no column 'lable'; the columns are: label, sentence"),
    (("--text-column", "text"), "line 2: there is no column 'text'; the columns are: label, sentence"),
    (("--eval-file", "{}/unseen.tsv"), "unseen.tsv, line 2: the label 'maybe' does not occur in the training data"),
    (("--eval-file", "{}/broken.jsonl"), "broken.jsonl, line 2"),
    (("--eval-file", "{}/half.jsonl"), "half.jsonl, line 1: not text"),
    (("--eval-file", "{}/empty.tsv"), "there are no rows"),
    (("--eval-file", "{}/near.tsv"), "names the same file twice"),
    (("--eval-file", "{}/return.tsv"), "return.tsv, line 2: not readable as CSV: a carriage return that ends no line"),
    (("--eval-size", 0.3), "--eval-file, --eval-size exclude each other"),
    (("--dataset", "glue"), "either --dataset or --train-file"),
    (("--split-seed", 1), "--split-seed has no effect here: give --eval-size"),
    (("--target-column", "label"), "--target-column has no effect here: it is for causal-lm"),
    (("--separator", " "), "--separator has no effect here: give --target-column"),
    (("--train-split", "train"), "--train-split has no effect here: give --dataset"),
    (("--task", "causal-lm"), "--label-column has no effect here"),
    (("--rename-label", "nope=no"), "is not OLD=NEW with OLD one of no, yes"),
    (("--rename-label", "no=a", "no=b"), "--rename-label names no more than once"),
    (("--max-steps", 0), "--max-steps 0 must be positive"),
    (
        ("--eval-steps", 2, "--eval-strategy", "epoch"),
        "--eval-steps has no effect with --eval-strategy epoch: drop one",
    ),
    (("--save-steps", 2, "--save-strategy", "no"), "--save-steps has no effect with --save-strategy no: drop one"),
    (("--warmup-ratio", 2), "argument --warmup-ratio: invalid ratio value: '2'"),
    (("--batch-size", 0), "--per-device-train-batch-size 0 must be positive"),
    (("--learning-rate", -1), "--learning-rate -1 must be positive"),
    (("--learning-rate", "inf"), "--learning-rate inf must be a finite number"),
    (("--epochs", "inf"), "--num-train-epochs inf must be a finite number"),
    (("--eval-size", "nan"), "--eval-size nan must be a finite number"),
    (("--eval-size", 3.5), "--eval-size 3.5 is neither a share below 1 nor a whole number"),
    (("--seed", 2**32), "--seed 4294967296 must be in [0, 2^32)"),
    (("--data-seed", -1), "--data-seed -1 must be in [0, 2^32)"),
    (("--split-seed", -1), "--split-seed -1 must be in [0, 2^32)"),
    (("--torch-compile-mode", "fast"), "--torch-compile-mode 'fast' is none of default, "),
    (("--torch-compile-backend", "inducter"), "--torch-compile-backend 'inducter' is none of "),
    (("--dtype", "float16"), "float16 trains on CUDA only"),
    (("--dtype", "int8"), "invalid choice: 'int8'"),
    (("--optim", "adamv"), "adamv"),
    (("--packing", "true"), "unrecognized arguments: --packing"),
    (("--do-predict",), "--do-predict: the command trains"),
    (("--bf16_full_eval", "true"), "--bf16-full-eval: the command trains, and evaluates each row by itself, with the"),
    (("--remove_unused_columns", "false"), "--remove-unused-columns: the command trains"),
    (("--eval_do_concat_batches", "false"), "--eval-do-concat-batches: the command trains"),
    (("--label_names", "label"), "--label-names: the command trains"),
    (("--adam_beta2", 1), "--adam-beta2 1 must be from 0 to below 1"),
    (("--model", "{}/nowhere"), "no such folder"),
    (("--model", "{}"), "holds no config.json"),
    (("--max-length", 1000), "--max-length 1000 exceeds the 64 tokens"),
    (("--resume_from_checkpoint", "{}"), "is no complete checkpoint"),
    (("--r", 0), "r=0 must be an integer from 1 to"),
    (("--r", 2, 3), "unrecognized arguments: 3"),
    (("--num-experts-per-tok", 9), "exceeds the 8 experts"),
    (("--spaces", "flat=3"), "unknown geometries ['flat']"),
    (("--num-experts", 4), "--num-experts has no effect here: give --spaces"),
    (("--method", "qlora"), "--method qlora is none of frozen, full, mos, hydralora, mixture_of_lora, lora, dora"),
    (("--method", "lora", "--spaces", "hyperbolic=1", "--no-share-a"), "--spaces, --share-a: no effect with this"),
    (("--method", "dora", "--preset", "paper"), "--preset has no effect here: give --method mos"),
    (("--method", "frozen", "--r", 4), "--r: no effect with this method, which trains no adapter"),
    (("--method", "hydralora", "--curvature-init", 1), "--curvature-init: no effect with this method, where every"),
    (("--no-learn-curvature", "--curvature-lr-ratio", 3), "--curvature-lr-ratio: no effect with this method"),
    (("--mapping", "exp_log", "--domain", "raw"), "--domain: no effect with this method"),
]


@pytest.mark.parametrize(("options", "message"), ERRORS, ids=[" ".join(map(str, options)) for options, _ in ERRORS])
def test_bad_input_is_said_before_a_model_is_loaded(options, message, bert, files, tmp_path, capsys, monkeypatch):
    write_tsv(files / "unseen.tsv", [("maybe", "a cat")])
    write_tsv(files / "empty.tsv", [])
    (files / "broken.jsonl").write_text('{"label": "no", "sentence": "a"}\n{"label"\n')
    (files / "return.tsv").write_bytes(b"label\tsentence\nno\ta\rb\n")
    (files / "half.jsonl").write_text('{"label": "no", "sentence": "a \\ud83d"}\n')
    monkeypatch.setattr("mos_kernels.finetune._load_model", lambda *a: pytest.fail("a model was loaded"))
    options = [str(option).format(files) if "{}" in str(option) else option for option in options]
    if "--train-file" in options:  # replaces the file that is always given
        base = ("--eval-file", files / "near.tsv")
    else:
        base = ("--train-file", files / "train.tsv", "--eval-file", files / "near.tsv")
    common = ("--model", bert, "--text-column", "sentence", "--label-column", "label", "--output", tmp_path / "out")
    assert run(*common, *base, *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and len(error) < 700, error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("task", ["classification", "causal-lm"])
def test_help_shows_one_value_where_one_is_taken(task, capsys):
    with pytest.raises(SystemExit):
        run("--task", task, "--help")
    usage, _, options = capsys.readouterr().out.partition("\n\n")
    options = " ".join(options.split())
    assert "--model MODEL --output FOLDER" in usage and len(usage) < 300
    assert f"the options of {'SFTConfig' if task == 'causal-lm' else 'TrainingArguments'};" in options
    assert " --r R " in options and " --length_unit LENGTH_UNIT, --length-unit LENGTH_UNIT " in options
    assert " --layers_to_transform LAYERS_TO_TRANSFORM [LAYERS_TO_TRANSFORM ...]" in options


def test_a_report_that_needs_another_package(bert, files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: False)
    assert classify(bert, files, tmp_path / "out", "--report_to", "wandb") == 2
    assert "error: --report_to: WandbCallback requires wandb to be installed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_needs_the_model_is_said_before_training(bert, files, tmp_path, capsys):
    assert classify(bert, files, tmp_path / "a", "--target-modules", "gate_proj", "up_proj") == 2
    assert "match nothing in BertForSequenceClassification" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
    base = ("--task", "causal-lm", "--dataset", files / "train.tsv", "--eval-size", 4, "--text-column", "sentence")
    assert run("--model", bert, *base, "--output", tmp_path / "b") == 2
    assert "no causal language model" in capsys.readouterr().err


def test_a_model_with_an_adapter_in_its_folder_is_refused(llama, files, tmp_path, capsys):
    """transformers loads both, and the new adapter would take the place of the one that is there."""
    model = AutoModelForCausalLM.from_pretrained(llama)
    shutil.copytree(llama, tmp_path / "both")
    apply_mos(model, MoSConfig(r=2))
    save_adapter(model, tmp_path / "both")
    base = ("--task", "causal-lm", "--train-file", files / "train.tsv", "--eval-size", 4, "--text-column", "sentence")
    assert run("--model", tmp_path / "both", *base, "--output", tmp_path / "out") == 2
    assert "both holds an adapter too (adapter_config.json), which the new one would" in capsys.readouterr().err


def test_the_metric_of_the_best_model(bert, files, tmp_path, capsys):
    best = ("--load_best_model_at_end", "--metric_for_best_model")
    assert classify(bert, files, tmp_path / "a", *best, "f1") == 2
    message = "--metric_for_best_model f1 is none of loss, accuracy, matthews_correlation, near/loss, near/accuracy"
    assert message in capsys.readouterr().err and not (tmp_path / "a").exists()
    assert classify(bert, files, tmp_path / "b", *best, "far/accuracy", "--max-steps", 1) == 0
    common = ("--model", "m", "--output", "o", "--task", "causal-lm", "--train-file", "f", "--eval-size", 1)
    for metric, greater in (("perplexity", False), ("eval_perplexity", False), ("loss", False), ("exact_match", True)):
        _, arguments, _, _ = parse(strings(*common, *best, metric), {})
        assert arguments.greater_is_better is greater
    _, arguments, _, _ = parse(strings(*common, *best, "perplexity", "--greater_is_better", "true"), {})
    assert arguments.greater_is_better is True


def test_an_unreachable_hub_is_said_with_the_remedy(files, bert, tmp_path, capsys, monkeypatch):
    base = ("--text-column", "sentence", "--label-column", "label", "--output", tmp_path / "out")
    assert run("--model", "nobody/no-such-model", "--dataset", files / "train.tsv", "--eval-size", 0.2, *base) == 2
    assert "give --model a local folder" in capsys.readouterr().err
    for name in ("nobody/no-such-data", "./no-such-folder"):
        assert run("--model", bert, "--dataset", name, "--eval-split", "test", *base) == 2
        error = capsys.readouterr().err
        assert f"--dataset {name}, split train cannot be read" in error and "give --train-file" in error


def test_a_batch_size_that_is_found_is_in_the_results_and_the_log_is_of_its_run_alone(bert, files, tmp_path):
    class OutOfMemory(TrainerCallback):
        happened = False

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2 and not self.happened:
                self.happened = True
                raise RuntimeError("CUDA out of memory.")

    options = ("--model", bert, "--train-file", files / "train.tsv", "--eval-file", files / "near.tsv", *FAST)
    options += ("--text-column", "sentence", "--label-column", "label", "--output", tmp_path / "out", "--r", 2)
    finetune(strings(*options, "--auto_find_batch_size", "true", "--max-steps", 3), callbacks=[OutOfMemory()])
    metrics, log = metrics_of(tmp_path / "out"), (tmp_path / "out" / "log.jsonl").read_text().splitlines()
    assert metrics["settings"]["per_device_train_batch_size"] < 10
    assert [json.loads(line)["step"] for line in log] == [0, 1, 2, 3, 3]


# output folder


def test_an_output_folder_is_never_overwritten_by_accident(bert, files, tmp_path, capsys):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("precious")
    assert classify(bert, files, tmp_path / "notes", "--max-steps", 1) == 2
    assert "is not empty" in capsys.readouterr().err
    assert classify(bert, files, tmp_path / "notes", "--max-steps", 1, "--overwrite") == 2
    assert "holds no run of this command" in capsys.readouterr().err
    (tmp_path / "notes" / "settings.json").write_text("[1]")
    assert classify(bert, files, tmp_path / "notes", "--max-steps", 1, "--overwrite") == 2
    (tmp_path / "notes" / "settings.json").unlink()
    assert classify(bert, files, tmp_path / "run", "--max-steps", 1, "--method", "frozen") == 0
    (tmp_path / "run" / "mine.txt").write_text("precious")
    assert classify(bert, files, tmp_path / "run", "--max-steps", 1, "--method", "frozen") == 2
    assert classify(bert, files, tmp_path / "run", "--max-steps", 2, "--method", "frozen", "--overwrite") == 0
    assert metrics_of(tmp_path / "run")["steps"] == 2
    assert (tmp_path / "run" / "mine.txt").read_text() == (tmp_path / "notes" / "mine.txt").read_text() == "precious"
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.parametrize("method", ["mos", "lora", "frozen"])
def test_what_is_not_finite_is_not_saved(method, bert, files, tmp_path, capsys):
    options = ("--learning-rate", 1e30, "--max-grad-norm", 0, "--method", method, "--max-steps", 3)
    assert classify(bert, files, tmp_path / "out", *options, "--logging-steps", 10) == 1
    error = capsys.readouterr().err
    assert "lower --learning-rate" in error and ("not finite" in error or "is nan" in error or "is inf" in error)
    assert not (tmp_path / "out" / "adapter").exists() and not (tmp_path / "out" / "metrics.json").exists()


def test_a_loss_that_is_not_finite_stops_the_run_where_it_is_seen(bert, files, tmp_path, capsys):
    options = ("--learning-rate", 1e30, "--max-grad-norm", 0, "--method", "frozen", "--epochs", 9)
    assert classify(bert, files, tmp_path / "out", *options) == 1
    assert "the training loss is nan at step" in capsys.readouterr().err


# options and scores


def adapter(*more):
    required = ("--model", "m", "--output", "o", "--text-column", "t", "--label-column", "l", "--train-file", "f")
    return parse(strings(*required, "--eval-size", 0.3, *more), {})


def test_there_is_an_option_for_every_field_of_the_config():
    values = {
        "r": ("4", 4), "lora_alpha": ("8", 8.0), "lora_dropout": ("0.1", 0.1), "use_rslora": (None, True),
        "init_lora_weights": ("gaussian", "gaussian"),
        "spaces": ('{"spherical": 2, "hyperbolic": 1}', {"hyperbolic": 1, "spherical": 2}),
        "num_experts_per_tok": ("2", 2), "norm_topk_prob": (False, False), "router_scope": ("linear", "linear"),
        "router_aux_loss_coef": ("0.1", 0.1), "curvature_init": ("0.5", 0.5), "length_unit": ("2.5", 2.5),
        "learn_curvature": (None, True), "curvature_lr_ratio": ("3", 3.0), "curvature_max_grad_norm": ("1", 1.0),
        "share_a": (False, False), "activation": ("tanh", "tanh"), "mapping": ("exp/log", "exp_log"),
        "domain": ("raw", "raw"), "boundary_eps": ("0.01", 0.01), "target_modules": ("a.*b", "a.*b"),
        "exclude_modules": ("c", ("c",)), "layers_to_transform": ("1", (1,)), "layers_pattern": ("layers", ("layers",)),
        "rank_pattern": ("a=2,b=3", {"a": 2, "b": 3}), "alpha_pattern": ('{"a": 2.5}', {"a": 2.5}),
        "spaces_pattern": ('{"a|b": {"euclidean": 1}}', {"a|b": {"euclidean": 1}}),
    }  # fmt: skip
    assert set(values) == set(MoSConfig.__dataclass_fields__)
    for name, (text, value) in values.items():
        flag = "--" + name.replace("_", "-")
        option = [flag] if text is None else [flag.replace("--", "--no-")] if text is False else [flag, text]
        extra = ("--layers-to-transform", "1") if name == "layers_pattern" else ()
        extra = ("--num-experts-per-tok", "2") if name == "spaces" else extra
        assert getattr(adapter(*option, *extra)[2], name) == value, name


@pytest.mark.parametrize(
    ("flag", "text", "value"),
    [
        ("--lora-dropout", ".1", 0.1), ("--curvature-init", "1.", 1.0), ("--curvature-max-grad-norm", "None", None),
        ("--curvature-max-grad-norm", "null", None), ("--layers-to-transform", "none", None),
    ],
)  # fmt: skip
def test_a_value_may_be_spelled_as_in_python(flag, text, value):
    assert getattr(adapter(flag, text)[2], flag[2:].replace("-", "_")) == value


def test_the_defaults_are_those_of_the_papers_and_every_flag_of_a_trainer_is_there():
    options, arguments, config, targets_given = adapter()
    assert config == MoSConfig() and not targets_given and options.method == "mos"
    assert (arguments.learning_rate, arguments.num_train_epochs, arguments.warmup_steps) == (3e-4, 3, 0.1)
    assert arguments.train_batch_size == 32 and arguments.save_strategy == arguments.eval_strategy == "epoch"
    assert adapter("--preset", "paper")[2] == MoSConfig.paper()
    assert adapter("--method", "hydralora", "--num-experts", 4)[2] == MoSConfig.hydralora(4)
    arguments = adapter("--report_to", "tensorboard", "--eval-steps", 5, "--optim", "sgd", "--torch-compile", "false")[
        1
    ]
    assert arguments.report_to == ["tensorboard"] and arguments.optim == "sgd"
    assert (arguments.save_strategy, arguments.save_steps) == ("steps", 5)
    aliases = ("--batch-size", 3, "--epochs", 2, "--gradient-accumulation", 4, "--group-by-length", "--data-seed", 7)
    arguments = adapter(*aliases, "--lr-scheduler", "cosine", "--warmup-ratio", 0)[1]
    found = (arguments.per_device_train_batch_size, arguments.num_train_epochs, arguments.gradient_accumulation_steps)
    assert found == (3, 2, 4) and arguments.lr_scheduler_type == "cosine" and arguments.warmup_steps == 0
    name, value = FLAGS["--group-by-length"]
    assert getattr(arguments, name) == value and arguments.data_seed == 7
    lm = ("--task", "causal-lm", "--model", "m", "--output", "o", "--train-file", "f", "--eval-size", 2)
    arguments = parse(strings(*lm, "--packing", "--assistant_only_loss", "--router-aux-loss-coef", 0.5), {})[1]
    assert arguments.packing and arguments.assistant_only_loss and arguments.eval_packing is False


@pytest.mark.parametrize(
    "text", ["hyperbolic", "hyperbolic=", "=", "hyperbolic=1,hyperbolic=2", '{"a": 1', '{"a": 1, "a": 2}']
)
def test_a_mapping_that_cannot_be_read_is_refused(text):
    with pytest.raises(FinetuneError, match="--spaces .* is not NAME=NUMBER"):
        adapter("--spaces", text)


@pytest.mark.parametrize("where", ["file/out", "/proc/none/out"])
def test_an_output_folder_that_cannot_be_written(where, bert, files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mos_kernels.finetune._load_model", lambda *a: pytest.fail("a model was loaded"))
    (tmp_path / "file").write_text("")
    assert classify(bert, files, tmp_path / where) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_full_disk_ends_the_run_with_a_message_and_nothing_half_written(bert, files, tmp_path, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mos_kernels.finetune.results._predictions", full)
    assert classify(bert, files, tmp_path / "out", "--method", "frozen", "--max-steps", 1) == 1
    assert "error: [Errno 28] No space left on device" in capsys.readouterr().err
    assert not (tmp_path / "out" / "metrics.json").exists() and not list((tmp_path / "out").glob("predictions*"))


@pytest.mark.budget(15)  # a process of its own
def test_classes_that_the_terminal_has_no_letters_for(bert, tmp_path):
    rows = [("好" if i % 2 else "坏", f"a cat {i}") for i in range(12)]
    source = ("--model", bert, "--train-file", write_tsv(tmp_path / "t.tsv", rows), "--eval-size", 4)
    columns = ("--text-column", "sentence", "--label-column", "label", "--output", tmp_path / "out", "--max-steps", 1)
    command = [sys.executable, "-m", "mos_kernels", "finetune", *strings(*source, *columns, "--method", "frozen")]
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "classes: \\u574f (4), \\u597d (4)" in done.stdout, done.stderr
    assert metrics_of(tmp_path / "out")["data"]["classes"] == ["坏", "好"]


def test_an_option_whose_package_is_not_installed(bert, files, tmp_path, capsys, monkeypatch):
    def missing(*args, **kwargs):
        raise ImportError("liger-kernel is not available. Please install it")

    monkeypatch.setattr("transformers.Trainer.train", missing)
    assert classify(bert, files, tmp_path / "out") == 2
    assert "error: liger-kernel is not available. Please install it" in capsys.readouterr().err


def test_a_system_that_does_not_tell_the_memory(bert, files, tmp_path, monkeypatch):
    """Windows has no module `resource`."""
    with monkeypatch.context() as hidden:
        hidden.setitem(sys.modules, "resource", None)
        spec = importlib.util.spec_from_file_location("without_resource", results.__file__)
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
    monkeypatch.setattr(results, "resource", loaded.resource)
    assert classify(bert, files, tmp_path / "out", "--max-steps", 1) == 0
    assert loaded.resource is None and metrics_of(tmp_path / "out")["memory"] == {}
