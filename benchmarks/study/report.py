"""Tables and plots from the rows alone: `python -m benchmarks.study report`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.study import compare, figures
from benchmarks.study import rows as stored
from benchmarks.study.plan import COMPARISONS, DATASETS, LORA, SEEDS, TABLES, TITLES, Entry, cells, entries
from benchmarks.tables import table, write_between
from mos_kernels.run_report.log import write_text

PAGES = Path(__file__).resolve().parents[2] / "docs" / "study"
NOT_RUN = "not run yet"
BEGIN, END = "<!-- overview: written by python -m benchmarks.study report -->", "<!-- end of overview -->"
METRICS = {name: dataset.metric for name, dataset in DATASETS.items()}


def run(rows_path: Path, output: Path) -> int:
    """Write tables.md and the plots into `output`, and the overview into the page beside it; 2 without rows."""
    rows = {row["key"]: row for row in stored.read(rows_path)}
    if not rows:
        print(f"error: {rows_path} holds no rows: python -m benchmarks.study run")
        return 2
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "tables.md", page(rows, output))
    write_between(output.parent / "study.md", BEGIN, END, lambda: overview(rows))
    print(f"{len(rows)} rows: {output / 'tables.md'}")
    return 0


def page(rows: compare.Rows, output: Path | None = None) -> str:
    """tables.md. The plots are drawn into `output`, where given."""
    seeds = _seeds(rows)
    planned = {cell.key for cell in cells(seeds=SEEDS)}
    done = sum(key in planned for key in rows)
    commits = sorted({row["commit"][:12] for row in rows.values()})
    parts = [
        "# The study: tables",
        "[The study](../study.md) says what was found, and what the names of the settings mean. `python -m "
        f"benchmarks.study report` makes this page from {len(rows)} rows: {done} of the {len(planned)} planned runs, "
        f"with {len(SEEDS)} seeds, and {len(rows) - done} runs with further seeds. Commits: {', '.join(commits)}.",
        "- **Accuracy** is the mean ± standard deviation over seeds. Their number is in brackets where it is not "
        f"{len(SEEDS)}.\n"
        f"- **A difference** is to {LORA.name} at the same seeds. In brackets are 95% half widths: over seeds "
        "(Student's t), for another seed; then, for accuracy, over evaluation rows, for other data. A * marks a "
        "difference that exceeds both.\n"
        "- **A learning rate** xN is N·3e-4.\n"
        "- **Best** is the best of x1, x3 and x10 that were run, by accuracy on svamp and by Matthews correlation on "
        "cola. It is picked on the evaluation data itself, which is optimistic, for every method alike.\n"
        "- **An empty cell** is not planned.",
    ]
    for dataset in DATASETS:
        parts += _dataset(rows, dataset, seeds, output)
    return "\n\n".join(parts) + "\n"


def _seeds(rows: compare.Rows) -> list[int]:
    return sorted({*SEEDS, *(row["seed"] for row in rows.values())})


def overview(rows: compare.Rows) -> str:
    """How much was run, and each setting's mean on each data set at each learning rate."""
    planned = cells(METRICS, seeds=SEEDS)
    heads, lines = ["mean ± standard deviation (seeds, where not 3)"], []
    seeds = _seeds(rows)
    for dataset, metric in METRICS.items():
        heads += [f"{dataset}, {metric.partition('_')[0]}, x1", "x3", "x10"]
    majority = {row["dataset"]: row["majority"] for row in rows.values() if row["failure"] is None}
    shown = {dataset: majority.get(dataset) if metric == "accuracy" else 0.0 for dataset, metric in METRICS.items()}
    lines.append(["the majority class", *("" if v is None else f"{v:.3f}" for v in shown.values() for _ in range(3))])
    for entry in entries():
        line = [entry.name]
        for dataset, metric in METRICS.items():
            for rate in (1, 3, 10):
                found = compare.runs(rows, dataset, entry, rate, seeds)
                line.append(_mean(found, metric) if found else "")
        if any(line[1:]):
            lines.append(line)
    done = {
        dataset: f"{sum(cell.key in rows for cell in planned if cell.dataset == dataset)} of "
        f"{sum(cell.dataset == dataset for cell in planned)} on {dataset}"
        for dataset in METRICS
    }
    facts = f"{sum(cell.key in rows for cell in planned)} of the {len(planned)} planned runs are done"
    return f"{facts}: {', '.join(done.values())}.\n\n{table(heads, lines)}"


