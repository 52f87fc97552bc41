"""The study: its plan, runs that are killed and resumed, rows, and the report, on a tiny model and made-up rows."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter

import pytest
import torch
from finetune_setup import KillAt, Killed, colours, save_bert, sentences, strings, write_tsv
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from safetensors.torch import load_file
from torch import nn

from benchmarks.study import __main__ as study
from benchmarks.study import adalora, compare, melora, norms, plan, report, rows, runner
from benchmarks.study.curvature import plot_curvature
from benchmarks.study.plan import ADALORA, BASE, LORA, MELORA, MOS, PAPER, RAW_UNITS, TABLES, Cell, Dataset, Entry
from benchmarks.study.split import stratified_split
from mos_kernels import MoSConfig, MoSLinear
from mos_kernels.finetune.options import parse
from reference.layer import mos_expert

# the plan


def config_of(entry: Entry):
    """(method, adapter) as the finetune command understands the entry's options; bad ones raise."""
    base = ("--model", "m", "--output", "o", "--text-column", "t", "--label-column", "l", "--train-file", "f")
    arguments = strings(*base, "--eval-size", 1, *entry.options)
    options, _, config, _ = parse(arguments, {**adalora.METHODS, **melora.METHODS})
    return options.method, config


def configs(table: str) -> dict[str, list]:
    found: dict[str, list] = {}
    for entry in TABLES[table]:
        method, config = config_of(entry)
        found.setdefault(method, []).append(config)
    return found


def test_table_1_has_every_method_at_three_rates():
    found = configs("table1")
    assert set(found) == {"frozen", "lora", "dora", "adalora", "melora", "hydralora", "mixture_of_lora", "mos"}
    assert [(c["r"], c["lora_alpha"] / c["r"]) for c in found["lora"]] == [(8, 2.0), (40, 2.0)]
    assert found["mos"] == [MoSConfig(), MoSConfig.paper()]
    assert all({1, 3, 10} <= set(entry.rates) for entry in TABLES["table1"])


def test_tables_2_and_3_the_open_choices_and_stability_are_complete():
    ratios = {c.curvature_lr_ratio for c in configs("table2")["mos"] if c.learn_curvature}
    assert ratios == {1.0, 10.0, 30.0, 100.0}
    spaces = [dict(c.spaces) for c in configs("table3")["mos"]]
    assert spaces == [{"hyperbolic": 8}, {"spherical": 8}, {"euclidean": 8}, MoSConfig().spaces] or len(spaces) == 4
    assert {frozenset(space) for space in spaces} == {
        frozenset(["hyperbolic"]), frozenset(["spherical"]), frozenset(["euclidean"]), frozenset(MoSConfig().spaces)
    }  # fmt: skip
    grid = {(c.domain, c.length_unit, c.curvature_init) for c in configs("units")["mos"]}
    raw_and_ball = {("raw", 1.0, 1.0), ("ball", 1.0, 1.0)}
    assert grid >= raw_and_ball | {(d, u, k) for d in ("ball", "raw") for u in ("sqrt_dim", 1.0) for k in (0.1, 0.3)}
    assert grid >= {(d, "sqrt_dim", 1.0) for d in ("ball", "raw")}
    assert all({1, 3, 10} <= set(entry.rates) for entry in TABLES["units"])
    assert {c.boundary_eps for c in configs("boundary")["mos"]} == {4e-3, 0.04, 0.4}
    routing = configs("routing")["mos"]
    assert {(c.router_scope, c.norm_topk_prob) for c in routing} == {("ffn", True), ("linear", True), ("ffn", False)}
    assert all(30 in entry.rates for entry in TABLES["stability"])


def test_each_run_is_planned_once_whatever_tables_name_it():
    cells = plan.cells()
    assert len({cell.key for cell in cells}) == len({cell.folder for cell in cells}) == len(cells)
    meanings = [(method, getattr(config, "json", str(config))) for method, config in map(config_of, plan.entries())]
    assert len(set(meanings)) == len(meanings)
    assert len({entry.name for entry in plan.entries()}) == len(meanings)
    named = {entry.options for table in TABLES.values() for entry in table}
    assert {cell.entry.options for cell in cells} == named
    assert {cell.seed for cell in cells} == {0, 1, 2} and {cell.dataset for cell in cells} == {"svamp", "cola"}
    for dataset, rate in (("svamp", 10), ("cola", 3)):
        of_one = [cell for cell in cells if cell.dataset == dataset]
        assert of_one == plan.cells([dataset])
        assert [(cell.entry, cell.rate, cell.seed) for cell in of_one[:3]] == [(LORA, rate, seed) for seed in (0, 1, 2)]
    assert {cell.dataset for cell in cells[:36]} == {"svamp", "cola"}  # neither waits for the other to be finished


