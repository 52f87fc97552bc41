"""Run a program on tensors in this machine's memory, and say what it did wrong and how much it did."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from . import build
from .encode import CODE, SHARED_BASE, Program

FINDINGS = (
    "shared memory: two warps, no barrier between",
    "shared memory: two lanes of a warp, no barrier between",
    "global memory: two programs, or two warps without a barrier",
    "shared memory touched while cp.async fills it",
    "shared memory written while a product reads it",
    "a register touched while a wgmma, or a load of tensor memory, uses it",
    "no proxy fence between a write and the product that reads it",
    "shared memory read that was never written",
    "an address outside the arguments",
    "a misaligned address",
    "no proxy fence between a cp.async and the product that reads it",
    "warps that store the same element at once have different values for it",
    "lanes of a warp that store the same element at once have different values for it",
    "a register written since the last wgmma.fence that a wgmma reads",
    "tensor memory touched while a product uses it",
    "tensor memory touched before a store to it was waited for",
    "tensor memory: two warps, no barrier between",
)
"""What machine/history.h reports, in its order."""
NOTES = frozenset({7, 10, 12})
"""Findings that are no fault of a kernel's author; docs/compiled-code.md says of each why."""

COUNTS = np.dtype(
    [("executed", "u8"), ("active", "u8"), ("requests", "u8"), ("sectors", "u8"), ("useful", "u8"),
     ("wavefronts", "u8"), ("least_wavefronts", "u8"), ("bytes", "u8")]
)  # fmt: skip
FOUND = np.dtype(
    [(n, "i4") for n in ["kind", "pc", "other_pc", "cta", "warp", "other_warp"]] + [("address", "u8"), ("times", "u8")]
)
EVENT = np.dtype(
    [(n, "i4") for n in ["kind", "cta", "warp", "lane", "pc", "bytes"]] + [("position", "u4"), ("epoch", "u4")]
    + [("address", "u8"), ("ticket", "i8"), ("value", "V16")]
)  # fmt: skip
ORDERS = ("forward", "reverse", "random")


class _Launch(ctypes.Structure):
    """As in machine/state.h."""

    _fields_ = [
        ("code", ctypes.c_void_p), ("code_count", ctypes.c_int), ("operands", ctypes.c_void_p),
        ("wide", ctypes.c_void_p), ("initial", ctypes.c_char_p), ("register_bytes", ctypes.c_int),
        ("lane_slots", ctypes.c_void_p), ("memories", ctypes.c_void_p), ("memory_count", ctypes.c_int),
        ("global_history", ctypes.c_void_p), ("grid", ctypes.c_int * 3), ("warps", ctypes.c_int),
        ("shared_bytes", ctypes.c_int), ("shared_base", ctypes.c_int), ("ctas", ctypes.c_void_p),
        ("cta_count", ctypes.c_int), ("late_copies", ctypes.c_int), ("late_products", ctypes.c_int),
        ("order", ctypes.c_int), ("seed", ctypes.c_int), ("check", ctypes.c_int), ("rough", ctypes.c_int),
        ("trace", ctypes.c_int), ("uses_tensor_memory", ctypes.c_int), ("counts", ctypes.c_void_p),
        ("found", ctypes.c_void_p), ("found_room", ctypes.c_int), ("found_count", ctypes.c_int),
        ("message", ctypes.c_char * 512),
        ("failed_pc", ctypes.c_int),
    ]  # fmt: skip


@dataclass(frozen=True)
class Schedule:
    """How what a GPU leaves open is decided."""

    late_copies: bool = False  # cp.async lands at the wait that covers it, not at once
    late_products: bool = False  # wgmma reads shared memory and writes its accumulators at its wait
    order: str = "forward"  # of the warps between two barriers, and of the programs: ORDERS
    seed: int = 0  # of a random order
    rough: bool = False  # approximate instructions err as they may, matrix instructions round their sums towards zero


EARLY, LATE = Schedule(), Schedule(late_copies=True, late_products=True, order="reverse")
"""The two extremes: a launch whose results differ between them hangs on what is left open."""


@dataclass(frozen=True)
class Result:
    """What a launch did. counts: by instruction, of all warps together."""

    program: Program
    counts: np.ndarray
    found: tuple[dict[str, int], ...]
    warps: int  # of all programs that ran
    events: np.ndarray | None = None

    def faults(self, besides: Iterable[int] = NOTES) -> list[str]:
        """One text for each kind of fault and pair of instructions; `besides` are the kinds that are none."""
        return [self.describe(one) for one in self.found if one["kind"] not in besides]

    def notes(self) -> set[str]:
        return {FINDINGS[one["kind"]] for one in self.found if one["kind"] in NOTES}

    def describe(self, one: dict[str, int]) -> str:
        lines = [
            f"{FINDINGS[one['kind']]} ({one['times']} times; first in program {one['cta']}, warps {one['warp']} and "
            f"{one['other_warp']}, address {one['address']:#x})",
            self.program.where(one["pc"]),
        ]
        if one["other_pc"] >= 0:
            lines.append(self.program.where(one["other_pc"]))
        return "\n      ".join(lines)


