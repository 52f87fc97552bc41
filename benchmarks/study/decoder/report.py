"""The decoder study's tables, from its rows alone: what was solved, against LoRA problem by problem, at what cost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.study import rows
from benchmarks.study.decoder.plan import ENTRIES, LORA, RATES, cells
from benchmarks.tables import table, write_between

PAGE = Path(__file__).resolve().parents[3] / "docs" / "study-decoder.md"
BEGIN, END = "<!-- tables: written by python -m benchmarks.study.decoder report -->", "<!-- end of tables -->"
GIB = 2**30
UNTIMED = ("36bfa4f0388f", "188f628f6465", "285c4223a628")
"""Commits at which training took twice as long, by no method's doing: their seconds are compared with no others."""
SECONDS = ("train_cpu", "train", "eval_cpu")

Rows = Sequence[dict]


def run(path: Path, exports: Path, page: Path = PAGE) -> int:
    """Write the tables into the page; 2 without rows."""
    found = rows.read(path)
    if not found:
        print(f"error: {path} holds no rows: python -m benchmarks.study.decoder run")
        return 2
    if not write_between(page, BEGIN, END, lambda: tables(found, rows.read(exports))):
        print(f"error: {page} has no place for the tables: the lines {BEGIN!r} and {END!r}")
        return 2
    print(f"{len(found)} rows: {page}")
    return 0


def tables(found: Rows, exports: Rows = ()) -> str:
    """All tables, data set by data set."""
    planned = {cell.key for cell in cells()}
    done = sum(row["key"] in planned for row in found)
    more = f", and {len(found) - done} more" if done < len(found) else ""
    commits = ", ".join(sorted({row["commit"][:12] for row in found}))
    parts = [f"{done} of {len(planned)} planned runs are done{more}. Commits: {commits}."]
    for dataset in dict.fromkeys(row["dataset"] for row in found):
        here = [row for row in found if row["dataset"] == dataset]
        parts += [f"### {dataset}", _solved(here), "Against LoRA r=8 on the same problems, at the same seeds:"]
        parts += [_paired(here), "Cost, the mean of a method's runs:", _cost(here)]
    if exports:
        parts += ["### What export_lora loses", _exported(exports, {row["key"]: row for row in found})]
    return "\n\n".join(parts)


def _of(found: Rows, entry, rate: int) -> list[dict]:
    here = [row for row in found if row["entry"] == entry.name and row["rate"] == rate and row["failure"] is None]
    return sorted(here, key=lambda row: row["seed"])


def _solved(found: Rows) -> str:
    """Share solved, and nats a token of the true equation; the mean over seeds, and their number."""
    lines = []
    for entry in ENTRIES:
        line = [entry.name]
        for rate in RATES:
            here = _of(found, entry, rate)
            if not here:
                line += ["", ""]
                continue
            rates, nll = [row["solve_rate"] for row in here], [row["nll_per_token"] for row in here]
            line += [f"{100 * _mean(rates):.1f}%{_spread(rates, 100)} ({len(here)})", f"{_mean(nll):.3f}"]
        if any(line[1:]):
            lines.append(line)
    heads = ["method"]
    for rate in RATES:
        heads += [f"solved, x{rate} (seeds)", "nats a token"]
    return table(heads, lines)


def _paired(found: Rows) -> str:
    """Problems that only the method solves, and only LoRA; the difference, and its standard error over problems."""
    lines = []
    for entry in ENTRIES:
        for rate in RATES:
            reference = {row["seed"]: row for row in _of(found, LORA, rate)}
            pairs = [(row, reference[row["seed"]]) for row in _of(found, entry, rate) if row["seed"] in reference]
            if entry == LORA or not pairs:
                continue
            each = [_differences(*pair) for pair in pairs]
            less, more, difference = _changed(each)
            nll = _mean([row["nll_per_token"] - other["nll_per_token"] for row, other in pairs])
            lines.append([
                entry.name, f"x{rate}", str(len(pairs)), str(more), str(less), difference, f"{nll:+.3f}",
            ])  # fmt: skip
    heads = ("method", "rate", "seeds", "only it", "only LoRA", "difference in points", "in nats a token")
    return table(heads, lines) if lines else "not run yet"


