"""From rows to files, report, targets and regressions: on rows made up for the purpose."""

from __future__ import annotations

import pytest

from benchmarks import providers, regression, report, store, tables, targets
from benchmarks.__main__ import main


def row(provider: str, seconds: float, spread: float = 0.02, **fields) -> dict:
    made = {
        "kind": "layer", "step": "forward+backward", "provider": provider, "base": providers.FROZEN, "d_in": 1536,
        "d_out": 8960, "tokens": 8192, "experts": 8, "rank": 8, "dtype": "bfloat16", "clock": "events", "status": "ok",
        "message": "", "bytes": 10**9, "flop": 10**12, "median_s": seconds, "q20_s": seconds * (1 - spread / 2),
        "q80_s": seconds * (1 + spread / 2), "rounds": 30, "share_of_ceiling": 0.5, "ceiling": "matrix",
        "peak_bytes": 10**8, "saved_bytes": 8192 * 100, "machine": "made-up-gpu", "gpu": "Made Up GPU", "run": "r1",
        "commit": "c" * 40, "torch": "2",
    }  # fmt: skip
    return {**made, **fields}


def cpu(provider: str, seconds: float, spread: float = 0.02, **fields) -> dict:
    made = row(provider, seconds, spread, tokens=512, dtype="float32", cpu="CPU", threads=2, machine="cpu-2core")
    return {**{name: value for name, value in made.items() if name != "gpu"}, **fields}


def test_a_run_replaces_what_it_measured_and_nothing_else(tmp_path):
    old = [row("a", 1.0), row("a", 2.0, tokens=1), row("b", 3.0, kind="steps")]
    left_out = row("b", 0.0, kind="steps", status="left out", run="r2")
    del left_out["median_s"]
    merged = store.merged(old, [row("a", 5.0, run="r2"), left_out])
    assert {(r["provider"], r["kind"], r["tokens"]): r["median_s"] for r in merged} == {
        ("a", "layer", 8192): 5.0, ("a", "layer", 1): 2.0, ("b", "steps", 8192): 3.0,
    }  # fmt: skip
    file = store.save(tmp_path / "machine", merged)
    assert store.load(tmp_path / "machine") == merged and not list(file.parent.glob("*.tmp"))
    assert store.merged([], [left_out]) == [left_out]


def test_regressions_on_a_gpu_are_of_times():
    old = [row("a", 1.0), row("b", 1.0), row("c", 1.0, spread=0.2)]
    new = [row("a", 1.1), row("b", 1.02), row("c", 1.1)]
    found = regression.slower(old, new)
    assert [s.row["provider"] for s in found] == ["a"] and "+10%" in str(found[0])


def test_regressions_on_a_cpu_are_of_ratios():
    old = [cpu(providers.FROZEN, 1.0), cpu("a", 2.0), cpu("b", 2.0)]
    new = [cpu(providers.FROZEN, 2.0), cpu("a", 4.0), cpu("b", 5.0)]
    assert [s.row["provider"] for s in regression.slower(old, new)] == ["b"]
    assert regression.slower(old, [dict(r, threads=1) for r in new]) == []


def test_compare_fails_only_where_asked(tmp_path, capsys):
    store.save(tmp_path / "old", [row("a", 1.0)])
    store.save(tmp_path / "new", [row("a", 2.0)])
    folders = [str(tmp_path / "old"), str(tmp_path / "new")]
    assert main(["compare", *folders]) == 0
    assert main(["compare", *folders, "--fail"]) == 1
    assert "a, layer forward+backward" in capsys.readouterr().out
    assert main(["compare", *folders[::-1], "--fail"]) == 0


def target(what: str) -> targets.Target:
    (found,) = [t for t in targets.TARGETS if what in t.what]
    return found


def test_targets_are_filled_from_rows_or_not_at_all():
    rows = [row(providers.FROZEN, 1.0, peak_bytes=95 * 10**6), row(providers.TRITON, 1.3), row(providers.FUSED_8, 1.4)]
    (qwen,) = [t for t in targets.TARGETS if t.what == "the same, Qwen shapes"]
    assert targets.values(qwen, rows) == [("1536→8960", pytest.approx(1.3))] and not qwen.met(1.3)
    (memory,) = targets.values(target("peak memory"), rows)
    assert memory[1] == pytest.approx(5e6 / (2 * 8192 * (1536 + 8960)))
    table = tables.targets(rows)
    assert "**missed**" in table and table.count("| not measured |") >= 8
    assert targets.missed(rows, "gpu") == [f"{qwen.what}, 1536→8960: 1.3, target ≤ 1.28×"]
    assert targets.missed(rows, "cpu") == []


def ffn_rows(**fields) -> list[dict]:
    counted = {"device_launches": 31, "launches": 24, "host_s": 1e-3, **fields}
    return [
        row(providers.FROZEN, 1.0, kind="ffn", saved_bytes=10**9),
        row(providers.PEFT_8_AS_BASE, 1.5, kind="ffn", saved_bytes=2 * 10**9),
        row(providers.TRITON, 1.02, kind="ffn", saved_bytes=7 * 10**8, **counted),
    ]


