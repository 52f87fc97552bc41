"""The decoder study: which equations count as right, its plan, and a run on a tiny Llama, killed and resumed."""

from __future__ import annotations

import dataclasses
import json
import math
import string

import pytest
import torch
from finetune_setup import KillAt, Killed
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.study import rows
from benchmarks.study.decoder import __main__ as command
from benchmarks.study.decoder import export, plan, problems, report, runner, training
from benchmarks.study.decoder.model import adapted, load
from benchmarks.study.decoder.plan import ENTRIES, EUCLIDEAN, LORA, LORA_MATCHED, MOS, Cell

# equations


@pytest.mark.parametrize(
    "equation, answer, right",
    [
        ("x=((22.0-14.0)/4.0)", 2.0, True),
        ("( 76.0 - 25.0 )", 51.0, True),
        ("8.0*2.0=y", 16.0, True),
        ("(6.0+x)*(x-6.0)=189.0", -15.0, True),
        ("(6.0+x)*(x-6.0)=189.0", 14.0, False),
        ("x=1.0/((1.0/12.0)+(1.0/10.0))", 5.45, True),  # the data's own rounding
        ("x=54.7", 54.545, False),
        ("x=-3", -3.0, True),
        ("x=0.001", 0.0, False),
        ("x=x", 4.0, False),
        ("x=y", 4.0, False),
        ("3=3", 3.0, False),
        ("x=1/0", 1.0, False),
        ("x=(3+", 3.0, False),
        ("x=3=3", 3.0, False),
        ("x=9**9**9**9", 3.0, False),
        ("x=abs(3)", 3.0, False),
        ("x=" + "(" * 300 + "3", 3.0, False),
        ("x=007", 7.0, False),
        ("", 0.0, False),
        ("the answer is 4", 4.0, False),
    ],
)
def test_which_equations_solve_a_problem(equation, answer, right):
    assert problems.solves(equation, answer) is right


_number = st.integers(1, 99).map(float)
_expression = st.recursive(
    _number.map(str), lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner).map("({0[0]}{0[1]}{0[2]})".format)
)


@given(_expression)
def test_an_equation_solves_its_own_value_and_none_far_from_it(expression):
    try:
        value = eval(expression)
    except ZeroDivisionError:
        assert not problems.solves(f"x={expression}", 1.0)
        return
    if abs(value) > 1e9:
        return
    for equation in (f"x={expression}", f"{expression}=x", expression):
        assert problems.solves(equation, value)
        assert not problems.solves(equation, value * 1.01 + 0.01)


@given(st.text(alphabet=string.printable, max_size=30), st.floats(-100, 100))
def test_no_text_raises(text, answer):
    assert problems.solves(text, answer) in (True, False)


# the plan


