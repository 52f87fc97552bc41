"""What got slower: a run held against the stored rows of the same machine, variant by variant.

On a GPU times are compared. On a CPU, whose speed depends on what else it does, the ratio to the group's base variant
is. A change counts where it exceeds the spread of both measurements (from the 20% to the 80% quantile, of the base too
where there is one) and a few percent.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from benchmarks import store

LEAST_CHANGE = 0.03


class Slower(NamedTuple):
    row: dict
    before: float  # seconds, or the ratio to the base
    after: float
    spread: float  # relative

    def __str__(self) -> str:
        shape = " ".join(f"{name}={self.row[name]}" for name in store.SHAPE if self.row.get(name) is not None)
        change, unit = self.after / self.before - 1, "" if "gpu" in self.row else f" (over {self.row['base']})"
        return (
            f"{self.row['provider']}, {self.row['kind']} {self.row['step']}, {shape}: {self.before:.4g} -> "
            f"{self.after:.4g}{unit}, {change:+.0%} where the spread is {self.spread:.0%}"
        )


def slower(stored: Iterable[dict], new: Iterable[dict]) -> list[Slower]:
    """The variants of `new` that are slower than the same ones of `stored` by more than the spread."""
    before, after = store.groups(store.measured(stored)), store.groups(store.measured(new))
    found = []
    for group, rows in after.items():
        for provider, row in rows.items():
            old = before.get(group, {}).get(provider)
            if old is None or any(old.get(name) != row.get(name) for name in ("cpu", "threads")):
                continue
            if "gpu" not in row and row.get("base") == provider:
                continue
            then, now = _value(old, before[group]), _value(row, rows)
            if then is None or now is None:
                continue
            spread = max(then[1] + now[1], LEAST_CHANGE)
            if now[0] > then[0] * (1 + spread):
                found.append(Slower(row, then[0], now[0], spread))
    return found


def _value(row: dict, group: dict[str, dict]) -> tuple[float, float] | None:
    """What is compared of a row, and its relative spread."""
    if "gpu" in row:
        return row["median_s"], _spread(row)
    base = group.get(row.get("base"))
    return None if base is None else (row["median_s"] / base["median_s"], _spread(row) + _spread(base))


def _spread(row: dict) -> float:
    return (row["q80_s"] - row["q20_s"]) / row["median_s"]
