"""Chat and prompt-completion data through TRL: what is learned from, packing, the generated answers."""

from __future__ import annotations

import json

import pytest
import torch
from finetune_setup import WORDS, run, save_llama, sentences
from transformers import AutoModelForCausalLM, AutoTokenizer

from mos_kernels.finetune import training

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}not {% generation %}{{ message.content }} [SEP]"
    "{% endgeneration %}{% else %}or {{ message.content }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}not {% endif %}"
)
FAST = ("--batch-size", 4, "--epochs", 1, "--learning-rate", 1e-2, "--logging-steps", 1, "--max-new-tokens", 3)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = save_llama(tmp_path_factory.mktemp("llama"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def turns(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def rows_of(form):
    pairs = [(text, label) for label, text in sentences(16)]
    make = {
        "messages": lambda q, a: {"messages": turns(q, a)},
        "chat prompts": lambda q, a: {"prompt": turns(q, a)[:1], "completion": turns(q, a)[1:]},
        "prompts": lambda q, a: {"prompt": q, "completion": f" {a}"},
        "text": lambda q, a: {"text": f"{q} {a}"},
    }[form]
    return [make(*pair) for pair in pairs]


def finetuned(llama, tmp_path, rows, *more):
    data = written(tmp_path / "rows.jsonl", rows)
    out = tmp_path / "out"
    base = ("--task", "causal-lm", "--model", llama, "--train-file", data, "--eval-size", 4, "--r", 2)
    assert run(*base, *FAST, "--output", out, *more) == 0
    predictions = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    return json.loads((out / "metrics.json").read_text()), predictions


@pytest.mark.parametrize(
    ("form", "more", "learned"),
    [
        ("messages", ("--assistant_only_loss",), 2),
        ("chat prompts", (), 2),
        ("prompts", (), 2),
        ("text", (), None),
    ],
)
@pytest.mark.budget(6)
def test_what_is_learned_from_and_what_is_answered(form, more, learned, llama, tmp_path):
    metrics, predictions = finetuned(llama, tmp_path, rows_of(form), *more)
    assert metrics["data"]["eval_rows"] == {"held_out": 4} and len(predictions) == 4
    if learned is not None:  # the answer and the end of the turn alone
        assert (
            all(row["tokens"] >= 1 for row in predictions) and max(row["tokens"] for row in predictions) <= learned + 1
        )
    else:
        assert all(row["tokens"] > 2 for row in predictions)
    assert all(("generated" in row) == (form != "text") for row in predictions)
    for row in predictions:
        if "generated" in row:
            assert set(row["generated"].split()) <= {*WORDS, "yes", "no", ""} and len(row["generated"].split()) <= 3
    loss = sum(row["loss"] * row["tokens"] for row in predictions) / sum(row["tokens"] for row in predictions)
    assert metrics["final"]["loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.budget(6)
def test_packed_training_evaluates_each_row_by_itself(llama, tmp_path):
    metrics, predictions = finetuned(llama, tmp_path, rows_of("prompts"), "--packing", "--max-length", 32)
    assert len(predictions) == 4 and metrics["steps"] < 3  # the 12 rows alone are 3 steps
    assert all(0 < row["tokens"] <= 3 for row in predictions)


@pytest.mark.budget(8)
def test_sums_of_padded_and_of_padding_free_batches_are_the_same(llama, tmp_path):
    found = []
    for name, more in (("padded", ()), ("packed", ("--packing", "--max-length", 64, "--max-steps", 1))):
        (tmp_path / name).mkdir()
        arguments = ("--learning-rate", 1e-12, "--eval-batch-size", 3, "--max-new-tokens", 0, *more)
        found.append(finetuned(llama, tmp_path / name, rows_of("prompts"), *arguments)[1])
    for one, other in zip(*found, strict=True):
        assert one["prompt"] == other["prompt"] and one["tokens"] == other["tokens"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert "generated" not in one


@pytest.mark.budget(6)
def test_rows_without_anything_to_learn_are_counted_and_left_out(llama, tmp_path, capsys):
    if not hasattr(pytest.importorskip("trl.trainer.sft_trainer"), "add_fused_lm_head"):
        pytest.skip("this TRL keeps such rows")
    long = [{"prompt": "the cat " * 10, "completion": " yes"}] * 3
    rows = written(tmp_path / "test.jsonl", [*long[:1], *rows_of("prompts")[:3]])
    data = written(tmp_path / "train.jsonl", [*long, *rows_of("prompts")])
    base = ("--task", "causal-lm", "--model", llama, "--train-file", data, "--eval-file", rows, *FAST, "--r", 2)
    assert run(*base, "--max-length", 12, "--output", tmp_path / "out") == 0
    assert "note: 4 rows have nothing to learn in their first 12 tokens" in capsys.readouterr().out
    assert len((tmp_path / "out" / "predictions.jsonl").read_text().splitlines()) == 3


def test_chat_without_a_template_says_so(tmp_path, capsys):
    folder = save_llama(tmp_path / "plain")
    rows = written(tmp_path / "rows.jsonl", rows_of("messages"))
    base = ("--task", "causal-lm", "--model", folder, "--train-file", rows, "--eval-size", 4, "--r", 2)
    assert run(*base, "--output", tmp_path / "out") == 2
    assert "the data cannot be prepared" in (error := capsys.readouterr().err) and "chat_template" in error
    assert not (tmp_path / "out").exists()


def test_causal_scores_are_over_tokens():
    sums = torch.tensor([[2.0, 4.0, 0.0], [1.0, 1.0, 1.0]]).numpy()
    scores = training.causal_scores(sums)
    assert scores["exact_loss"] == pytest.approx(0.6) and scores["exact_match"] == 0.5


def test_scores_from_logits_are_those_of_trls_fused_head(llama):
    sft_trainer = pytest.importorskip("trl.trainer.sft_trainer")
    if not hasattr(sft_trainer, "add_fused_lm_head"):
        pytest.skip("this TRL has no fused head to compare with")
    model = AutoModelForCausalLM.from_pretrained(llama)
    sft_trainer.add_fused_lm_head(model, outputs=("log_probs", "is_top1"))
    inputs = {"input_ids": torch.randint(model.config.vocab_size, (3, 9), generator=torch.Generator().manual_seed(0))}
    with torch.no_grad():
        best = model(**inputs).logits.argmax(-1)
        labels = torch.cat([inputs["input_ids"][:, :1], best[:, :-1]], 1)  # the most likely ones
        labels[0, :4], labels[1] = -100, inputs["input_ids"][1]
        fused, ours = model(**inputs, labels=labels, fused_lm_head=True), training._scored(model, labels, **inputs)
    assert torch.equal(ours.label_mask, fused.label_mask) and torch.equal(ours.is_top1, fused.is_top1.bool())
    torch.testing.assert_close(ours.log_probs, fused.log_probs.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.loss, fused.loss, rtol=1e-5, atol=1e-6)
