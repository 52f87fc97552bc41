"""Races by their definition, from the trace of a launch: the slow twin of machine/history.h.

An access is an interval of its warp's instructions: one instruction, or from the start of a cp.async or wgmma to the
wait that covers it. Two accesses are ordered if one's interval ends before the other's begins: for one warp in
instructions, for two warps of a program in barriers passed. Two programs are never ordered. A race is two accesses of
one byte that are not ordered, at least one of them a write, unless both are plain stores of one value. Of the lanes of
a warp, one that reads a byte of shared memory wrote it itself, or passed a barrier since another did.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from .encode import CODE, SLOT
from .machine import Result

(
    READ_SHARED, WRITE_SHARED, READ_GLOBAL, WRITE_GLOBAL, COPY, COPY_OVER, PRODUCT, PRODUCT_READ, PRODUCT_OVER, FENCE,
    EXECUTED,
) = range(11)  # fmt: skip
"""Kinds of events, as in machine/history.h."""
WRITES, GLOBAL = (WRITE_SHARED, WRITE_GLOBAL, COPY), (READ_GLOBAL, WRITE_GLOBAL)
SHARED = (READ_SHARED, WRITE_SHARED, COPY, PRODUCT_READ)
NEVER = 2**31


@dataclass(frozen=True)
class Access:
    """What one instruction of one warp does to the bytes that it touches."""

    cta: int
    warp: int
    pc: int
    kind: int
    start: tuple[int, int]  # barriers passed, instructions executed
    end: tuple[int, int]

    @property
    def writes(self) -> bool:
        return self.kind in WRITES

    def before(self, other: Access) -> bool:
        if self.cta != other.cta:
            return False
        if self.warp == other.warp:
            return self.end[1] < other.start[1]
        return self.end[0] < other.start[0]


@dataclass(frozen=True)
class Verdict:
    """Pairs of instructions (the lesser first) that race in memory; those of two lanes of a warp; those that touch a
    register of a product in flight; and those of a store and a wgmma with no proxy fence between them."""

    races: frozenset[tuple[int, int]]
    lanes: frozenset[tuple[int, int]]
    registers: frozenset[tuple[int, int]]
    unfenced: frozenset[tuple[int, int]]

    def __bool__(self) -> bool:
        return bool(self.races or self.lanes or self.registers or self.unfenced)


def judge(result: Result) -> Verdict:
    """The verdict on a launch that was run with trace=True."""
    over = _ends(result.events)
    memory = result.events[np.isin(result.events["kind"], SHARED + GLOBAL)]
    accesses, number = _accesses(memory, over)
    fences, races, unfenced = _fences(result.events), set(), set()
    for numbers, of_bytes in _alike(memory, number).items():
        of_these, held = [accesses[i] for i in numbers], None
        for i, j in _unordered(of_these):
            a, b = of_these[i], of_these[j]
            pair, stores = (
                (min(a.pc, b.pc), max(a.pc, b.pc)),
                a.kind == b.kind and a.kind in (WRITE_SHARED, WRITE_GLOBAL),
            )
            if pair in races:
                continue
            if stores and held is None:
                held = list(of_bytes())
            if not stores or any(values[i] != values[j] for values in held):
                races.add(pair)
        unfenced |= _unfenced(of_these, fences)
    return Verdict(
        frozenset(races), frozenset(_lanes(result, over)), frozenset(_registers(result, over)), frozenset(unfenced)
    )


def _ends(events: np.ndarray) -> dict[int, tuple[int, int]]:
    """When each copy and each product was over, by its ticket."""
    ends = events[np.isin(events["kind"], (COPY_OVER, PRODUCT_OVER))]
    columns = (ends[name].tolist() for name in ("ticket", "epoch", "position"))
    return {ticket: (epoch, position) for ticket, epoch, position in zip(*columns, strict=True)}


def _accesses(memory: np.ndarray, over: dict[int, tuple[int, int]]) -> tuple[list[Access], np.ndarray]:
    """What each instruction of each warp did, and which of them each event is of."""
    starts = np.stack([memory["epoch"], memory["position"]]).astype(np.int64)
    ends = starts.copy()
    later = np.isin(memory["kind"], (COPY, PRODUCT_READ))
    of_tickets = [over.get(ticket, (NEVER, NEVER)) for ticket in memory["ticket"][later].tolist()]
    ends[:, later] = np.array(of_tickets, np.int64).reshape(-1, 2).T
    columns = [*(memory[name].astype(np.int64) for name in ("cta", "warp", "pc", "kind")), *starts, *ends]
    order = np.lexsort(columns)
    first = _changes(column[order] for column in columns) if len(order) else np.zeros(0, bool)
    number = np.empty(len(order), np.int64)
    number[order] = np.cumsum(first) - 1
    rows = np.stack(columns)[:, order][:, first].T.tolist()
    return [Access(*row[:4], tuple(row[4:6]), tuple(row[6:])) for row in rows], number


def _alike(memory: np.ndarray, number: np.ndarray) -> dict[tuple[int, ...], Callable[[], Iterator[list[set[bytes]]]]]:
    """The accesses to bytes that several touch: -> for each such byte, what each of these accesses has there."""
    if not len(memory):
        return {}
    size = memory["bytes"].astype(np.int64)
    unit = int(np.gcd(np.gcd.reduce(memory["address"].astype(np.int64)), np.gcd.reduce(size)))  # never taken apart
    each, part = np.repeat(np.arange(len(memory)), size // unit), _counted(size // unit)
    space = np.where(np.isin(memory["kind"], GLOBAL), -1, memory["cta"])[each]
    rows = (space, memory["address"].astype(np.int64)[each] + unit * part, number[each])
    order = np.lexsort(rows[::-1])
    new_byte, new_access = (_changes(column[order] for column in rows[:count]) for count in (2, 3))
    values = np.frombuffer(memory["value"].tobytes(), f"V{unit}").reshape(len(memory), -1)
    touches, accesses = np.flatnonzero(new_access), rows[2][order][new_access].tolist()
    limits = np.append(touches, len(order))
    bytes_at = np.searchsorted(touches, np.flatnonzero(new_byte)).tolist()  # where in touches a byte begins
    found: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for first, end in zip(bytes_at, [*bytes_at[1:], len(touches)], strict=True):
        if end - first > 1:
            found[tuple(accesses[first:end])].append(first)

    def held(firsts: list[int], count: int) -> Iterator[list[set[bytes]]]:
        for first in firsts:
            ends = limits[first : first + count + 1].tolist()
            at = [order[start:end] for start, end in zip(ends, ends[1:], strict=False)]
            yield [set(values[each[rows], part[rows]].tolist()) for rows in at]

    return {numbers: functools.partial(held, firsts, len(numbers)) for numbers, firsts in found.items()}


def _changes(columns: Iterable[np.ndarray]) -> np.ndarray:
    """Of sorted rows, those that differ from the one before."""
    return np.append(True, np.any([np.diff(column) != 0 for column in columns], 0))


def _counted(sizes: np.ndarray) -> np.ndarray:
    """0, 1, … for each size in turn."""
    return np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)


def _unordered(accesses: list[Access]) -> list[tuple[int, int]]:
    """Pairs of the accesses, one of them a write, of which neither is before the other, as `Access.before` says."""
    rows = [(a.cta, a.warp, a.writes, *a.start, *a.end) for a in accesses]
    cta, warp, writes, epoch, position, end_epoch, end_position = np.array(rows, np.int64).T
    in_warp, in_program = end_position[:, None] < position, end_epoch[:, None] < epoch
    before = np.where(warp[:, None] == warp, in_warp, in_program) & (cta[:, None] == cta)
    some_writes = (writes[:, None] | writes) > 0
    return list(zip(*(i.tolist() for i in np.nonzero(np.triu(some_writes & ~before & ~before.T, 1))), strict=True))


def _fences(events: np.ndarray) -> dict[int, list[Access]]:
    found = defaultdict(list)
    for e in events[events["kind"] == FENCE]:
        at = (int(e["epoch"]), int(e["position"]))
        found[int(e["cta"])].append(Access(int(e["cta"]), int(e["warp"]), int(e["pc"]), FENCE, at, at))
    return found


def _unfenced(accesses: list[Access], fences: dict[int, list[Access]]) -> set[tuple[int, int]]:
    """Of one byte: a wgmma and the last store before it, if no fence of either's warp stands between them."""
    found = set()
    for product in accesses:
        if product.kind != PRODUCT_READ:
            continue
        last = max((a for a in accesses if a.writes and a.before(product)), key=lambda a: a.end, default=None)
        if last is None or last.kind == COPY:  # of copies docs/compiled-code.md says why not
            continue
        between = (f for f in fences[product.cta] if f.warp in (last.warp, product.warp))
        if not any(last.before(f) and f.before(product) for f in between):
            found.add((min(last.pc, product.pc), max(last.pc, product.pc)))
    return found


