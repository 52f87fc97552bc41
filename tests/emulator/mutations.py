"""Barriers, waits and fences of the compiled kernels taken out, one at a time: is each noticed, or was it redundant?

    python -m tests.emulator.mutations sm_90      every site, a line each as it is tried; a quarter of an hour
    python -m tests.emulator.mutations sm_90 --after 120 --every 12

Noticed: the machine reports a fault, in one of two schedules. Redundant: it reports none, and the slow judge, from the
trace of the same launch and from the definitions, finds that nothing was left unordered. Missed: the judge finds what
the machine does not. Unjudged: the machine reports what the judge does not find.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from .encode import CODE, Program

TAKEN_OUT = {
    "BARRIER": "bar.sync", "WARP_BARRIER": "bar.warp.sync", "CP_WAIT": "cp.async.wait_group",
    "WGMMA_WAIT": "wgmma.wait_group", "PROXY_FENCE": "fence.proxy.async", "WGMMA_FENCE": "wgmma.fence",
}  # fmt: skip
NAMES = {CODE[operation]: name for operation, name in TAKEN_OUT.items()}
NOTICED, REDUNDANT, MISSED, UNJUDGED = VERDICTS = ("noticed", "redundant", "missed", "unjudged")


@dataclass(frozen=True)
class Site:
    """What became of one that was taken out. why: of a redundant one, what the launch as it is says of it."""

    number: int
    kernel: str
    instruction: str
    where: str
    verdict: str
    why: str = ""

    def __str__(self) -> str:
        return f"{self.number} {self.verdict}{self.why and f' ({self.why})'}: {self.kernel}: {self.where}"


def lines(found: Iterable[Site]) -> Iterator[str]:
    """How many of each instruction, and of each reason."""
    found = list(found)
    verdicts = Counter((site.instruction, site.verdict) for site in found)
    for name in NAMES.values():
        if any(verdicts[name, verdict] for verdict in VERDICTS):
            yield f"{name:20} " + ", ".join(f"{verdicts[name, verdict]} {verdict}" for verdict in VERDICTS)
    yield from (f"{count:4} {why}" for why, count in Counter(site.why for site in found if site.why).most_common())


def sites(program: Program) -> list[int]:
    return [i for i, operation in enumerate(program.code["op"].tolist()) if operation in NAMES]


def without(program: Program, site: int) -> Program:
    """The program with one of its sites taken out; a wait is for one group fewer, or for none."""
    code = program.code.copy()
    operation = int(code["op"][site])
    if operation == CODE["CP_WAIT"]:
        code["a"][site] += 1
    elif operation == CODE["WGMMA_WAIT"]:
        code["a"][site] = 99
    else:
        code["op"][site] = CODE["NOTHING"]
    return dataclasses.replace(program, code=code)


def tried(
    architecture: str, trials, chosen: Callable[[int, str], bool], note: Callable[[Site], None] = lambda site: None
) -> list[Site]:
    """Every kernel that the trials launch, the first time that they do, without each of its sites.

    chosen: of all sites that are reached, by their number in order and their instruction, which are tried. note: called
    with each as it is tried.
    """
    from torch import Tensor

    from . import compilation, launched, machine

    seen, found, number = set(), [], 0

    def run(kernel, grid, arguments, constants) -> None:
        nonlocal number
        what, values = compilation.specialised(kernel, arguments, constants, architecture)
        made = compilation.compiled(what)
        rest, total = (grid, made.warps, made.shared_bytes, values), int(np.prod(grid))
        if what not in seen:
            seen.add(what)
            some = sorted({0, total - 1})  # programs: what is taken out orders what is within one
            spans = machine.extents(value for value in values if isinstance(value, Tensor))
            before = launched.contents(spans)

            def launch(program: Program, *schedule, **options) -> machine.Result:
                launched.restore(spans, before)
                return machine.run(program, *rest, *schedule, **options, programs=some)

            executed = launch(made.program, check=False).counts["executed"]
            for pc in (pc for pc in sites(made.program) if executed[pc]):
                number += 1
                name = NAMES[int(made.program.code["op"][pc])]
                if chosen(number - 1, name):
                    verdict = verdict_on(without(made.program, pc), launch)
                    why = why_redundant(made.program, pc, launch) if verdict == REDUNDANT else ""
                    found.append(Site(number - 1, what.name, name, made.program.where(pc), verdict, why))
                    note(found[-1])
            launched.restore(spans, before)
        machine.run(made.program, *rest, check=False)

    with launched.on_cpu(architecture, run):
        for trial in trials:
            trial.failures()
    return found


def verdict_on(program: Program, launch) -> str:
    """Of a program without one of its sites. launch: runs a program on what it is launched with, as `machine.run`."""
    from . import machine
    from .judge import judge

    schedules = (machine.Schedule(late_copies=True, late_products=True), machine.Schedule(order="reverse"))

    def noticed(schedule: machine.Schedule) -> bool:
        try:
            return bool(launch(program, schedule).faults())
        except machine.Failed:
            return True

    def judged(schedule: machine.Schedule) -> bool:
        try:
            return bool(judge(launch(program, schedule, trace=True)))
        except machine.Failed:  # where warps no longer meet there is no order to judge
            return True

    both = (any(map(noticed, schedules)), any(map(judged, schedules)))
    return {(True, True): NOTICED, (False, False): REDUNDANT, (False, True): MISSED, (True, False): UNJUDGED}[both]


NOTHING_UNDER_WAY = "nothing is under way at the wait"
ENDS_UNTOUCHED = "nothing touches what it waits for until another wait"
NO_ACCESS = "no access to memory on one side of it, up to the next barrier or the end"
OWN_BYTES = "no warp touches on one side of it what another writes on the other"
UNEXPLAINED = "for no reason that is known"
OTHERS = {
    "bar.warp.sync": "each lane reads what it wrote",
    "fence.proxy.async": "another fence stands between the stores and the products",
    "wgmma.fence": "no register of a product is written since another fence",
}


def why_redundant(program: Program, pc: int, launch) -> str:
    """Why a redundant one is, from a trace of the launch as it is, without what the machine and the judge know."""
    from . import judge

    events = launch(program, trace=True).events
    name, here = NAMES[int(program.code["op"][pc])], events["pc"] == pc
    if name in OTHERS:
        return OTHERS[name]
    if name != "bar.sync":
        ended = here & np.isin(events["kind"], (judge.COPY_OVER, judge.PRODUCT_OVER))
        return ENDS_UNTOUCHED if ended.any() else NOTHING_UNDER_WAY
    instances = np.unique(events["epoch"][here & (events["kind"] == judge.EXECUTED)])
    byte, epoch, warp, writes = _touched(events)
    if not (np.isin(instances, epoch) & np.isin(instances + 1, epoch)).any():
        return NO_ACCESS
    # without the barrier the epochs beside it are one: of the bytes that two warps touch in it, on different sides
    _, where = _groups(byte, epoch - np.searchsorted(instances, epoch))
    columns = ((), (epoch,), (warp,), (epoch, warp))
    all_of, side, own, both = (_groups(where, *more)[0] for more in columns)
    return UNEXPLAINED if ((writes > 0) & (all_of - side - own + both > 0)).any() else OWN_BYTES


def _touched(events: np.ndarray) -> np.ndarray:
    """Byte, epoch, warp and whether it is a write, of each access to each byte; of an asynchronous one its start and
    its end."""
    from . import judge

    found = events[np.isin(events["kind"], judge.SHARED + judge.GLOBAL)]
    over = events[np.isin(events["kind"], (judge.COPY_OVER, judge.PRODUCT_OVER))]
    ends = dict(zip(over["ticket"].tolist(), over["epoch"].tolist(), strict=True))
    later = found[np.isin(found["kind"], (judge.COPY, judge.PRODUCT_READ)) & np.isin(found["ticket"], over["ticket"])]
    later["epoch"] = [ends[ticket] for ticket in later["ticket"].tolist()]
    found = np.concatenate([found, later])
    each = np.repeat(np.arange(len(found)), found["bytes"])
    first = np.repeat(np.cumsum(found["bytes"]) - found["bytes"], found["bytes"])
    byte = found["address"].astype(np.int64)[each] + np.arange(len(each)) - first
    writes = np.isin(found["kind"], judge.WRITES)[each]
    rows = np.stack([byte, found["epoch"].astype(np.int64)[each], found["warp"].astype(np.int64)[each], writes])
    return rows[:, np.unique(_groups(*rows)[1], return_index=True)[1]]


def _groups(*columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of rows: how many are alike in these columns, and a number for those that are."""
    number = np.zeros(len(columns[0]), np.int64)
    for column in columns:
        _, values = np.unique(column, return_inverse=True)
        _, number = np.unique(number * (values.max(initial=0) + 1) + values, return_inverse=True)
    return np.bincount(number)[number], number


def main() -> None:
    import sys
    from pathlib import Path

    parser = argparse.ArgumentParser(prog="python -m tests.emulator.mutations", description=__doc__.split("\n")[0])
    parser.add_argument("architecture", choices=("sm_80", "sm_90"))
    parser.add_argument("--every", type=int, default=1, help="try one site in so many")
    parser.add_argument("--after", type=int, default=-1, help="go on after the site of this number")
    arguments = parser.parse_args()
    tests = Path(__file__).parents[1]
    sys.path[:0] = [str(tests), str(tests / "backends" / "triton")]
    from .trials import mutated

    def chosen(number: int, instruction: str) -> bool:
        return number > arguments.after and number % arguments.every == 0

    found: list[Site] = []

    def note(site: Site) -> None:
        found.append(site)
        print(site, flush=True)

    with contextlib.suppress(KeyboardInterrupt):  # and say what was found until then
        tried(arguments.architecture, mutated(), chosen, note)
    print(*lines(found), sep="\n")


if __name__ == "__main__":
    main()