def _differences(row: dict, other: dict) -> list[int]:
    """Of each problem: 1 where only the row's run solves it, -1 where only the other does."""
    return [int(a) - int(b) for a, b in zip(row["right"], other["right"], strict=True)]


def _cost(found: Rows) -> str:
    lines = []
    for entry in ENTRIES:
        here = [row for rate in RATES for row in _of(found, entry, rate)]
        if not here:
            continue
        timed = [row["seconds"] for row in here if not row["commit"].startswith(UNTIMED)]
        seconds = [f"{_mean([of[name] for of in timed]):.0f}" if timed else "" for name in SECONDS]
        memory, norm = _mean([r["peak_memory_bytes"]["train"] for r in here]), max(r["largest_grad_norm"] for r in here)
        lines.append([entry.name, f"{here[0]['parameters']:,}", *seconds, f"{memory / GIB:.2f}", f"{norm:.3g}"])
    heads = ("method", "trained parameters", "training, s of processor", "by the clock", "scoring, s of processor",
             "peak memory, GiB", "largest gradient norm")  # fmt: skip
    return table(heads, lines)


def _exported(exports: Rows, runs: dict[str, dict]) -> str:
    """Mixture and LoRA on the same problems; "again": the mixture's scores in the row beside those of its run."""
    lines = []
    for row in exports:
        run = runs.get(row["of"])
        if run is None:
            continue
        before = row.get("mixture", run)
        lost, gained, difference = _changed([_differences(row, before)])
        again = "{}, {}".format(*_changed([_differences(before, run)])) if "mixture" in row else ""
        lines.append([
            f"{run['entry']}, x{run['rate']}, seed {run['seed']}", str(row["rank"]), str(row["problems"]),
            str(row.get("draw", 0)), f"{row['error']:.3f}", f"{row['kl']:.4f}",
            f"{100 * row['agreement']:.1f}%", f"{before['solved']} → {row['solved']}", f"{lost}, {gained}", difference,
            f"{before['nll_per_token']:.3f} → {row['nll_per_token']:.3f}", again,
            f"{row['cpu_seconds']:.0f}",
        ])  # fmt: skip
    heads = ("run", "rank", "problems fitted on", "draw", "relative error", "KL, nats", "same token",
             "solved", "lost, gained", "difference in points", "nats a token",
             "lost, gained by the mixture again", "s of processor")  # fmt: skip
    return "\n\n".join([table(heads, lines), _pooled(exports, runs)]) if lines else "not run yet"


def _pooled(exports: Rows, runs: dict[str, dict]) -> str:
    """The exports of one rank taken together, those whose rows have the mixture's scores."""
    found: dict[int, list[dict]] = {}
    for row in exports:
        if "mixture" in row and row["of"] in runs:
            found.setdefault(row["rank"], []).append(row)
    lines = []
    for rank, here in found.items():
        lora = _changed([_differences(row, row["mixture"]) for row in here])
        nll = _mean([row["nll_per_token"] - row["mixture"]["nll_per_token"] for row in here])
        once = {row["of"]: row["mixture"] for row in here}
        again = _changed([_differences(mixture, runs[of]) for of, mixture in once.items()])
        lines.append([str(rank), str(len(here)), str(len(once)), *map(str, lora), f"{nll:+.4f}", *map(str, again)])
    heads = ("rank", "exports", "of mixtures", "lost", "gained", "in points", "nats a token",
             "lost by the mixture again", "gained", "in points")  # fmt: skip
    return f"Taken together:\n\n{table(heads, lines)}" if lines else ""


def _changed(each: Sequence[Sequence[int]]) -> tuple[int, int, str]:
    """(problems lost, problems gained, the difference in points and its standard error over problems); each: by run."""
    lost, gained = (sum(d == sign for differences in each for d in differences) for sign in (-1, 1))
    size = sum(map(len, each))
    of_problems = [sum(runs) for runs in zip(*each, strict=True)]  # one problem is no two, whatever the runs
    difference, error = 100 * (gained - lost) / size, 100 * math.hypot(*of_problems) / size
    return lost, gained, f"{difference:+.1f} ± {error:.1f}"


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def _spread(values: Sequence[float], scale: float) -> str:
    if len(values) < 2:
        return ""
    mean = _mean(values)
    return f" ± {scale * math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)):.1f}"