def _dataset(rows, dataset: str, seeds: Sequence[int], output: Path | None) -> list[str]:
    here = [row for row in rows.values() if row["dataset"] == dataset]
    planned = cells([dataset], seeds=SEEDS)
    done = sum(cell.key in rows for cell in planned)
    if not here:
        return [f"## {dataset}", f"{NOT_RUN.capitalize()}: 0 of {len(planned)} runs."]
    finished = [row for row in here if row["failure"] is None]
    facts = f"{done} of {len(planned)} planned runs are done, {len(here) - len(finished)} of them failed, "
    facts += f"{sum(row['nan'] for row in here)} saw a NaN or an infinity."
    if finished:
        one = finished[0]
        facts += f" {one['train_rows']} rows to train on in {one['steps']} steps, {sum(one['eval_rows'].values())} to "
        facts += f"evaluate on, the majority class {one['majority']:.3f}"
        facts += ", batches of like lengths." if one["group_by_length"] else "."
    parts = [f"## {dataset}", facts]
    for name, listed in TABLES.items():
        if name == "stability":
            continue
        parts += [f"### {TITLES[name]}", _accuracies(rows, dataset, listed, seeds)]
        parts += [f"Accuracy minus that of {LORA.name}:", _differences(rows, dataset, listed, seeds)]
        parts += ["Evaluation loss in nats, and minus that of LoRA:", _losses(rows, dataset, listed, seeds)]
    parts += [
        "### Settings against each other",
        "Runs are paired by setting, rate and seed. The pairs of a seed are averaged first. The number of seeds is in "
        "the brackets.",
        _pooled(rows, dataset, seeds),
    ]
    parts += [f"### {TITLES['stability']}: largest norm of the gradient", _stability(rows, dataset, seeds)]
    parts += ["### Norms by space", _norms(rows, dataset, seeds)]
    parts += ["### Figure 2: how the curvature moved", _movements(rows, dataset, seeds)]
    if output is not None:
        parts += [f"![{about}]({name})" for name, about in figures.draw(rows, dataset, seeds, output)]
    missing = _missing(rows, dataset)
    return parts + ([f"### {NOT_RUN.capitalize()}", missing] if missing else [])


def _accuracies(rows, dataset: str, listed: Iterable[Entry], seeds) -> str:
    lines = []
    for entry in listed:
        found = {rate: compare.runs(rows, dataset, entry, rate, seeds) for rate in (1, 3, 10)}
        best = compare.best_rate(rows, dataset, entry, seeds)
        parameters = next((r["parameters"] for f in found.values() for r in f.values() if "parameters" in r), None)
        at_best = ["", "", ""]
        if best is not None:
            at_best = [f"x{best}", *(_mean(found[best], metric) for metric in ("matthews_correlation", "loss"))]
        lines.append(
            [
                entry.name,
                "" if parameters is None else f"{parameters['adapter']:,}",
                *(_mean(found[rate], "accuracy") if DATASETS[dataset].has(entry, rate) else "" for rate in found),
                *at_best,
            ]
        )
    heads = ("method", "adapter", "x1", "x3", "x10", "best", "Matthews at best", "loss at best")
    return table(heads, lines)


def _differences(rows, dataset: str, listed: Iterable[Entry], seeds) -> str:
    lines = []
    for entry in listed:
        if entry == LORA:
            continue
        line = [entry.name]
        for rate in (1, 3, 10):
            reference = compare.runs(rows, dataset, LORA, rate, seeds)
            one = compare.difference(compare.runs(rows, dataset, entry, rate, seeds), reference)
            line.append(_signed(one) if DATASETS[dataset].has(entry, rate) else "")
        rates = [compare.best_rate(rows, dataset, one, seeds) for one in (entry, LORA)]
        if None in rates:
            line.append(NOT_RUN if any(DATASETS[dataset].has(entry, rate) for rate in entry.rates) else "")
        else:
            ours, theirs = (
                compare.runs(rows, dataset, one, rate, seeds) for one, rate in zip((entry, LORA), rates, strict=True)
            )
            line.append(_signed(compare.difference(ours, theirs)))
        lines.append(line)
    return table(("method", "x1", "x3", "x10", "each at its best"), lines)


def _pooled(rows, dataset: str, seeds) -> str:
    lines, (low, high) = [], DATASETS[dataset].compared
    of_metric = {metric: ((low,), (high,), (low, high)) for metric in ("accuracy", METRICS[dataset])}
    of_metric["loss"] = ((low, high),)
    heads = ["comparison"]
    for metric, several in of_metric.items():
        named = [" and ".join(f"x{rate}" for rate in rates) for rates in several]
        heads += [f"{metric.partition('_')[0]}, {named[0]}", *named[1:]]
    for name, pairs in COMPARISONS.items():
        line = [name]
        for metric, several in of_metric.items():
            for rates in several:
                found = compare.pooled(
                    [
                        tuple(compare.runs(rows, dataset, entry, rate, seeds) for entry in pair)
                        for pair in pairs
                        for rate in rates
                    ],
                    metric,
                )
                line.append(_signed(found, counted=True))
        if set(line[1:]) != {NOT_RUN}:
            lines.append(line)
    return table(heads, lines) if lines else NOT_RUN