class Failed(Exception):
    """A program that cannot go on: its warps or lanes are where a GPU would hang, or its code is not known."""


def extents(tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
    """The memory that the tensors' elements span, overlapping spans joined."""
    spans = []
    for tensor in tensors:
        if tensor.numel():
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            spans.append((tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()))
    joined: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def run(
    program: Program,
    grid: Sequence[int],
    warps: int,
    shared_bytes: int,
    arguments: Sequence,
    schedule: Schedule = EARLY,
    *,
    check: bool = True,
    trace: bool = False,
    programs: Sequence[int] | None = None,
) -> Result:
    """Run a launch; what it stores is then in the arguments (CPU tensors, ints and floats, as the parameters go).

    check: keep the history of every byte, by which races are found. programs: of the grid, run these alone.
    trace: keep an event for every access and instruction, for `judge`.
    """
    grid = (*grid, 1, 1)[:3]
    spans = extents(value for value in arguments if isinstance(value, Tensor))
    memories = np.array(spans, np.uint64).reshape(-1, 2)
    total = grid[0] * grid[1] * grid[2]
    chosen = np.array(range(total) if programs is None else programs, np.int32)
    if schedule.order == "reverse":
        chosen = chosen[::-1].copy()
    elif schedule.order == "random":
        np.random.default_rng(schedule.seed).shuffle(chosen)
    counts, found = np.zeros(len(program.code), COUNTS), np.zeros(256, FOUND)
    history = [np.zeros((end - start) * 8, np.uint32) for start, end in spans] if check else []
    pointers = np.array([one.ctypes.data for one in history], np.uint64)
    initial = _with_arguments(program, grid, arguments)
    uses_tensor_memory = bool(np.isin(program.code["op"], [CODE["TENSOR_ALLOCATE"]]).any())
    if trace and uses_tensor_memory:
        raise ValueError(f"{program.name} uses tensor memory, which the judge of traces does not know")
    launch = _Launch(
        program.code.ctypes.data, len(program.code), program.operands.ctypes.data, program.wide.ctypes.data, initial,
        len(initial), program.lane_slots.ctypes.data, memories.ctypes.data, len(spans),
        pointers.ctypes.data if history else None, (ctypes.c_int * 3)(*grid), warps, shared_bytes, SHARED_BASE,
        chosen.ctypes.data, len(chosen), schedule.late_copies, schedule.late_products, ORDERS.index(schedule.order),
        schedule.seed, check, schedule.rough, trace, uses_tensor_memory, counts.ctypes.data, found.ctypes.data,
        len(found), 0, b"", 0,
    )  # fmt: skip
    library = build.library()
    if library.launch(ctypes.byref(launch)):
        raise Failed(f"{program.name}: {launch.message.decode()}\n      {program.where(launch.failed_pc)}")
    findings = tuple({name: int(one[name]) for name in FOUND.names} for one in found[: launch.found_count])
    return Result(program, counts, findings, warps * len(chosen), _events(library) if trace else None)


def _with_arguments(program: Program, grid: tuple[int, ...], arguments: Sequence) -> bytes:
    """A warp's registers before its first instruction."""
    initial = bytearray(program.initial)

    def fill(slot: int, raw: bytes) -> None:
        initial[slot : slot + 32 * len(raw)] = raw * 32

    named = [name for name in program.parameters if not name.startswith("%")]
    values = [*arguments, *[0] * (len(named) - len(arguments))]  # Triton's own: pointers to scratch memory, unused
    for name, value in zip(named, values, strict=True):
        slot, width = program.parameters[name]
        if isinstance(value, Tensor):
            fill(slot, value.data_ptr().to_bytes(8, "little"))
        elif isinstance(value, float):
            fill(slot, (np.float32 if width == 4 else np.float64)(value).tobytes())
        else:
            fill(slot, (int(value) & ((1 << 8 * width) - 1)).to_bytes(width, "little"))
    for axis, size in zip("xyz", grid, strict=True):
        if f"%nctaid.{axis}" in program.parameters:
            fill(program.parameters[f"%nctaid.{axis}"][0], size.to_bytes(4, "little"))
    return bytes(initial)


def _events(library: ctypes.CDLL) -> np.ndarray:
    count = ctypes.c_uint64()
    start = library.traced(ctypes.byref(count))
    if not count.value:
        return np.zeros(0, EVENT)
    raw = (ctypes.c_char * (EVENT.itemsize * count.value)).from_address(start)
    return np.frombuffer(raw, EVENT).copy()
