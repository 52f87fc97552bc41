"""Barriers, waits and fences of the compiled kernels taken out, one at a time: is each noticed, or was it redundant?

    python -m tests.emulator.mutations sm_90      several minutes; Ctrl-C shows what was found until then

Noticed: the machine reports a fault, in one of two schedules. Redundant: it reports none, and the slow judge, from the
trace of the same launch and from the definitions, finds that nothing was left unordered. Anything else is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from .encode import CODE, Program

TAKEN_OUT = {
    "BARRIER": "bar.sync", "WARP_BARRIER": "bar.warp.sync", "CP_WAIT": "cp.async.wait_group",
    "WGMMA_WAIT": "wgmma.wait_group", "PROXY_FENCE": "fence.proxy.async", "WGMMA_FENCE": "wgmma.fence",
}  # fmt: skip
NAMES = {CODE[operation]: name for operation, name in TAKEN_OUT.items()}
NOTICED, REDUNDANT, MISSED = "noticed", "redundant", "missed"


@dataclass
class Tally:
    verdicts: Counter = field(default_factory=Counter)  # (instruction, verdict) -> how many
    missed: list[str] = field(default_factory=list)
    redundant: list[str] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        for name in NAMES.values():
            counts = {verdict: self.verdicts[name, verdict] for verdict in (NOTICED, REDUNDANT, MISSED)}
            if any(counts.values()):
                yield f"{name:20} " + ", ".join(f"{count} {verdict}" for verdict, count in counts.items())


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


def tried(architecture: str, trials, chosen: Callable[[int], bool], tally: Tally) -> Tally:
    """Every kernel that the trials launch, the first time that they do, without each of its sites; added to the tally.

    chosen: of all sites that are reached, counted in order, which are tried.
    """
    from torch import Tensor

    from . import compilation, launched, machine

    seen, number = set(), 0
    schedules = (machine.Schedule(late_copies=True, late_products=True), machine.Schedule(order="reverse"))

    def run(kernel, grid, arguments, constants) -> None:
        nonlocal number
        what, values = compilation.specialised(kernel, arguments, constants, architecture)
        made = compilation.compiled(what)
        rest = (grid, made.warps, made.shared_bytes, values)
        spans = machine.extents(value for value in values if isinstance(value, Tensor))
        before = launched.contents(spans)
        intact = machine.run(made.program, *rest)
        after = launched.contents(spans)
        for site in sites(made.program) if what not in seen else ():
            if not intact.counts["executed"][site]:
                continue
            number += 1
            if not chosen(number - 1):
                continue
            program = without(made.program, site)
            verdict = _verdict(program, rest, schedules, lambda: launched.restore(spans, before))
            tally.verdicts[NAMES[int(made.program.code["op"][site])], verdict] += 1
            if verdict != NOTICED:
                text = f"{what.name}: {made.program.where(site)}"
                (tally.missed if verdict == MISSED else tally.redundant).append(text)
        seen.add(what)
        launched.restore(spans, after)

    with launched.on_cpu(architecture, run):
        for trial in trials:
            trial.failures()
    return tally


def _verdict(program: Program, rest: tuple, schedules, restore: Callable[[], None]) -> str:
    from . import machine
    from .judge import judge

    for schedule in schedules:
        restore()
        try:
            if machine.run(program, *rest, schedule).faults():
                return NOTICED
        except machine.Failed:
            return NOTICED
    for schedule in schedules:
        restore()
        if judge(machine.run(program, *rest, schedule, trace=True)):
            return MISSED
    return REDUNDANT


def main() -> None:
    import sys
    from pathlib import Path

    parser = argparse.ArgumentParser(prog="python -m tests.emulator.mutations", description=__doc__.split("\n")[0])
    parser.add_argument("architecture", choices=("sm_80", "sm_90"))
    parser.add_argument("--every", type=int, default=1, help="try one site in so many")
    arguments = parser.parse_args()
    tests = Path(__file__).parents[1]
    sys.path[:0] = [str(tests), str(tests / "backends" / "triton")]
    from .trials import mutated

    tally = Tally()
    with contextlib.suppress(KeyboardInterrupt):  # and say what was found until then
        tried(arguments.architecture, mutated(), lambda number: number % arguments.every == 0, tally)
    print(*tally.lines(), sep="\n")
    for verdict, texts in ((MISSED, tally.missed), (REDUNDANT, tally.redundant)):
        print(f"{verdict}:", *texts, sep="\n    ")


if __name__ == "__main__":
    main()