def test_the_rows_that_decide_come_first():
    cells = plan.cells()
    assert len({cell.key for cell in cells}) == len({cell.folder for cell in cells}) == len(cells)
    deciding = {LORA, LORA_MATCHED, EUCLIDEAN, MOS}
    assert {(c.entry, c.rate, c.seed) for c in cells[:8]} == {(e, rate, 0) for e in deciding for rate in plan.BEST}
    assert {c.entry for c in cells[:24]} == deciding and {c.seed for c in cells[:24]} == {0, 1, 2}
    assert {c.dataset for c in cells[: len(cells) // 2]} == {"mawps"}
    assert len({entry.name for entry in ENTRIES}) == len(ENTRIES)
    assert {c.seed for c in cells if c.rate not in plan.BEST} == {0}  # and what is asked for is what is run
    assert plan.cells(["svamp"], [1], [1], ["MoS"]) == [Cell("svamp", MOS, 1, 1)]
    assert {cell.rate for cell in plan.cells(names=["HMoRA"])} == set(plan.BEST)


def test_the_matched_lora_has_as_many_parameters_on_smollm2():
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=1, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=16,
    )  # fmt: skip
    counts = []
    for entry in (LORA_MATCHED, MOS, EUCLIDEAN):
        model = adapted(LlamaForCausalLM(config), entry.method, entry.options)
        counts.append(30 * sum(p.numel() for p in model.parameters() if p.requires_grad))
    assert counts == [7_793_280, 7_788_240, 7_787_520]  # of Euclidean experts no curvature trains


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_every_method_is_one_that_can_be_put_on(entry, place):
    options = entry.options | ({"heads": 4} if entry.method == "HMoRA" else {})
    model = adapted(load(place.model)[0], entry.method, options)
    assert any(parameter.requires_grad for parameter in model.parameters())


# runs

CELL = Cell("mawps", dataclasses.replace(MOS, settings='{"r": 2}'), 3, 0)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny Llama with a tokenizer of single characters, and sums to learn: 40 to train on, 3 steps."""
    folder = tmp_path_factory.mktemp("decoder")
    characters = ["[PAD]", "[UNK]", "[EOS]", *sorted(set(string.digits + string.ascii_letters + " \n.:+=?"))]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]"
    ).save_pretrained(folder / "model")
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(characters), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, intermediate_size=32, max_position_embeddings=128, pad_token_id=0, bos_token_id=2,
            eos_token_id=2,
        )
    ).save_pretrained(folder / "model")  # fmt: skip
    (folder / "data" / "mawps").mkdir(parents=True)
    for split, count in (("train", 40), ("test", 6)):
        offset = 0 if split == "train" else 37  # three of the six are known
        sums = [(3 * i % 10, i + offset) for i in range(count)]
        sums = [(3 * b % 10, b) for _, b in sums]
        found = [
            {"original_text": f"What is {a} and {b} ?", "equation": f"X={a}.0+{b}.0", "ans": str(a + b)}
            for a, b in sums
        ]
        (folder / "data" / "mawps" / f"{split}set.json").write_text(json.dumps(found))
    return runner.Place(folder / "model", folder / "data", folder / "outputs", "c0ffee")


@pytest.fixture(scope="module")
def row(place):
    return runner.execute(CELL, place)


def untimed(row: dict) -> dict:
    return {name: value for name, value in row.items() if name not in ("seconds", "peak_memory_bytes")}


def test_a_row_has_what_is_reported(row, place):
    assert row["steps"] == 3 and len(row["losses"]) == 3 and row["failure"] is None and row["nan"] is False
    assert row["eval_rows"] == 3 and row["solved"] == row["right"].count("1") and len(row["answers"]) == 3
    assert row["solve_rate"] == row["solved"] / 3 and row["learning_rate"] == 9e-4 and row["parameters"] > 0
    assert math.isclose(sum(row["nll"]) / 3, row["nll_per_problem"], abs_tol=1e-3) and row["nll_per_token"] > 0
    assert row["seconds"]["train_cpu"] >= 0 and row["peak_memory_bytes"]["all"] > 1e8
    assert row["commit"] == "c0ffee" and row["versions"]["torch"] == torch.__version__ and len(row["data_sha256"]) == 2
    assert (place.outputs / CELL.folder / "adapter_model.safetensors").is_file()
    json.dumps(row, allow_nan=False)


def test_a_killed_run_resumes_to_the_same_row(row, place, tmp_path, monkeypatch):
    resumes(CELL, row, place, tmp_path, monkeypatch)


@pytest.mark.budget(8)
def test_a_killed_run_of_hmora_does_too(place, tmp_path, monkeypatch):
    (entry,) = (entry for entry in ENTRIES if entry.method == "HMoRA")
    cell = Cell("mawps", dataclasses.replace(entry, settings='{"heads": 4, "r": 2, "token": 5}'), 3, 0)
    row = runner.execute(cell, dataclasses.replace(place, outputs=tmp_path / "whole"))
    assert row["failure"] is None and row["nan"] is False and len(set(row["losses"])) == 3
    resumes(cell, row, place, tmp_path, monkeypatch)


def resumes(cell, row, place, folder, monkeypatch):
    elsewhere = dataclasses.replace(place, outputs=folder / "killed")
    train = training.train
    monkeypatch.setattr(training, "train", lambda *arguments: train(*arguments, save_steps=1))
    with pytest.raises(Killed):
        runner.execute(cell, elsewhere, [KillAt(2)])
    assert untimed(runner.execute(cell, elsewhere)) == untimed(row)


def test_a_loss_that_is_not_finite_is_a_row(place, tmp_path, monkeypatch):
    losses = training.equation_losses
    monkeypatch.setattr(training, "equation_losses", lambda *arguments: losses(*arguments) * math.inf)
    found = runner.execute(CELL, dataclasses.replace(place, outputs=tmp_path))
    assert "loss is inf at step 0" in found["failure"] and found["nan"] is True and "solved" not in found
    json.dumps(found, allow_nan=False)


def test_the_loss_is_that_of_the_equation_alone_whatever_the_batch(place):
    model, tokenizer = load(place.model)
    model = model.float()
    data = problems.mawps(place.data)
    examples = [training.encode(tokenizer, problem) for problem in data.test]
    together = training.equation_losses(model, training.collate(examples, 0), "none").sum(-1)
    for example, total in zip(examples, together, strict=True):
        tokens = torch.tensor([example["prompt"] + example["equation"]])
        logits = model(input_ids=tokens).logits[0].log_softmax(-1)
        start = len(example["prompt"])
        alone = -sum(logits[start - 1 + i, token] for i, token in enumerate(example["equation"]))
        torch.testing.assert_close(total, alone, rtol=1e-4, atol=1e-4)


def test_runs_are_done_in_their_order_and_once(place, tmp_path, capsys, monkeypatch):
    done = []

    class Pool:
        def __init__(self, *arguments, **options): ...

        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda self, *error: None  # noqa: E731

        def apply(self, work, arguments):
            return work(*arguments)

    def work(job):
        done.append(job[0])
        if job[0].rate == 1:
            return None, "Traceback: broken"
        return {"key": job[0].key, "failure": None, "solved": 1, "eval_rows": 3, "seconds": {}}, ""

    monkeypatch.setattr(runner.multiprocessing, "get_context", lambda kind: type("Context", (), {"Pool": Pool}))
    path, planned = tmp_path / "rows.jsonl", plan.cells(["mawps"], [0], [1, 3], ["MoS", "LoRA r=8"])
    assert runner.run_all(planned, place, path, None, work) == 2
    assert done == planned and [row["key"] for row in rows.read(path)] == [c.key for c in planned if c.rate == 3]
    assert "broken" in capsys.readouterr().err
    done.clear()
    runner.run_all(planned, place, path, None, work)
    assert done == [c for c in planned if c.rate == 1]
    assert command.main(["plan", "--rows", str(path), "--dataset", "mawps", "--seeds", "0", "--entries", "MoS"]) == 0
    assert "1 of 4 runs are done" in capsys.readouterr().out


def test_an_adapter_is_exported_and_scored(row, place, tmp_path, capsys):
    cells = [CELL, dataclasses.replace(CELL, seed=1)]  # the second was not run
    settings = export.Settings(4, 20, draw=1)
    rows.append(tmp_path / "rows.jsonl", row)
    export.run_all(cells, place, tmp_path / "rows.jsonl", tmp_path / "exports.jsonl", settings)
    assert "exported at rank 4 on 20 problems, draw 1" in capsys.readouterr().out
    (found,) = rows.read(tmp_path / "exports.jsonl")
    assert found["of"] == CELL.key and found["eval_rows"] == 3 and len(found["answers"]) == 3
    assert len(found["mixture"]["right"]) == 3 and found["mixture"]["answers"] == row["answers"]
    assert 0 <= found["agreement"] <= 1 and found["kl"] >= 0 and found["positions"] > 3
    export.run_all(cells, place, tmp_path / "rows.jsonl", tmp_path / "exports.jsonl", settings)
    assert len(rows.read(tmp_path / "exports.jsonl")) == 1


def test_the_report_is_made_from_the_rows(row, tmp_path, capsys):
    def like(entry, right, seed=0, rate=3):
        return {**row, "entry": entry.name, "rate": rate, "seed": seed, "right": right, "solved": right.count("1"),
                "solve_rate": right.count("1") / 3, "key": f"{entry.name} {seed} {rate}"}  # fmt: skip

    found = [
        like(LORA, "100"),
        like(LORA, "110", 1),
        like(MOS, "011"),
        like(MOS, "111", 1),
        like(EUCLIDEAN, "1", rate=1),
    ]
    found[-1] |= {"failure": "the training loss is nan", "seconds": {}}
    page = tmp_path / "page.md"
    for one in found:
        rows.append(tmp_path / "rows.jsonl", one)
    assert report.run(tmp_path / "rows.jsonl", tmp_path / "none.jsonl", page) == 2
    marks = "\nold\n".join(report.GLANCE) + f"\n{report.BEGIN}\nold\n{report.END}"
    page.write_text(f"before\n{marks}\nafter\n")
    assert report.run(tmp_path / "rows.jsonl", tmp_path / "none.jsonl", page) == 0
    text = page.read_text()
    assert text.startswith("before") and text.endswith("after\n") and "old" not in text
    assert "| LoRA r=8 |  |  | 50.0% ± 23.6 (2) |" in text and "| MoS |  |  | 83.3% ± 23.6 (2) |" in text
    assert "| MoS | x3 | 2 | 3 | 1 | +33.3 ± 44.1 | +0.000 ± 0.000 |" in text and "8 euclidean" not in text
    assert "### Against MoS" not in text and "\nnot run yet\n".join(report.GLANCE) in text  # at x10
    for one in (like(LORA, "110"), like(MOS, "010") | {"nll": [nats + 3 for nats in row["nll"]]}):
        rows.append(tmp_path / "rows.jsonl", one | {"dataset": "svamp", "key": f"svamp {one['key']}"})
    report.run(tmp_path / "rows.jsonl", tmp_path / "none.jsonl", page)
    # of the six problems LoRA solves 0.5, -0.5, -1, 1, 0 and 0 more than MoS, each the mean over its seeds
    assert "| LoRA r=8 | x3 | 2 + 1 | 2 | 3 | +0.0 ± 28.9 | -1.500 ± 0.671 |" in page.read_text()
    for right, entry in (("000", MOS), ("100", LORA)):
        rows.append(tmp_path / "rows.jsonl", like(entry, right, rate=10) | {"parameters": 1234567})
    report.run(tmp_path / "rows.jsonl", tmp_path / "none.jsonl", page)
    assert "| LoRA r=8 | 1.2 | 1 + 0 | 33.3% |  | +33.3 ± 33.3 | +0.00 ± 0.00 |" in page.read_text()
    assert report._clear(2.1, 1, 1) == "**+2.1 ± 1.0**" and report._clear(-2, 1, 0) == "-2 ± 1"
    exported = {
        "of": found[2]["key"], "rank": 4, "problems": 20, "error": 0.1, "kl": 0.01, "agreement": 0.9, "cpu_seconds": 1,
        **{name: found[1][name] for name in ("right", "solved", "nll_per_token")},
    }  # fmt: skip
    again = {name: found[0][name] for name in ("right", "solved", "nll_per_token")}
    for row in (
        exported | {"key": "of the run"},
        exported | {"key": "of its own", "mixture": again},
    ):
        rows.append(tmp_path / "exports.jsonl", row)
    report.run(tmp_path / "rows.jsonl", tmp_path / "exports.jsonl", page)
    nll = f"{row['nll_per_token']:.3f}"
    start = "| mawps, MoS, x3, seed 0 | 4 | 20 | 0 |"
    of_run = f"{start} 0.100 | 0.0100 | 90.0% | 2 → 2 | 1, 1 | +0.0 ± 57.7 | {nll} → {nll} |  | 1 |"
    of_its_own = "| 1 → 2 | 0, 1 | +33.3 ± 33.3 |"
    of_its_own = f"{start} 0.100 | 0.0100 | 90.0% {of_its_own} {nll} → {nll} | 2, 1 | 1 |"
    together = "| mawps | 4 | 1 | 1 | 0 | 1 | +33.3 ± 33.3 | +0.0000 | 2 | 1 | -33.3 ± 66.7 |"
    assert all(line in page.read_text() for line in (of_run, of_its_own, together))
    assert report.run(tmp_path / "nowhere.jsonl", tmp_path / "none.jsonl", page) == 2


def test_a_data_folder_that_is_not_there(tmp_path, capsys):
    assert command.main(["run", "--data", str(tmp_path), "--rows", str(tmp_path / "rows.jsonl")]) == 2
    assert str(tmp_path / "mawps") in capsys.readouterr().err