def _lanes(result: Result, over: dict[int, tuple[int, int]]) -> set[tuple[int, int]]:
    """What wrote shared memory, and reads of the same bytes by other lanes of the warp, with no barrier between."""
    events, operation = result.events, result.program.code["op"]
    executed = events[events["kind"] == EXECUTED]
    barriers = executed[np.isin(operation[executed["pc"]], (CODE["BARRIER"], CODE["WARP_BARRIER"]))]
    found: set[tuple[int, int]] = set()
    memory = events[np.isin(events["kind"], SHARED)]
    memory = memory[(memory["kind"] != COPY) | np.isin(memory["ticket"], list(over))]  # a copy writes at its wait
    copies = memory["kind"] == COPY
    memory["position"][copies] = [over[ticket][1] for ticket in memory["ticket"][copies].tolist()]
    for cta, warp in np.unique(memory[["cta", "warp"]]).tolist():
        of_warp = memory[(memory["cta"] == cta) & (memory["warp"] == warp)]
        passed = np.sort(barriers["position"][(barriers["cta"] == cta) & (barriers["warp"] == warp)])
        together = np.isin(operation[of_warp["pc"]], [CODE[name] for name in ("LDMATRIX", "STMATRIX", "WGMMA")])
        lane = np.where(together, 32, of_warp["lane"])  # 32: the whole warp
        each = np.repeat(np.arange(len(of_warp)), of_warp["bytes"])
        byte = of_warp["address"].astype(np.int64)[each] + _counted(of_warp["bytes"])
        position = of_warp["position"].astype(np.int64)[each]
        order = np.lexsort((position, byte))
        each, byte, position = each[order], byte[order], position[order]
        writes = np.isin(of_warp["kind"][each], WRITES)
        last = np.maximum.accumulate(np.where(writes, np.arange(len(each)), -1))  # the write before, of any byte
        read = np.flatnonzero(~writes & (last >= 0) & (byte[last] == byte))
        read = read[np.searchsorted(passed, position[read]) == np.searchsorted(passed, position[last[read]])]
        written = byte << 40 | position << 6  # of 18, 34 and 6 bits
        own = np.isin(written[last[read]] | lane[each[read]], written[writes] | lane[each[writes]])
        pairs = np.stack([of_warp["pc"][each[read]], of_warp["pc"][each[last[read]]]])[:, ~own]
        found |= {(min(a, b), max(a, b)) for a, b in np.unique(pairs, axis=1).T.tolist()}
    return found


