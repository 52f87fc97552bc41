"""The package's kernels run by the emulator where they would be launched on a GPU."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from unittest import mock

import torch
from triton.runtime.jit import JITFunction

from mos_kernels import backends
from mos_kernels.backends.triton import launch as launching

from . import compilation, machine


@dataclass
class Log:
    """What the launches within `emulated` did."""

    ran: Counter = field(default_factory=Counter)  # by kernel
    notes: set[tuple[str, str]] = field(default_factory=set)  # (kernel, note)
    problems: list[str] = field(default_factory=list)


@contextmanager
def emulated(architecture: str, schedules: Sequence[machine.Schedule] = (machine.EARLY, machine.LATE)) -> Iterator[Log]:
    """Within, `kernel[grid](...)` on CPU tensors compiles for `architecture` and runs here, once in each schedule.

    The settings are those shipped for the architecture. A race, and a difference in any bit between two schedules, is a
    problem of the log; what can go no further raises.
    """
    log = Log()

    def run(kernel, grid, arguments, constants) -> None:
        what, values = compilation.specialised(kernel, arguments, constants, architecture)
        made = compilation.compiled(what)
        spans = machine.extents(value for value in values if isinstance(value, torch.Tensor))
        before, after = contents(spans), None
        log.ran[what.name] += 1
        for schedule in schedules:
            restore(spans, before)
            result = machine.run(made.program, grid, made.warps, made.shared_bytes, values, schedule)
            log.notes |= {(what.name, note) for note in result.notes()}
            problems = result.faults()
            if after is not None and after != contents(spans):
                problems.append("the results of two schedules differ")
            after = contents(spans)
            log.problems += [f"{what.name}: {problem}\n      {what.constants} {grid}" for problem in problems]

    with on_cpu(architecture, run):
        yield log


@contextmanager
def on_cpu(architecture: str, run) -> Iterator[None]:
    """Within, the Triton backend takes CPU tensors, and run(kernel, grid, arguments, constants) is called to launch."""

    def settings(kernel: str, device: torch.device, T: int) -> dict:
        return launching.architecture_settings(kernel, architecture, T)

    def launcher(kernel, grid):
        return lambda *arguments, **constants: run(kernel, grid, arguments, constants)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "__getitem__", launcher))
        stack.enter_context(mock.patch.object(launching, "settings", settings))
        stack.enter_context(mock.patch.object(backends, "why_not_triton", lambda x: None))
        yield


def contents(spans: list[tuple[int, int]]) -> list[bytes]:
    return [ctypes.string_at(start, end - start) for start, end in spans]


def restore(spans: list[tuple[int, int]], contents: list[bytes]) -> None:
    for (start, _), kept in zip(spans, contents, strict=True):
        ctypes.memmove(start, kept, len(kept))
