"""The decoder study's tables, from its rows alone: what was solved, against LoRA problem by problem, at what cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

from benchmarks.study import rows
from benchmarks.study.decoder.plan import BEST, ENTRIES, LORA, MOS, RATES, cells
from benchmarks.tables import table, write_between

PAGE = Path(__file__).resolve().parents[3] / "docs" / "study-decoder.md"
GLANCE = "<!-- at a glance: written by python -m benchmarks.study.decoder report -->", "<!-- end of at a glance -->"
BEGIN, END = "<!-- tables: written by python -m benchmarks.study.decoder report -->", "<!-- end of tables -->"
GIB = 2**30
UNTIMED = ("36bfa4f0388f", "188f628f6465", "285c4223a628", "5d81946f91aa")
"""Commits at which training took twice as long, by no method's doing: their seconds are compared with no others."""
SECONDS = ("train_cpu", "train", "eval_cpu")

Rows = Sequence[dict]


def run(path: Path, exports: Path, page: Path = PAGE) -> int:
    """Write the tables into the page; 2 without rows."""
    found = rows.read(path)
    if not found:
        print(f"error: {path} holds no rows: python -m benchmarks.study.decoder run")
        return 2
    parts = (*GLANCE, lambda: glance(found)), (BEGIN, END, lambda: tables(found, rows.read(exports)))
    for begin, end, text in parts:
        if not write_between(page, begin, end, text):
            print(f"error: {page} has no place for the tables: the lines {begin!r} and {end!r}")
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
    datasets = _by_dataset(found)
    for dataset, here in datasets.items():
        parts += [f"### {dataset}", _solved(here), "Against LoRA r=8 on the same problems, at the same seeds:"]
        parts += [_paired([here], LORA, RATES), "Cost, the mean of a method's runs:", _cost(here)]
    if len(datasets) > 1:
        parts += ["### Against MoS", "On the problems of all data sets, at the same seeds:"]
        parts += [_paired(list(datasets.values()), MOS, sorted(BEST))]
    if exports:
        parts += ["### What export_lora loses", _exported(exports, {row["key"]: row for row in found})]
    return "\n\n".join(parts)


def glance(found: Rows) -> str:
    """Every method at the rate at which most is solved, beside MoS, on the problems of all data sets."""
    datasets = _by_dataset(found)
    lines = []
    for entry in ENTRIES:
        runs = [_of(here, entry, BEST[0]) for here in datasets.values()]
        if not any(runs):
            continue
        solved = [f"{100 * fmean([row['solve_rate'] for row in here]):.1f}%" if here else "" for here in runs]
        groups = [group for here in datasets.values() if (group := _pairs(here, entry, MOS, BEST[0]))]
        beside = ["", ""]
        if entry != MOS and groups:
            points = _estimate([[_differences(*pair) for pair in pairs] for pairs in groups])
            beside = [_clear(*(100 * value for value in points), 1), _clear(*_estimate(_nats(groups)), 2)]
        seeds = " + ".join(str(len(here)) for here in runs)
        lines.append([entry.name, f"{next(filter(None, runs))[0]['parameters'] / 1e6:.1f}", seeds, *solved, *beside])
    heads = ("method", "parameters, millions", "seeds", *(f"solved, {dataset.upper()}" for dataset in datasets),
             "points more than MoS", "nats a problem more")  # fmt: skip
    return table(heads, lines) if lines else "not run yet"


def _clear(value: float, error: float, digits: int) -> str:
    """A difference and its standard error, in bold if it is more than twice that."""
    text = f"{value:+.{digits}f} ± {error:.{digits}f}"
    return f"**{text}**" if abs(value) > 2 * error else text


def _by_dataset(found: Rows) -> dict[str, list[dict]]:
    datasets: dict[str, list[dict]] = {}
    for row in found:
        datasets.setdefault(row["dataset"], []).append(row)
    return datasets


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
            line += [f"{100 * fmean(rates):.1f}%{_spread(rates, 100)} ({len(here)})", f"{fmean(nll):.3f}"]
        if any(line[1:]):
            lines.append(line)
    heads = ["method"]
    for rate in RATES:
        heads += [f"solved, x{rate} (seeds)", "nats a token"]
    return table(heads, lines)


