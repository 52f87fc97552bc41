"""Shared memory that is filled anew while a product of the tensor cores may still read it, found in Triton's IR.

Products of sm_90 (wgmma) and sm_100 (tcgen05) read shared memory until a wait says that they are over, and Triton
copies later tiles into buffers by turns meanwhile. `refilled` follows which buffer each copy and each product takes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

STEPS = 8
"""Of each loop that are followed: more than any loop here has buffers."""
NAME = r"%[\w.$-]+(?:#\d+)?"
RESULT = re.compile(rf"\s*({NAME})(?::\d+)? = (.*)")
INTEGERS: dict[str, Callable[[int, int], int]] = {
    "arith.addi": lambda a, b: a + b, "arith.subi": lambda a, b: a - b, "arith.muli": lambda a, b: a * b,
    "arith.remsi": lambda a, b: a % b, "arith.xori": lambda a, b: a ^ b, "arith.andi": lambda a, b: a & b,
    "arith.cmpi sge,": lambda a, b: int(a >= b), "arith.cmpi eq,": lambda a, b: int(a == b),
    "arith.cmpi slt,": lambda a, b: int(a < b),
}  # fmt: skip


@dataclass(frozen=True)
class Buffer:
    """Where in an allocation. index: None where it is not known, which is any."""

    allocation: str
    index: int | None = 0

    def meets(self, other: Buffer) -> bool:
        return self.allocation == other.allocation and (None in (self.index, other.index) or self.index == other.index)


@dataclass(frozen=True)
class Product:
    reads: tuple[Buffer, ...]
    barrier: Buffer | None  # of sm_100, where its end arrives
    arrival: int  # how many products arrived there before
    surely: bool  # and not only while the loop goes on


@dataclass
class Followed:
    """What a function's lines have done so far."""

    values: dict[str, int | Buffer] = field(default_factory=dict)
    under_way: list[Product] = field(default_factory=list)
    arrivals: dict[Buffer, int] = field(default_factory=dict)
    barriers: set[str] = field(default_factory=set)  # allocations
    problems: list[str] = field(default_factory=list)


def refilled(ttgir: str) -> list[str]:
    """The lines of TTGIR that fill, or give back, shared memory that a product may still read."""
    if "ttng.warp_group_dot" not in ttgir and "ttng.tc_gen5_mma" not in ttgir:
        return []
    lines = [re.sub(r" loc\(.*", "", line) for line in ttgir.splitlines() if not line.startswith("#")]
    state = Followed()
    _follow(lines, state)
    return list(dict.fromkeys(state.problems))


def _follow(lines: list[str], state: Followed) -> None:
    at = 0
    while at < len(lines):
        line = lines[at]
        if " scf.for " in line:
            indent = len(line) - len(line.lstrip())
            end = next(i for i in range(at + 1, len(lines)) if lines[i].startswith(" " * indent + "}"))
            _loop(line, lines[at + 1 : end], state)
            at = end
        else:
            _line(line, state)
        at += 1


def _loop(head: str, body: list[str], state: Followed) -> None:
    carried = re.search(r"iter_args\((.*?)\) ->", head)
    pairs = [one.split(" = ") for one in carried[1].split(", ")] if carried else []
    names, given = [name for name, _ in pairs], [value for _, value in pairs]
    for _ in range(STEPS):
        _bind(names, given, state)
        _follow(body, state)
        given = _operands(body[-1]) if names else []
    if names:
        result = RESULT.match(head)[1]
        _bind([result] if len(names) == 1 else [f"{result}#{i}" for i in range(len(names))], given, state)


def _bind(names: list[str], given: list[str], state: Followed) -> None:
    values = [state.values.get(one) for one in given]
    for name, value in zip(names, values, strict=True):
        state.values.pop(name, None)
        if value is not None:
            state.values[name] = value


def _operands(line: str) -> list[str]:
    """Names before the types."""
    return re.findall(NAME, (RESULT.match(line) or [line, "", line])[2].split(" : ")[0])


def _line(line: str, state: Followed) -> None:
    named, operands = RESULT.match(line), _operands(line)
    operation = named[2] if named else line.strip()
    buffers = [value for name in operands if isinstance(value := state.values.get(name), Buffer)]
    if named:
        state.values.pop(named[1], None)
        if (value := _value(named[1], operation, operands, state)) is not None:
            state.values[named[1]] = value
    if operation.startswith(("ttng.warp_group_dot ", "ttng.tc_gen5_mma ")):
        reads = tuple(value for name in operands[:2] if isinstance(value := state.values.get(name), Buffer))
        barrier = next((buffer for buffer in buffers if buffer.allocation in state.barriers), None)
        arrival = state.arrivals.get(barrier, 0)
        surely = operation.startswith("ttng.warp_group_dot") or state.values.get(operands[4]) == 1
        state.under_way.append(Product(reads, barrier, arrival, surely))
        if barrier:
            state.arrivals[barrier] = arrival + 1
    elif operation.startswith("ttng.warp_group_dot_wait"):
        left = int(re.search(r"pendings = (\d+)", operation)[1])
        state.under_way = state.under_way[max(len(state.under_way) - left, 0) :]
    elif operation.startswith("ttng.init_barrier"):
        state.arrivals[buffers[0]] = 0
    elif operation.startswith("ttng.wait_barrier"):
        _wait(buffers[0], state.values.get(operands[1]), state)
    elif operation.startswith(("ttg.async_copy_global_to_local", "ttg.local_store")):
        _filled(buffers[-1], line, state)
    elif operation.startswith("ttg.local_dealloc"):
        _filled(Buffer(buffers[-1].allocation, None), line, state, surely=True)
    elif operation.startswith("ttg.local_alloc %"):
        _filled(state.values[named[1]], line, state)


def _value(name: str, operation: str, operands: list[str], state: Followed) -> int | Buffer | None:
    values = [state.values.get(one) for one in operands]
    if constant := re.match(r"arith\.constant (-?\d+|true|false)(?: : i32|$)", operation):
        return {"true": 1, "false": 0}.get(constant[1]) if constant[1].isalpha() else int(constant[1])
    if operation.startswith("ttg.local_alloc"):
        if "xi64," in operation:
            state.barriers.add(name)
        return Buffer(name)
    if operation.startswith("ttg.memdesc_index"):
        return Buffer(values[0].allocation, values[1] if isinstance(values[1], int) else None)
    if operation.startswith("ttg.memdesc_"):
        return values[0]
    if operation.startswith("arith.select") and isinstance(values[0], int):
        return values[1] if values[0] else values[2]
    for prefix, compute in INTEGERS.items():
        if operation.startswith(prefix) and all(isinstance(value, int) for value in values):
            return compute(*values)
    return None


def _wait(barrier: Buffer, phase: int | Buffer | None, state: Followed) -> None:
    """A barrier's phase is over with the arrival of the same parity; products end in their order."""
    arrived = [i for i, p in enumerate(state.under_way) if p.barrier == barrier and p.arrival % 2 == phase]
    state.under_way = state.under_way[max(arrived, default=-1) + 1 :]


def _filled(buffer: Buffer, line: str, state: Followed, surely: bool = False) -> None:
    if any(buffer.meets(read) for one in state.under_way if one.surely or not surely for read in one.reads):
        state.problems.append(line.strip())