# runs


TINY_MOS = Entry("tiny", ("--method", "mos", "--r", "2"), 0)
TINY = Cell("tiny", TINY_MOS, 10, 0)


@pytest.fixture(scope="module")
def place(tiny, tmp_path_factory):
    """A tiny model and data set: 10 steps in 2 epochs."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "data" / "tiny").mkdir(parents=True)
    write_tsv(folder / "data" / "tiny" / "train.tsv", sentences(60))
    more = ("--epochs", "2", "--batch-size", "10")
    return runner.Place(save_bert(folder / "bert"), folder / "data", folder / "outputs", "c0ffee", more)


@pytest.fixture(scope="module")
def tiny():
    """The data set is among those of the plan."""
    columns = ("--text-column", "sentence", "--label-column", "label")
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(
            plan.DATASETS,
            "tiny",
            Dataset("tiny", columns, "train.tsv", delay=plan.DATASETS["svamp"].delay, compared=(3, 10)),
        )
        yield


@pytest.fixture(scope="module")
def row(place):
    return runner.execute(TINY, place)


def untimed(row: dict) -> dict:
    return {name: value for name, value in row.items() if name != "seconds"}


def test_a_row_has_what_the_report_needs(row):
    assert row["key"] == "tiny x10 seed 0 --method mos --r 2" and row["commit"] == "c0ffee"
    assert row["learning_rate"] == 3e-3 and row["steps"] == 10 and row["group_by_length"] is True
    assert row["failure"] is None and row["nan"] is False and row["largest_grad_norm"] >= row["first_grad_norm"] > 0
    assert sum(rows.correct(row)) == round(row["accuracy"] * 18) and len(rows.correct(row)) == 18
    assert row["versions"]["torch"] == torch.__version__ and row["majority"] == 0.5
    assert row["train_rows"] == 42 and row["adapter"]["r"] == 2 and len(row["data_sha256"]) == 2
    curvature = row["curvature"]
    assert curvature["steps"] == list(range(11)) and len(curvature["spaces"]) == 8
    assert len(curvature["linears"]) == 4 and all(len(path) == 11 for path in curvature["linears"].values())
    assert set(row["norms"]) == {"first", "last"} and row["norms"]["last"]["hyperbolic norm"] > 0
    assert row["norms"]["last"]["euclidean factor"] == pytest.approx(1, rel=1e-5)
    json.dumps(row, allow_nan=False)


@pytest.mark.parametrize("step", [3, 7])
def test_a_killed_run_resumes_to_the_same_row(step, row, place, tmp_path):
    elsewhere = dataclasses.replace(place, outputs=tmp_path)
    with pytest.raises(Killed):
        runner.execute(TINY, elsewhere, [KillAt(step)])
    assert not (tmp_path / TINY.folder / "metrics.json").exists()
    assert untimed(runner.execute(TINY, elsewhere)) == untimed(row)


def test_a_run_that_is_complete_but_has_no_row_gets_one_without_training(row, place):
    assert untimed(runner.execute(TINY, place, [KillAt(1)])) == untimed(row)


def test_a_run_that_diverges_is_a_row_and_what_the_command_refuses_is_an_error(place, tmp_path):
    elsewhere = dataclasses.replace(place, outputs=tmp_path, more=(*place.more, "--learning-rate", "1e30"))
    row = runner.execute(TINY, elsewhere)
    assert "the training loss is nan" in row["failure"] and row["nan"] is True and "accuracy" not in row
    json.dumps(row, allow_nan=False)
    refused = Entry("refused", ("--method", "frozen", "--r", "3"), 0)
    with pytest.raises(RuntimeError, match="--r: no effect with this method, which trains no adapter"):
        runner.execute(Cell("tiny", refused, 10, 0), place)


def test_the_runner_does_what_has_no_row_and_leaves_the_rest(row, place, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    rows.append(path, row)
    cells = [TINY, Cell("tiny", BASE, 10, 0)]
    assert rows.remaining(cells, path) == cells[1:]
    assert runner.run_all([TINY], place, path, jobs=1, budget=None) == 0
    assert rows.read(path) == [row]
    assert "1 of 1 runs are done; commit c0ffee" in capsys.readouterr().out


# rows


def test_a_row_is_never_written_twice_and_a_second_writer_is_refused(row, tmp_path):
    path = tmp_path / "results" / "rows.jsonl"
    rows.append(path, row)
    with pytest.raises(ValueError, match="has a row for 'tiny x10 seed 0"):
        rows.append(path, {**row, "accuracy": 0.0})
    rows.append(path, {**row, "key": "another"})
    assert [r["key"] for r in rows.read(path)] == [row["key"], "another"] and rows.read(path)[0] == row
    with rows.only_writer(path), pytest.raises(RuntimeError, match="another runner writes"), rows.only_writer(path):
        pass
    with rows.only_writer(path):
        pass


def test_the_bits_of_a_row_keep_leading_zeros():
    values = [False, False, True, False, True, True, True, False, False]
    packed = {"correct": rows._bits(values), "eval_rows": {"a": 4, "b": 5}}
    assert rows.correct(packed) == [int(value) for value in values]


# baselines and measures


def test_melora_is_a_block_diagonal_low_rank_update():
    torch.manual_seed(0)
    base = nn.Linear(24, 16).requires_grad_(False)
    config = melora.METHODS["melora"].config({"r": 2, "lora_alpha": 6.0, "target_modules": ["0"]}, 10)
    model = get_peft_model(nn.Sequential(base), config).base_model.model
    (layer,) = model
    assert isinstance(layer, melora.MELoRALinear)
    x = torch.randn(2, 5, 24)
    assert torch.equal(layer(x), base(x))  # B is zero
    A, B = (factor["default"].weight for factor in (layer.lora_A, layer.lora_B))
    nn.init.normal_(B)
    A, B = torch.block_diag(*A), torch.block_diag(*B)
    torch.testing.assert_close(layer(x), base(x) + 3.0 * x @ A.T @ B.T)
    assert torch.linalg.matrix_rank(B @ A) == 8
    trained = sum(p.numel() for p in layer.parameters() if p.requires_grad)
    assert trained == 2 * (24 + 16)
    with pytest.raises(ValueError, match="4 mini LoRAs do not divide a linear 26 -> 8"):
        get_peft_model(nn.Sequential(nn.Linear(26, 16)), config)


@pytest.mark.budget(9)
def test_adalora_takes_ranks_away_until_r_is_left_on_average(place, tmp_path):
    elsewhere = dataclasses.replace(place, outputs=tmp_path)
    cell = Cell("tiny", Entry("tiny AdaLoRA", ("--method", "adalora", "--r", "2"), 0), 300, 0)
    row = runner.execute(cell, elsewhere)
    output = tmp_path / cell.folder
    config = json.loads((output / "adapter" / "adapter_config.json").read_text())
    schedule = {"target_r": 2, "init_r": 3, "tinit": 1, "tfinal": 3, "total_step": 10}
    assert {name: config[name] for name in schedule} == schedule and row["steps"] == 10
    assert len(config["rank_pattern"]) == 4 and sum(sum(kept) for kept in config["rank_pattern"].values()) == 2 * 4
    values = [t for n, t in load_file(output / "adapter" / "adapter_model.safetensors").items() if "lora_E" in n]
    assert sum(len(value) for value in values) == 8 and all((value != 0).all() for value in values)
    assert not list(output.glob("checkpoint-*")) and row["curvature"] is None


def test_the_rank_schedule_starts_with_more_and_ends_in_time():
    for steps in (4, 5, 66, 804):
        phases = adalora.schedule(8, steps)
        assert phases["init_r"] == 12 and phases["tinit"] < steps - phases["tfinal"]
    with pytest.raises(ValueError, match="at least 4 steps, and this run has 3"):
        adalora.schedule(8, 3)


@given(
    strata=st.lists(st.sampled_from("abcd"), min_size=2, max_size=60),
    part=st.floats(0.05, 0.95),
    seed=st.integers(0, 9),
)
def test_the_studys_split_keeps_a_row_of_each_class(strata, part, seed):
    counts, wanted = Counter(strata), round(part * len(strata))
    if not 0 < wanted <= len(strata) - len(counts):
        with pytest.raises(ValueError, match="can be set aside"):
            stratified_split(strata, part, seed)
        return
    train, evaluation = stratified_split(strata, part, seed)
    assert sorted(train + evaluation) == list(range(len(strata)))
    assert train == sorted(train) and evaluation == sorted(evaluation) and len(evaluation) == wanted
    held_out = Counter(strata[i] for i in evaluation)
    assert all(held_out[name] < count for name, count in counts.items())
    exact = {name: wanted * count / len(strata) for name, count in counts.items()}
    if all(value <= counts[name] - 1 for name, value in exact.items()):
        assert all(abs(held_out[name] - value) < 1 for name, value in exact.items())


def curvature_log(layers, projections, steps=(0, 10, 20)):
    names = [f"bert.encoder.layer.{i}.{p}" for i in range(layers) for p in projections]
    return [{"step": s, "curvature": {name: [-0.3 - s / 100, -0.3, 0.3 + s / 50, 0] for name in names}} for s in steps]


@pytest.mark.parametrize(("layers", "projections"), [(1, ["fc"]), (2, ["a.dense", "b.dense"]), (28, ["up"]), (0, [])])
def test_the_plot_of_the_curvature_is_not_blank(tmp_path, layers, projections):
    log = curvature_log(layers, projections)
    if not layers:  # linears without a layer index
        log = [{"step": s, "curvature": {"up": [-0.3, -s, 0.3, 0.0], "down": [-0.3, s, 0.3, 0.0]}} for s in range(3)]
    plot_curvature(log, ("hyperbolic", "hyperbolic", "spherical", "euclidean"), tmp_path / "c.png")
    assert colours(tmp_path / "c.png") > 10


@pytest.mark.parametrize("share_a", [True, False])
@pytest.mark.parametrize("preset", [MoSConfig, MoSConfig.paper])
def test_expert_norms_are_those_of_the_reference(preset, share_a):
    torch.manual_seed(0)
    config = preset(r=3, init_lora_weights=False, router_scope="linear", share_a=share_a)
    layer = MoSLinear(12, 10, config=config, dtype=torch.float64)
    x = 1.5 * torch.randn(6, 12, dtype=torch.float64)
    found, factors, base = norms.expert_norms(layer, layer, x)
    torch.testing.assert_close(base.double(), layer(x, torch.zeros(6, 8)).norm(dim=-1).double(), rtol=1e-4, atol=1e-5)
    for t, e in ((0, 0), (3, 2), (5, 4), (2, 7)):
        A, B = layer.mos_lora_A if share_a else layer.mos_lora_A[e], layer.mos_lora_B[:, e]
        o = mos_expert(x[t], A, B, layer.curvature[e].double(), domain=config.domain).output
        assert found[t, e].item() == pytest.approx(config.scaling * o.norm().item(), rel=1e-4)
        assert abs(factors[t, e].item()) == pytest.approx((o.norm() / (B @ A @ x[t]).norm()).item(), rel=1e-4)


# the report


def made_up(entry: Entry, rate: int, seed: int, right: int, dataset: str = "svamp", **more) -> dict:
    spaces = ("hyperbolic", "spherical", "euclidean")
    measured = {f"{space} {what}": 0.5 for space in spaces for what in ("norm", "factor")} | {"base norm": 1.0}
    curvature = None
    if entry in (MOS, PAPER, RAW_UNITS):
        linear = [[-0.3 + 0.1 * i, 0.3, 0.0] for i in range(5)]
        linears = {f"bert.encoder.layer.{i}.output.dense": linear for i in range(2)}
        curvature = {"spaces": list(spaces), "steps": [0, 5, 10, 15, 20], "linears": linears}
    return {
        "key": plan.key_of(dataset, entry.options, rate, seed), "dataset": dataset, "options": list(entry.options),
        "rate": rate, "seed": seed, "failure": None, "nan": False, "largest_grad_norm": 2.5, "curvature": curvature,
        "norms": {"first": measured, "last": measured} if curvature else None,
        "accuracy": right / 100, "matthews_correlation": 0.5, "loss": 1.0, "majority": 0.53, "train_rows": 700,
        "correct": rows._bits([i < right for i in range(100)]), "eval_rows": {"held_out": 100}, "steps": 66,
        "parameters": {"adapter": 1234}, "group_by_length": True, "commit": "c0ffee0123456789", **more,
    }  # fmt: skip


def indexed(*made: dict) -> dict[str, dict]:
    return {row["key"]: row for row in made}


def test_differences_are_paired_by_seed_with_both_intervals():
    found = {seed: made_up(MOS, 10, seed, right) for seed, right in ((0, 60), (1, 64), (2, 71))}
    reference = {seed: made_up(LORA, 10, seed, right) for seed, right in ((0, 59), (1, 60), (3, 99))}
    difference = compare.difference(found, reference)
    assert difference.n == 2 and difference.mean == pytest.approx(0.025)
    assert difference.seeds == pytest.approx(12.706 * 0.015, rel=1e-3)  # sd/√2 of 0.01 and 0.04
    by_row = torch.zeros(100)
    by_row[59], by_row[60:64] = 0.5, 0.5
    assert difference.rows == pytest.approx(1.96 * by_row.std().item() / 10, rel=1e-5)
    assert compare.difference(found, {}) is None
    losses = compare.difference(found, reference, "loss")
    assert losses.mean == 0 and math.isnan(losses.rows)
    failed = {0: {**reference[0], "failure": "nan"}, 1: reference[1]}
    assert compare.difference(found, failed).n == 1 and math.isnan(compare.difference(found, failed).seeds)
    assert compare.summary({0: {**found[0], "failure": "nan"}, 1: found[1]})[:2] == (1, 1)


def test_comparisons_are_taken_together_pair_by_pair():
    ours = [
        {seed: made_up(MOS, rate, seed, right + seed**2) for seed in (0, 1, 2)} for rate, right in ((3, 60), (10, 70))
    ]
    theirs = [{seed: made_up(LORA, rate, seed, 60) for seed in (0, 1)} for rate in (3, 10)]
    both = compare.pooled(zip(ours, theirs, strict=True))
    # of seed 0: 0 and 0.1; of seed 1: 0.01 and 0.11
    assert both.n == 2 and both.mean == pytest.approx((0.05 + 0.06) / 2)
    assert both.seeds == pytest.approx(12.706 * 0.005, rel=1e-4)
    by_row = torch.zeros(100)
    by_row[60:70], by_row[60], by_row[70] = 0.5, 0.75, 0.25
    assert both.rows == pytest.approx(1.96 * by_row.std().item() / 10, rel=1e-5)
    assert compare.pooled([(ours[0], theirs[0])]) == compare.difference(ours[0], theirs[0])
    assert compare.pooled([]) is None
    for pairs in plan.COMPARISONS.values():
        assert all(one in plan.entries() and other in plan.entries() and one != other for one, other in pairs)
    sizes = [len(pairs) for pairs in plan.COMPARISONS.values()]
    assert sizes.count(6) == 1 and sizes.count(3) == 3 and sizes.count(2) == 2


@pytest.mark.parametrize(("degrees", "quantile"), [(1, 12.706), (9, 2.262), (10, 2.228), (22, 2.074), (1000, 1.962)])
def test_students_t(degrees, quantile):
    assert compare.t_975(degrees) == pytest.approx(quantile, abs=0.003)


def test_the_best_rate_is_of_those_that_were_run():
    made = indexed(*(made_up(LORA, rate, seed, right) for rate, right in ((1, 53), (3, 60)) for seed in (0, 1)))
    assert compare.best_rate(made, "svamp", LORA, (0, 1, 2)) == 3
    assert compare.best_rate(made, "svamp", MOS, (0, 1, 2)) is None
    by_correlation = indexed(
        *(
            made_up(LORA, rate, 0, right, "cola", matthews_correlation=found)
            for rate, right, found in ((1, 69, 0.0), (3, 68, 0.2))
        )
    )
    assert compare.best_rate(by_correlation, "cola", LORA, (0,)) == 3


def test_movement_counts_what_crossed_zero_and_what_still_moves():
    found = compare.movement([made_up(MOS, 10, 0, 60)])
    assert (
        found.moved == pytest.approx(0.2) and found.crossed == pytest.approx(0.5) and found.late == pytest.approx(0.25)
    )
    assert compare.movement([made_up(LORA, 10, 0, 60)]) is None


def test_the_report_shows_what_was_run_and_says_what_was_not(tmp_path, capsys):
    path, output = tmp_path / "rows.jsonl", tmp_path / "docs"
    for seed in (0, 1, 2):
        rows.append(path, made_up(LORA, 10, seed, 60 + seed))
        rows.append(path, made_up(MOS, 10, seed, 65 + seed))
    rows.append(path, made_up(MOS, 3, 0, 50))
    failure = {"failure": "the training loss is nan at step 3", "nan": True, "largest_grad_norm": None}
    lost = {name: value for name, value in made_up(PAPER, 30, 0, 50, **failure).items() if name != "accuracy"}
    rows.append(path, lost)
    assert study.main(["report", "--rows", str(path), "--output", str(output)]) == 0
    text = (output / "tables.md").read_text()
    line = next(line for line in text.splitlines() if line.startswith("| MoS |"))
    assert line == "| MoS | 1,234 | not run yet | 0.500 (1) | 0.660 ± 0.010 | x10 | 0.500 ± 0.000 | 1.000 ± 0.000 |"
    assert "| MoS | not run yet | not run yet | +0.050* (± 0.000 / 0.039) |" in text
    assert "| MoS, curvature not learned − x30 |" not in text and "### Settings against each other\n" in text
    assert "1 of 1 failed" in text and "## cola\n\nNot run yet: 0 of" in text
    assert "1 of them failed, 1 saw a NaN or an infinity" in text
    assert "DoRA r=8 (3 at x1, 3 at x3, 3 at x10, 3 at x30)" in text and "LoRA r=8 (3 at x1, 3 at x3, 3 at x30)" in text
    pictures = sorted(picture.name for picture in output.glob("*.png"))
    assert pictures == ["best-svamp.png", "curvature-svamp-mos-x10.png", "norms-svamp.png", "rates-svamp.png"]
    assert all(f"]({name})" in text and colours(output / name) > 10 for name in pictures)
    before, page = text, tmp_path / "study.md"
    page.write_text(f"Above.\n{report.BEGIN}\nof before\n{report.END}\nBelow.\n")
    assert study.main(["report", "--rows", str(path), "--output", str(output)]) == 0
    assert (output / "tables.md").read_text() == before
    above, overview, below = re.split(f"{report.BEGIN}|{report.END}", page.read_text())
    assert above == "Above.\n" and below == "\nBelow.\n" and "of before" not in overview
    assert "8 of the 543 planned runs are done: 8 of 306 on svamp, 0 of 237 on cola." in overview
    assert "| MoS |  | 0.500 (1) | 0.660 ± 0.010 |  |  |  |" in overview and "| DoRA" not in overview
    assert "| the majority class | 0.530 | 0.530 | 0.530 | 0.000 |" in overview
    assert study.main(["report", "--rows", str(tmp_path / "none.jsonl"), "--output", str(output)]) == 2
    assert "holds no rows" in capsys.readouterr().out


def test_each_data_set_compares_its_own_rates_by_its_own_metric_and_leaves_out_what_is_not_planned():
    made = indexed(
        *(
            made_up(entry, rate, seed, 70, "cola", matthews_correlation=0.1 * (entry == MOS) * rate + 0.01 * seed)
            for entry in (MOS, RAW_UNITS)
            for rate in (1, 3)
            for seed in (0, 1, 2)
        )
    )
    text = report.page(made)
    heads = "accuracy, x1 | x3 | x1 and x3 | matthews, x1 | x3 | x1 and x3 | loss, x1 and x3"
    assert f"| comparison | {heads} |" in text
    line = next(line for line in text.splitlines() if line.startswith(f"| {MOS.name} − {RAW_UNITS.name} |"))
    values = [cell.strip() for cell in line.split("|")[5:8]]
    assert values == [f"+{mean}* (3: ± 0.000)" for mean in ("0.100", "0.300", "0.200")]
    lines = [line for line in text.splitlines() if line.startswith("| MoS raw, unit √d, κ̂ 0.1 |")]
    assert lines[0] == "| MoS raw, unit √d, κ̂ 0.1 |  | not run yet | not run yet |  |  |  |  |"


def test_the_plan_command_says_what_is_done(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    rows.append(path, made_up(ADALORA, 10, 0, 60))
    arguments = ["plan", "--rows", str(path), "--dataset", "svamp", "--only", "table1", "--seeds", "0"]
    assert study.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + sum(len(entry.rates) for entry in TABLES["table1"])
    assert f"[x] svamp x10 seed 0 {ADALORA.name}: --method adalora" in lines
    assert f"[ ] svamp x3 seed 0 {MELORA.name}: --method melora" in lines and lines[-1].startswith("1 of ")
    chosen = [*arguments, "--entries", ADALORA.name, MELORA.name, "--rates", "10", "3"]
    assert study.main(chosen) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"[x] svamp x10 seed 0 {ADALORA.name}: --method adalora",
        f"[ ] svamp x10 seed 0 {MELORA.name}: --method melora",
        f"[ ] svamp x3 seed 0 {ADALORA.name}: --method adalora",
        f"[ ] svamp x3 seed 0 {MELORA.name}: --method melora",
        "1 of 4 runs are done",
    ]
