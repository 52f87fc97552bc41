"""Groups of variants, measured: what is left of a run's rows is made here.

A group is what is interleaved: its variants answer one question on one shape. Every variant is built lazily, so that
one that does not fit, or fails, is recorded with its reason and the others go on; compiled variants are built last and
under a time limit. A variant of ours is timed only where its checks hold. A row holds a variant's quantiles, the bytes
and FLOP of the work, and everything it was made with.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.ceilings import Ceilings
from benchmarks.measure import (
    Budget,
    Call,
    CallFailed,
    LeftOut,
    Outcome,
    attempt,
    captured,
    device_launches,
    host_seconds,
    interleaved,
    launches,
    operations,
    peak_bytes,
    quantiles,
    release_memory,
    saved_bytes,
    synchronize,
    time_limit,
)
from benchmarks.providers import why_no_triton


@dataclass(frozen=True)
class Context:
    """What a run is made on. mode: "tiny" (checks that everything runs), "quick" or "full"."""

    device: torch.device
    dtype: torch.dtype
    mode: str

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def tiny(self) -> bool:
        return self.mode == "tiny"

    @property
    def full(self) -> bool:
        return self.mode == "full"

    @property
    def rounds(self) -> int:
        if self.tiny:
            return 1
        if self.cuda:
            return 100 if self.full else 30
        return 9 if self.full else 5

    @property
    def group_seconds(self) -> float:
        """How long the rounds of one group may take."""
        return (30 if self.full else 6) if self.cuda else (240 if self.full else 45)

    @property
    def warmup_s(self) -> float | None:
        if self.tiny:
            return None
        return (3.0 if self.full else 1.0) if self.cuda else 0

    @property
    def least_s(self) -> float:
        """How long the rounds of one group take at least, where calls are short."""
        return 0.0 if self.tiny else 1.0

    @property
    def compile_s(self) -> float:
        """How long the compilation of one variant may take."""
        return (180 if self.full else 45) if self.cuda else 120


class Shared:
    """What the variants of a group share, made at its first use and dropped with the group."""

    def __init__(self, make: Callable[[], Any]):
        self._make, self._made = make, None

    def __call__(self) -> Any:
        if self._made is None:
            self._made = self._make()
        return self._made

    def drop(self) -> None:
        self._made = None


@dataclass
class Made:
    """A variant, ready to run. forward and owned: for the bytes saved for backward, beyond the owned tensors.

    note: what its row says of how it was made.
    """

    call: Call
    forward: Callable[[], Tensor] | None = None
    owned: list[Tensor] = field(default_factory=list)
    note: str = ""


class Check(NamedTuple):
    """What must hold before a variant is timed; run once a process for each key. run: what does not hold."""

    key: Hashable
    name: str
    run: Callable[[], list[str]]


@dataclass
class Variant:
    """moved, flop: the least bytes through memory and the arithmetic of one call, to be held against the ceilings."""

    make: Callable[[], Made]
    moved: int | None = None
    flop: int | None = None
    compiled: bool = False
    step: str | None = None
    checks: Sequence[Check] = ()


@dataclass
class Group:
    """kind: the question ("layer", "steps", …). base: the variant that ratios are taken to. repeats: calls a graph."""

    kind: str
    step: str
    shape: dict[str, int]
    variants: dict[str, Variant]
    base: str | None = None
    clock: str = "events"
    repeats: int = 1
    weigh: bool = False
    shared: list[Shared] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.kind}: {self.step}, " + " ".join(f"{key}={value}" for key, value in self.shape.items())


_found: dict[Hashable, list[str]] = {}


def verdict(checks: Sequence[Check]) -> Outcome:
    """Whether these hold, and what does not, with the name of its check. One that raised is made again when asked."""
    for check in checks:
        if check.key not in _found:
            found, outcome = attempt(check.run)
            if found is None:
                return Outcome(outcome.status, f"gate: {check.name}: {outcome.message}")
            _found[check.key] = found
    failed = [f"{check.name}: {failure}" for check in checks for failure in _found[check.key]]
    return Outcome("failed", "gate: " + "; ".join(failed)) if failed else Outcome("ok")


def run_group(
    group: Group, context: Context, ceilings: Ceilings, budget: Budget, keep: Callable[[list[dict]], None] | None = None
) -> list[dict]:
    """A row for each variant of the group. keep: given the rows as soon as they are timed, before they are weighed."""
    try:
        return _run_group(group, context, ceilings, budget, keep)
    finally:
        for shared in group.shared:
            shared.drop()
        release_memory()


def _run_group(group, context: Context, ceilings: Ceilings, budget: Budget, keep) -> list[dict]:
    outcomes: dict[str, Outcome] = {}
    timed: dict[str, list[float]] = {}
    weights: dict[str, dict[str, int]] = {}
    graph = group.clock == "graph" and context.cuda
    repeats = group.repeats if graph else 1

    for name, variant in group.variants.items():
        outcome = verdict(variant.checks)
        if outcome.status != "ok":
            outcomes[name] = outcome

    torch._dynamo.reset()
    ready: dict[str, Made] = {}
    calls: dict[str, Call] = {}
    right = [name for name in group.variants if name not in outcomes]
    for name in sorted(right, key=lambda name: group.variants[name].compiled):
        variant = group.variants[name]
        limit = min(context.compile_s, budget.left()) if variant.compiled else budget.left()
        if limit <= 0:
            outcomes[name] = Outcome("left out", "the time budget was gone")
            continue
        made, outcomes[name] = attempt(lambda variant=variant, limit=limit: _ready(variant, context, limit))
        if made is None:
            continue
        call, outcomes[name] = attempt(lambda made=made: captured(made.call, repeats) if graph else made.call)
        if call is not None:
            ready[name], calls[name] = made, call
            outcomes[name] = outcomes[name]._replace(message=made.note)

    while calls and not timed:
        try:
            timed = interleaved(
                calls, context.device, rounds=context.rounds, seconds=context.group_seconds,
                warmup_s=context.warmup_s, budget=budget, least_s=context.least_s,
            )  # fmt: skip
        except CallFailed as failed:  # the others are measured without it
            outcomes[failed.name] = failed.outcome
            del calls[failed.name], ready[failed.name]
            release_memory()
        except LeftOut as error:
            outcomes.update({name: Outcome("left out", str(error)) for name in calls})
            calls.clear()
    timed = {name: [s / repeats for s in seconds] for name, seconds in timed.items()}
    weigh = group.weigh and not (context.tiny and group.kind not in ("layer", "ffn"))
    if keep is not None and weigh:
        keep(_rows(group, context, ceilings, outcomes, timed, weights))
    for name, made in ready.items() if weigh else ():
        if outcomes[name].status == "ok" and budget.left() > 0:
            weights[name] = _weigh(made, context)
    return _rows(group, context, ceilings, outcomes, timed, weights)


GRACE_S = 3.0


def _ready(variant: Variant, context: Context, limit: float) -> Made:
    """The variant, built and run twice: what compiles has compiled."""
    made = None
    try:
        with time_limit(limit):
            made = variant.make()
            for _ in range(1 if context.tiny else 2):
                made.call()
            synchronize(context.device)
    except LeftOut as late:
        if made is None:
            raise
        # A backward compiles in autograd's thread, which the alarm cannot stop: it may be ready once that is heard.
        try:
            with time_limit(GRACE_S):
                made.call()
                synchronize(context.device)
        except Exception:
            raise late from None
    return made


def _weigh(made: Made, context: Context) -> dict[str, int | float]:
    """Memory, launches and the host's share of one call: `peak_bytes`, `saved_bytes`, `launches` of our kernels,
    `device_launches` (on a GPU) or `operations` of PyTorch's (elsewhere), `host_s` (on a GPU)."""
    weights = {"peak_bytes": lambda: peak_bytes(made.call, context.device)}
    if why_no_triton(context.device) is None:
        weights["launches"] = lambda: launches(made.call)
    if context.cuda:
        weights["device_launches"] = lambda: device_launches(made.call)
        weights["host_s"] = lambda: host_seconds(made.call, context.device)
    else:
        weights["operations"] = lambda: operations(made.call)
    if made.forward is not None:
        weights["saved_bytes"] = lambda: saved_bytes(made.forward, made.owned)
    found = {}
    for name, weigh in weights.items():
        weight, outcome = attempt(weigh)
        if outcome.status == "ok" and (weight or name != "launches"):
            found[name] = weight
    return found