def _registers(result: Result, over: dict[int, tuple[int, int]]) -> set[tuple[int, int]]:
    """Products with what touches their registers in flight, or writes what they read after the last wgmma.fence."""
    events, code, operands = result.events, result.program.code, result.program.operands
    found, executed = set(), events[events["kind"] == EXECUTED]
    touched, written = {}, {}
    for pc in np.unique(executed["pc"]).tolist():
        slots = operands[code["first"][pc] : code["first"][pc] + code["count"][pc]] // SLOT
        touched[pc], written[pc] = set(slots.tolist()), set(slots[: code["results"][pc]].tolist())
    for e in events[events["kind"] == PRODUCT]:
        pc, start = int(e["pc"]), int(e["position"])
        end = over.get(int(e["ticket"]), (NEVER, NEVER))[1]
        of_warp = executed[(executed["cta"] == e["cta"]) & (executed["warp"] == e["warp"])]
        slots = operands[code["first"][pc] : code["first"][pc] + code["count"][pc]] // SLOT
        results = code["results"][pc]
        held = set(slots[:results].tolist())
        reads = set(slots[results : results + 4].tolist()) if code["b"][pc] & 1 else set()
        read = reads | held if e["address"] else reads  # a product that adds nothing does not read its accumulators
        earlier = of_warp["pc"][of_warp["position"] < start]
        since = np.append(-1, np.flatnonzero(code["op"][earlier] == CODE["WGMMA_FENCE"]))[-1]
        if since < 0 and read:
            found.add((pc, pc))
        after = {}  # slot -> what wrote it after the fence
        for other in earlier[since + 1 :].tolist():
            if code["op"][other] < CODE["BRANCH"] and code["d"][other]:  # a copy is as old as what it copies
                to, copied = (operands[code["first"][other] : code["first"][other] + 2] // SLOT).tolist()
                after.pop(to, None)
                after |= {to: after[copied]} if copied in after else {}
            elif code["op"][other] != CODE["WGMMA"]:
                after |= dict.fromkeys(written[other], other)
        found |= {(min(pc, after[slot]), max(pc, after[slot])) for slot in read & after.keys()}
        within = of_warp["pc"][(of_warp["position"] > start) & (of_warp["position"] < end)]
        for other in np.unique(within).tolist():
            if code["op"][other] != CODE["WGMMA"] and (touched[other] & held or written[other] & reads):
                found.add((min(pc, other), max(pc, other)))
    return found