def _losses(rows, dataset: str, listed: Iterable[Entry], seeds) -> str:
    lines = []
    for entry in listed:
        found = {rate: compare.runs(rows, dataset, entry, rate, seeds) for rate in (1, 3, 10)}
        planned = {rate: DATASETS[dataset].has(entry, rate) for rate in found}
        line = [entry.name, *(_mean(found[rate], "loss") if planned[rate] else "" for rate in found)]
        for rate in found:
            reference = compare.runs(rows, dataset, LORA, rate, seeds)
            one = compare.difference(found[rate], reference, "loss")
            line.append(_signed(one) if entry != LORA and planned[rate] else "")
        lines.append(line)
    return table(("method", "x1", "x3", "x10", "difference at x1", "at x3", "at x10"), lines)


def _stability(rows, dataset: str, seeds) -> str:
    lines = []
    for entry in entries():
        line, seen = [entry.name], 0
        for rate in (1, 3, 10, 30):
            found = compare.runs(rows, dataset, entry, rate, seeds).values()
            seen += len(found)
            norms = [row["largest_grad_norm"] for row in found if row["largest_grad_norm"] is not None]
            failed = sum(row["failure"] is not None for row in found)
            text = f"{max(norms):.3g}" if norms else NOT_RUN if DATASETS[dataset].has(entry, rate) else ""
            line.append(text + (f", {failed} of {len(found)} failed" if failed else ""))
        planned = DATASETS[dataset].has(entry, 30)
        line.append(_mean(compare.runs(rows, dataset, entry, 30, seeds), "accuracy") if planned else "")
        if seen or planned:
            lines.append(line)
    return table(("method", "x1", "x3", "x10", "x30", "accuracy at x30"), lines)


def _norms(rows, dataset: str, seeds) -> str:
    lines = []
    for entry in entries(("units", "boundary", "table3", "table2", "routing")):
        for rate in (10, 3, 1, 30):
            measured = figures.mean_norms(list(compare.runs(rows, dataset, entry, rate, seeds).values()))
            if len(measured) < 2:
                continue
            line = [entry.name, f"x{rate}"]
            for space in ("hyperbolic", "spherical", "euclidean"):
                values = [measured[when].get(f"{space} {what}") for what in ("norm", "factor") for when in measured]
                line += ["", ""] if None in values else [_arrow(*values[:2]), _arrow(*values[2:])]
            lines.append([*line, f"{measured['last']['base norm']:.3g}"])
    heads = ("setting", "rate")
    for space in ("hyperbolic", "spherical", "Euclidean"):
        heads += (space, "its λe")
    if not lines:
        return NOT_RUN
    about = "From the third step to the last: the mean norm of an expert's output before its gate, and λe, the factor "
    about += "that the geometry puts on B A x (1 for a Euclidean expert)."
    return about + "\n\n" + table((*heads, "frozen linear"), lines)


def _movements(rows, dataset: str, seeds) -> str:
    lines = []
    for entry in entries(("units", "boundary", "table3", "table2", "routing")):
        for rate in (10, 3, 1, 30):
            found = compare.movement(compare.runs(rows, dataset, entry, rate, seeds).values())
            if found:
                moved = f"{found.moved:.3f}"
                lines.append([entry.name, f"x{rate}", moved, f"{100 * found.crossed:.0f}%", f"{100 * found.late:.0f}%"])
    heads = ("setting", "rate", "mean change of κ̂", "experts that changed sign", "of the way in the last quarter")
    return table(heads, lines) if lines else NOT_RUN


def _missing(rows, dataset: str) -> str:
    counts: dict[str, dict[int, int]] = {}
    for cell in cells([dataset], seeds=SEEDS):
        if cell.key not in rows:
            of_entry = counts.setdefault(cell.entry.name, {})
            of_entry[cell.rate] = of_entry.get(cell.rate, 0) + 1
    each = [
        f"{name} ({', '.join(f'{count} at x{rate}' for rate, count in sorted(rates.items()))})"
        for name, rates in counts.items()
    ]
    return f"Runs, by learning rate: {'; '.join(each)}." if each else ""


def _mean(found, metric: str) -> str:
    one = compare.summary(found, metric)
    if one is None:
        return NOT_RUN
    if not one.n:
        return f"{one.failed} of {one.failed} failed"
    text = f"{one.mean:.3f}" + ("" if math.isnan(one.deviation) else f" ± {one.deviation:.3f}")
    text += f" ({one.n})" if one.n != len(SEEDS) else ""
    return text + (f", {one.failed} failed" if one.failed else "")


def _signed(found: compare.Difference | None, counted: bool = False) -> str:
    if found is None:
        return NOT_RUN
    if math.isnan(found.seeds):
        return f"{found.mean:+.3f} (1)"
    widths = [width for width in (found.seeds, found.rows) if not math.isnan(width)]
    clear = "*" if abs(found.mean) > max(widths) else ""
    count = f"{found.n}: " if counted else ""
    return f"{found.mean:+.3f}{clear} ({count}± {' / '.join(f'{width:.3f}' for width in widths)})"


def _arrow(first: float, last: float) -> str:
    return f"{first:.3g} → {last:.3g}"
