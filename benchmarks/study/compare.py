"""What the tables say of rows: means over seeds, paired differences with intervals, how the curvature moved."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from benchmarks.study.plan import DATASETS, Entry, key_of
from benchmarks.study.rows import correct

_T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5% quantiles of Student's t at 1, 2, … degrees of freedom."""

Rows = Mapping[str, dict]


class Summary(NamedTuple):
    """Of n runs that finished; failed ones are counted apart. deviation: over seeds, NaN for a single one."""

    n: int
    failed: int
    mean: float
    deviation: float


class Difference(NamedTuple):
    """Paired by seed. seeds: half width of the 95% t interval over seeds. rows: the same over evaluation rows.

    The first says what another seed would change, and is NaN for one; the second what other evaluation data would, and
    is NaN for a metric that rows do not keep for each of them.
    """

    n: int
    mean: float
    seeds: float
    rows: float


def runs(rows: Rows, dataset: str, entry: Entry, rate: int, seeds: Iterable[int]) -> dict[int, dict]:
    """The rows of one setting, by seed."""
    keys = {seed: key_of(dataset, entry.options, rate, seed) for seed in seeds}
    return {seed: rows[key] for seed, key in keys.items() if key in rows}


def summary(found: Mapping[int, dict], metric: str = "accuracy") -> Summary | None:
    """None where nothing was run."""
    values = [row[metric] for row in found.values() if row["failure"] is None]
    failed = len(found) - len(values)
    if not found:
        return None
    mean = statistics.mean(values) if values else math.nan
    return Summary(len(values), failed, mean, statistics.stdev(values) if len(values) > 1 else math.nan)


def difference(found: Mapping[int, dict], reference: Mapping[int, dict], metric: str = "accuracy") -> Difference | None:
    """The metric minus the reference's, over the seeds that both have finished; None without one."""
    return pooled([(found, reference)], metric)


def pooled(
    comparisons: Iterable[tuple[Mapping[int, dict], Mapping[int, dict]]], metric: str = "accuracy"
) -> Difference | None:
    """As `difference`, of several comparisons (found, reference) together.

    What a seed does is alike in all of them, so each seed's pairs are averaged first, and n counts seeds.
    """
    of_seed: dict[int, list[tuple[dict, dict]]] = {}
    for found, reference in comparisons:
        for seed, row in found.items():
            if seed in reference and row["failure"] is None and reference[seed]["failure"] is None:
                of_seed.setdefault(seed, []).append((row, reference[seed]))
    if not of_seed:
        return None
    differences = [statistics.mean(a[metric] - b[metric] for a, b in pairs) for pairs in of_seed.values()]
    mean, n = statistics.mean(differences), len(differences)
    seeds = t_975(n - 1) * statistics.stdev(differences) / math.sqrt(n) if n > 1 else math.nan
    if metric != "accuracy":
        return Difference(n, mean, seeds, math.nan)
    by_seed = [_by_row(pairs) for pairs in of_seed.values()]
    by_row = [statistics.mean(column) for column in zip(*by_seed, strict=True)]
    return Difference(n, mean, seeds, 1.96 * statistics.stdev(by_row) / math.sqrt(len(by_row)))


def _by_row(pairs: Iterable[tuple[dict, dict]]) -> list[float]:
    """The mean difference in accuracy on each evaluation row."""
    columns = zip(*(zip(correct(a), correct(b), strict=True) for a, b in pairs), strict=True)
    return [statistics.mean(ours - theirs for ours, theirs in column) for column in columns]


def t_975(degrees: int) -> float:
    """From ten degrees of freedom on by Fisher's expansion, which is good to 0.003 there."""
    return _T_975[degrees - 1] if degrees <= len(_T_975) else 1.96 + 2.372 / degrees + 2.82 / degrees**2


def best_rate(rows: Rows, dataset: str, entry: Entry, seeds: Sequence[int]) -> int | None:
    """The multiple of the learning rate, of x1, x3 and x10 and those that were run, at which the mean is highest.

    Of the data set's own metric.
    """
    means = {
        rate: found.mean
        for rate in sorted(set(entry.rates) & {1, 3, 10})
        if (found := summary(runs(rows, dataset, entry, rate, seeds), DATASETS[dataset].metric)) and found.n
    }
    return max(means, key=means.get) if means else None


class Movement(NamedTuple):
    """Of the κ̂ of all curved experts of some runs. late: share of the way gone in the last quarter of the steps."""

    moved: float
    crossed: float
    late: float


def movement(found: Iterable[dict]) -> Movement | None:
    """None where no run has a curvature that moved."""
    moved, crossed, late = [], [], []
    for row in found:
        curvature = row["curvature"]
        if curvature is None:
            continue
        steps = curvature["steps"]
        quarter = next(i for i, step in enumerate(steps) if step >= 0.75 * steps[-1])
        for path in curvature["linears"].values():
            for expert, space in enumerate(curvature["spaces"]):
                values = [point[expert] for point in path]
                if space == "euclidean":
                    continue
                ways = [abs(after - before) for before, after in zip(values, values[1:], strict=False)]
                moved.append(abs(values[-1] - values[0]))
                crossed.append(values[0] * values[-1] < 0)
                if sum(ways):
                    late.append(sum(ways[quarter:]) / sum(ways))
    if not late:
        return None
    return Movement(statistics.mean(moved), statistics.mean(crossed), statistics.mean(late))