def _rows(group, context, ceilings, outcomes, timed, weights) -> list[dict]:
    rows = []
    for name, variant in group.variants.items():
        row = {
            "kind": group.kind, "step": variant.step or group.step, "provider": name, "base": group.base, **group.shape,
            "dtype": str(context.dtype).removeprefix("torch."),
            "clock": group.clock if context.cuda else "wall",
            "status": outcomes[name].status, "message": outcomes[name].message,
            "bytes": variant.moved, "flop": variant.flop, **weights.get(name, {}),
        }  # fmt: skip
        if timed.get(name):
            row.update(quantiles(timed[name]), seconds=[float(f"{s:.5g}") for s in timed[name]])
            floor = ceilings.floor_s(variant.moved, variant.flop)
            if floor:
                row["share_of_ceiling"] = floor / row["median_s"]
                row["ceiling"] = ceilings.binding(variant.moved, variant.flop)
        rows.append(row)
    return rows


def unmeasured(group: Group, context: Context, outcome: Outcome) -> list[dict]:
    """The rows of a group that was not begun, or that something beyond one variant ended."""
    return _rows(group, context, Ceilings(1.0, 1.0), dict.fromkeys(group.variants, outcome), {}, {})


def run(
    groups: Iterable[Group],
    context: Context,
    ceilings: Ceilings,
    budget: Budget,
    reserve_s: float = 10,
    keep: Callable[[list[dict]], None] | None = None,
) -> Iterator[tuple[Group, list[dict], float]]:
    """The groups in their order of importance, each with its rows and its seconds, while the budget lasts."""
    for group in groups:
        start = time.time()
        if budget.left() < reserve_s:
            yield group, unmeasured(group, context, Outcome("left out", "the time budget was gone")), 0.0
            continue
        rows, outcome = attempt(lambda group=group: run_group(group, context, ceilings, budget, keep))
        yield group, unmeasured(group, context, outcome) if rows is None else rows, time.time() - start