def test_an_ffns_targets_and_table():
    rows = ffn_rows()
    missed = targets.missed(rows, "gpu")
    assert len(missed) == 2 and "T=8192" in missed[0] and "launches of our kernels" in missed[1]
    table = tables.targets(rows, ("gpu",))
    assert "| 31 (1536→8960) | met |" in table and "| 0.70× (1536→8960) | met |" in table
    shown = tables.ffns(rows)
    assert "| **MoS Triton** | 1.02e+03 ms | 1.02 |  | 700.0 | 100.0 | 31 | 24 | 1 ms |" in shown
    assert "frozen FFN, as transformers runs it" in shown and "settings found" not in shown
    tuned = [{**r, "step": "forward+backward, settings found"} for r in rows]
    assert "With the settings found for this GPU" in tables.ffns(rows + tuned)
    assert len(store.groups(rows + tuned)) == 2
    note = {**row("gram", 1.0, kind="tune", message="{'SPLITS': 64}"), "base": None}
    assert "- gram: {'SPLITS': 64}" in tables.settings_found([note])


def test_growth_and_odd_widths():
    tokens = [row(providers.TRITON, t * 1e-6, kind="tokens", tokens=t) for t in (8192, 65536)]
    ((_, ratio),) = targets.values(target("growth in T"), tokens)
    assert ratio == pytest.approx(1.0)
    widths = [
        row(name, seconds, kind="width", d_in=d, d_out=o)
        for d, o, by in ((1536, 8960, 1.2), (1537, 8961, 1.8))
        for name, seconds in ((providers.FROZEN, 1.0), (providers.TRITON, by))
    ]
    ((_, cliff),) = targets.values(target("no cliff"), widths)
    assert cliff == pytest.approx(1.5)


def rows_of_every_kind() -> list[dict]:
    step = [
        row(name, 1e-4, kind="steps", step=f"{name}, triton", base="base forward")
        for name in ("base forward", "shrink")
    ]
    growth = [
        row(name, t * 1e-6, kind="tokens", tokens=t)
        for t in (64, 8192)
        for name in (providers.FROZEN, providers.TRITON)
    ]
    figure = [
        row(
            name,
            d * 1e-6,
            kind="dimension",
            step="conversion",
            d_in=d,
            d_out=None,
            rank=None,
            base="stereographic, eager",
        )
        for d in (256, 1024)
        for name in ("stereographic, eager", "exp/log, eager", "exp/log, our Triton")
    ]
    failed = row(providers.GEOOPT, 0.0, status="failed", message="KeyError: bfloat16")
    del failed["median_s"]
    layer = [row(providers.FROZEN, 1.0), row(providers.PEFT_8, 1.4), row(providers.TRITON, 1.1), failed]
    return [*layer, *step, *growth, *figure, *ffn_rows()]


def test_the_report_is_made_from_rows_alone(tmp_path):
    results, page, readme = tmp_path / "results", tmp_path / "performance.md", tmp_path / "README.md"
    store.save(results / "made-up-gpu", rows_of_every_kind())
    store.save(
        results / "cpu-2core", [cpu(providers.FROZEN, 1.0), cpu(providers.EAGER, 1.1), cpu(providers.PEFT_8, 1.0)]
    )
    command = ["report", "--results", str(results), "--page", str(page), "--readme", str(readme)]
    places = {page: (report.SUMMARY, report.SECTION), readme: (report.SUMMARY,)}
    for file, marks in places.items():
        between = "\nmiddle\n".join(f"{begin}\nold\n{end}" for begin, end in marks)
        file.write_text(f"before\n{between}\nafter\n")
    assert main(command) == 0
    texts = [file.read_text() for file in (page, readme)]
    for text in texts:
        assert text.startswith("before\n") and text.endswith("\nafter\n") and "\nold\n" not in text
    assert "**GPU** (Made Up GPU" in texts[0] and "**CPU** (CPU" in texts[0] and "\nmiddle\n" in texts[0]
    for text in texts:
        assert "Measured on Made Up GPU" in text and "| 1.40× | 1.10× |" in text
    made = (results / "made-up-gpu" / "report.md").read_text()
    assert "KeyError: bfloat16" in made and "not measured" in made
    on_cpu = (results / "cpu-2core" / "report.md").read_text()
    assert " ms" not in on_cpu and " µs" not in on_cpu
    plots = {path.stem for path in (results / "made-up-gpu" / "plots").glob("*.png")}
    assert {"ffn", "layer", "steps", "memory", "growth", "figure3_dimension"} <= plots
    main(command)
    assert [file.read_text() for file in (page, readme)] == texts


def test_without_a_gpu_the_page_says_what_is_not_measured(tmp_path):
    section = report.section({}, tmp_path, tmp_path)
    assert "GPU targets" in section and "CPU targets" in section and "missed" not in section
    assert "Nothing is measured" in report.summary({})


def test_the_pages_hold_what_the_stored_rows_say():
    found = report.machines()
    for name, rows in found.items():
        folder = report.RESULTS / name
        pictures = [path.relative_to(folder) for path in (folder / "plots").glob("*.png")]
        assert (folder / "report.md").read_text() == report.machine_report(name, rows, pictures)
    summary, section = report.summary(found), report.section(found, report.RESULTS, report.PAGE.parent)
    for page, marks, text in (
        (report.PAGE, report.SUMMARY, summary),
        (report.PAGE, report.SECTION, section),
        (report.README, report.SUMMARY, summary),
    ):
        assert f"\n{text}\n".join(marks) in page.read_text(), "run `python -m benchmarks report`"
