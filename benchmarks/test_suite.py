"""The same groups through pytest-benchmark: `python -m pytest benchmarks` (its table, --benchmark-json, its compare).

pytest-benchmark measures one test after the other, and variants must be interleaved. So the first test of a group
measures the whole group, and each of its tests hands one variant's rounds over through a timer that replays them.
MOS_BENCHMARKS chooses "tiny", "quick" (the default) or "full"; -k layer, -k steps and the like choose groups.
"""

from __future__ import annotations

import functools
import os

import pytest
import torch

from benchmarks import cases, ceilings, providers, suite
from benchmarks.measure import Budget

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed: use python -m benchmarks run")

CUDA = torch.cuda.is_available()
CONTEXT = suite.Context(
    torch.device("cuda" if CUDA else "cpu"), torch.bfloat16 if CUDA else torch.float32,
    os.environ.get("MOS_BENCHMARKS", "quick"),
)  # fmt: skip
if CONTEXT.tiny:
    providers.COMPILE_BACKEND = "eager"


class Replay:
    """A timer that lets the given seconds pass between its calls, two calls a round."""

    def __init__(self) -> None:
        self.now, self.rounds, self.running = 0.0, iter(()), False

    def load(self, seconds: list[float]) -> None:
        self.rounds = iter(seconds)

    def __call__(self) -> float:
        if self.running:
            self.now += next(self.rounds)
        self.running = not self.running
        return self.now


@functools.cache
def top() -> ceilings.Ceilings:
    return ceilings.measure(CONTEXT.device, CONTEXT.dtype, CONTEXT.tiny)


@functools.cache
def measured(index: int) -> dict[str, dict]:
    rows = suite.run_group(GROUPS[index], CONTEXT, top(), Budget(3600))
    return {row["provider"]: row for row in rows}


GROUPS = list(cases.plan(CONTEXT))


def _variants():
    for index, group in enumerate(GROUPS):
        for name in group.variants:
            replay = Replay()
            mark = pytest.mark.benchmark(group=group.name, timer=replay)
            yield pytest.param(index, name, replay, marks=mark, id=f"{group.name}, {name}")


@pytest.mark.parametrize(("index", "name", "replay"), list(_variants()))
def test_variant(index, name, replay, benchmark):
    row = measured(index)[name]
    if row["status"] == "failed":
        pytest.fail(row["message"])
    if row["status"] != "ok":
        pytest.skip(f"{row['status']}: {row['message']}")
    replay.load(row.pop("seconds"))
    benchmark.extra_info.update(row)
    benchmark.pedantic(lambda: None, rounds=row["rounds"])
