"""The plots of the study, from rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.study import compare
from benchmarks.study.curvature import new_figure, plot_curvature
from benchmarks.study.plan import BASE, DATASETS, FIXED, MOS, PAPER, RAW_UNITS, TABLES, Entry, entries
from mos_kernels.run_report.charts import COLORS

CURVATURE = (MOS, PAPER, RAW_UNITS, *(entry for entry in TABLES["table2"] if entry not in (MOS, FIXED)))
_STYLES = ("-o", "--s", "-^", "--D", "-v", "--x", "-P", "--*", "-<", "-->", "-h")


def slug(entry: Entry) -> str:
    return "-".join(option.strip("-") for option in entry.options[1:]).replace("=", "").replace(",", "-")


def draw(rows: compare.Rows, dataset: str, seeds: Sequence[int], folder: Path) -> list[tuple[str, str]]:
    """Draw what there are rows for; (file name, what it shows) of each."""
    drawn = []
    if _runs_at_best(rows, dataset, seeds, folder / f"best-{dataset}.png"):
        drawn.append((f"best-{dataset}.png", "every run of each setting at its best learning rate"))
    if _rates(rows, dataset, seeds, folder / f"rates-{dataset}.png"):
        drawn.append((f"rates-{dataset}.png", "each method over the learning rate"))
    if _norms(rows, dataset, seeds, folder / f"norms-{dataset}.png"):
        drawn.append((f"norms-{dataset}.png", "norm of the experts' outputs by space"))
    for entry in CURVATURE:
        for rate in dict.fromkeys((DATASETS[dataset].main_rate, 1)):
            found = compare.runs(rows, dataset, entry, rate, seeds)
            row = next((row for row in found.values() if row["curvature"]), None)
            if row is None:
                continue
            name = f"curvature-{dataset}-{slug(entry)}-x{rate}.png"
            about = f"curvature of every expert: {entry.name}, learning rate x{rate}, seed {row['seed']}"
            curvature = row["curvature"]
            log = [
                {"step": step, "curvature": {linear: path[i] for linear, path in curvature["linears"].items()}}
                for i, step in enumerate(curvature["steps"])
            ]
            plot_curvature(log, curvature["spaces"], folder / name, f"{dataset}: {about}")
            drawn.append((name, about))
    return drawn


def _runs_at_best(rows, dataset: str, seeds, path: Path) -> bool:
    metric = DATASETS[dataset].metric
    found = []
    for entry in entries():
        rate = compare.best_rate(rows, dataset, entry, seeds)
        one = None if rate is None else compare.runs(rows, dataset, entry, rate, seeds)
        if one and entry != BASE:
            values = [row[metric] for row in one.values() if row["failure"] is None]
            found.append((compare.summary(one, metric).mean, f"{entry.name}, x{rate}", values, entry))
    if not found:
        return False
    found.sort(key=lambda setting: setting[0])
    figure, axes = new_figure(9, 1.2 + 0.27 * max(len(found), 2))
    for position, (mean, _, values, entry) in enumerate(found):
        color = "C0" if entry in TABLES["table1"] else "C1"
        axes.plot(values, [position] * len(values), "o", color=color, alpha=0.45, ms=6, mew=0)
        axes.plot(mean, position, "|", color="black", ms=14, mew=2)
    axes.set_yticks(range(len(found)), [f"{name} ({len(values)})" for _, name, values, _ in found], fontsize=8)
    for (*_, entry), label in zip(found, axes.get_yticklabels(), strict=True):
        label.set_fontweight("bold" if entry == MOS else "normal")
    axes.plot([], [], "o", color="C0", label="a run: methods (Table 1)")
    axes.plot([], [], "o", color="C1", label="a run: settings of MoS")
    axes.plot([], [], "|", color="black", ms=10, mew=2, label="mean")
    axes.set(xlabel=metric.replace("_", " "), title=f"{dataset}: each at its best learning rate (number of seeds)")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    figure.savefig(path, dpi=110)
    return True


def _rates(rows, dataset: str, seeds, path: Path) -> bool:
    metric = DATASETS[dataset].metric
    figure, axes = new_figure(9.5, 5)
    found = {}
    for entry in (*TABLES["table1"], RAW_UNITS):
        points = [
            (rate, one)
            for rate in sorted(entry.rates)
            if (one := compare.summary(compare.runs(rows, dataset, entry, rate, seeds), metric)) and one.n
        ]
        if points:
            found[entry.name] = points
    for i, (name, points) in enumerate(found.items()):
        x = [rate * (1 + 0.015 * (i - len(found) / 2)) for rate, _ in points]
        deviations = [one.deviation if one.n > 1 else 0.0 for _, one in points]
        style = {"lw": 2.4, "color": "black"} if name == MOS.name else {"lw": 1.2}
        axes.errorbar(x, [one.mean for _, one in points], deviations, fmt=_STYLES[i], label=name, capsize=2, **style)
    majority = next((row["majority"] for row in rows.values() if row["dataset"] == dataset and "majority" in row), None)
    if majority is not None:
        majority = majority if metric == "accuracy" else 0.0
        axes.axhline(majority, color="grey", ls=":", label="majority class")
    axes.set(
        xscale="log",
        xlabel="learning rate, in 3e-4",
        ylabel=f"{metric.replace('_', ' ')} (mean ± standard deviation over seeds)",
    )
    axes.set_xticks([1, 3, 10, 30], ["1", "3", "10", "30"])
    axes.set_title(dataset)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    if found:
        figure.savefig(path, dpi=110)
    return bool(found)


def _norms(rows, dataset: str, seeds, path: Path) -> bool:
    rate = DATASETS[dataset].main_rate
    entries = {entry.name: entry for table in ("units", "boundary", "table3") for entry in TABLES[table]}
    found = [
        (name, measured)
        for name, entry in entries.items()
        if (measured := mean_norms(list(compare.runs(rows, dataset, entry, rate, seeds).values())))
    ]
    figure, axes = new_figure(9, 1.2 + 0.42 * max(len(found), 2))
    for position, (_, measured) in enumerate(found):
        for space, colors in COLORS.items():
            for when, marker in (("first", "o"), ("last", "D")):
                value = measured.get(when, {}).get(f"{space} norm")
                if value is not None:
                    axes.plot(max(value, 1e-5), -position, marker, color=colors[1], fillstyle=_FILL[when])
    axes.set_yticks([-i for i in range(len(found))], [name for name, _ in found], fontsize=8)
    axes.set(xscale="log", xlabel="mean norm of an expert's output: hollow at step 3, filled at the last step")
    for space, colors in COLORS.items():
        axes.plot([], [], "D", color=colors[1], label=space)
    axes.set_title(f"{dataset}, learning rate x{rate}", fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    if found:
        figure.savefig(path, dpi=110)
    return bool(found)


_FILL = {"first": "none", "last": "full"}


def mean_norms(found: Sequence[dict]) -> dict[str, dict[str, float]]:
    """{"first" and "last": {name: mean over the runs}} of what `norms.ExpertNorms` measured."""
    measured = [row["norms"] for row in found if row["norms"]]
    means: dict[str, dict[str, float]] = {}
    for when in ("first", "last"):
        values = [one[when] for one in measured if when in one]
        if values:
            means[when] = {name: sum(value[name] for value in values) / len(values) for name in values[0]}
    return means