def _paired(datasets: Sequence[Rows], reference, rates: Sequence[int]) -> str:
    """Problems that only the method solves, and only the reference; the differences and their standard errors.

    A method's lines are of the data sets on which both were run.
    """
    lines = []
    for entry in ENTRIES:
        for rate in rates:
            groups = [group for found in datasets if (group := _pairs(found, entry, reference, rate))]
            if entry == reference or not groups:
                continue
            less, more, difference = _changed([[_differences(*pair) for pair in pairs] for pairs in groups])
            count = " + ".join(str(len(pairs)) for pairs in groups)
            value, error = _estimate(_nats(groups))
            lines.append(
                [entry.name, f"x{rate}", count, str(more), str(less), difference, f"{value:+.3f} ± {error:.3f}"]
            )
    only = reference.name.removesuffix(" r=8")
    heads = ("method", "rate", "seeds", "only it", f"only {only}", "difference in points", "in nats a problem")
    return table(heads, lines) if lines else "not run yet"


def _pairs(found: Rows, entry, reference, rate: int) -> list[tuple[dict, dict]]:
    """The runs of a method, each with that of the reference at its seed."""
    others = {row["seed"]: row for row in _of(found, reference, rate)}
    return [(row, others[row["seed"]]) for row in _of(found, entry, rate) if row["seed"] in others]


def _differences(row: dict, other: dict) -> list[int]:
    """Of each problem: 1 where only the row's run solves it, -1 where only the other does."""
    return [int(a) - int(b) for a, b in zip(row["right"], other["right"], strict=True)]


def _nats(groups: Sequence[Sequence[tuple[dict, dict]]]) -> list[list[list[float]]]:
    """Of each pair of runs and each problem: by how many nats the first one's loss is larger."""
    return [
        [[a - b for a, b in zip(row["nll"], other["nll"], strict=True)] for row, other in pairs] for pairs in groups
    ]


def _cost(found: Rows) -> str:
    lines = []
    for entry in ENTRIES:
        here = [row for rate in RATES for row in _of(found, entry, rate)]
        if not here:
            continue
        timed = [row["seconds"] for row in here if not row["commit"].startswith(UNTIMED)]
        seconds = [f"{fmean([of[name] for of in timed]):.0f}" if timed else "" for name in SECONDS]
        memory, norm = fmean([r["peak_memory_bytes"]["train"] for r in here]), max(r["largest_grad_norm"] for r in here)
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
        lost, gained, difference = _changed([[_differences(row, before)]])
        again = "{}, {}".format(*_changed([[_differences(before, run)]])) if "mixture" in row else ""
        lines.append([
            f"{run['dataset']}, {run['entry']}, x{run['rate']}, seed {run['seed']}", str(row["rank"]),
            str(row["problems"]),
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
    found: dict[tuple[str, int], list[dict]] = {}
    for row in exports:
        if "mixture" in row and row["of"] in runs:
            found.setdefault((runs[row["of"]]["dataset"], row["rank"]), []).append(row)
    lines = []
    for (dataset, rank), here in found.items():
        lora = _changed([[_differences(row, row["mixture"]) for row in here]])
        nll = fmean([row["nll_per_token"] - row["mixture"]["nll_per_token"] for row in here])
        once = {row["of"]: row["mixture"] for row in here}
        again = _changed([[_differences(mixture, runs[of]) for of, mixture in once.items()]])
        counts = [dataset, str(rank), str(len(here)), str(len(once))]
        lines.append([*counts, *map(str, lora), f"{nll:+.4f}", *map(str, again)])
    heads = ("data set", "rank", "exports", "of mixtures", "lost", "gained", "in points",
             "nats a token", "lost by the mixture again", "gained", "in points")  # fmt: skip
    return f"Taken together:\n\n{table(heads, lines)}" if lines else ""


def _changed(groups: Sequence[Sequence[Sequence[int]]]) -> tuple[int, int, str]:
    """(problems lost, problems gained, the difference in points and its standard error); groups: see `_estimate`."""
    lost, gained = (sum(d == sign for runs in groups for run in runs for d in run) for sign in (-1, 1))
    difference, error = _estimate(groups)
    return lost, gained, f"{100 * difference:+.1f} ± {100 * error:.1f}"


def _estimate(groups: Sequence[Sequence[Sequence[float]]]) -> tuple[float, float]:
    """A mean over problems and its standard error. groups: of each data set the runs, of each run its problems."""
    problems = [
        fmean(runs) for group in groups for runs in zip(*group, strict=True)
    ]  # one is no two, whatever the runs
    return fmean(problems), stdev(problems) / math.sqrt(len(problems))


def _spread(values: Sequence[float], scale: float) -> str:
    if len(values) < 2:
        return ""
    return f" ± {scale * stdev(values):.1f}"
