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
from dataclasses import dataclass
from itertools import combinations

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
    events = result.events
    ends = events[np.isin(events["kind"], (COPY_OVER, PRODUCT_OVER))]
    over = {int(e["ticket"]): (int(e["epoch"]), int(e["position"])) for e in ends}
    memory = events[np.isin(events["kind"], SHARED + GLOBAL)]
    unit = int(np.gcd(np.gcd.reduce(memory["address"]), np.gcd.reduce(memory["bytes"]).astype(np.uint64))) or 1
    # bytes that every access takes together
    accesses: list[Access] = []
    of_byte: dict[tuple, dict[int, list[bytes]]] = defaultdict(lambda: defaultdict(list))
    numbers: dict[tuple, int] = {}
    for e in memory.tolist():
        kind, cta, warp, _, pc, size, position, epoch, address, ticket, value = e
        end = over.get(ticket, (NEVER, NEVER)) if kind in (COPY, PRODUCT_READ) else (epoch, position)
        key = (cta, warp, pc, kind, position, end)
        if key not in numbers:
            numbers[key] = len(accesses)
            accesses.append(Access(cta, warp, pc, kind, (epoch, position), end))
        space = None if kind in GLOBAL else cta
        value = bytes(value)
        for i in range(0, size, unit):
            of_byte[space, address + i][numbers[key]].append(value[i : i + unit])
    alike: dict[tuple[int, ...], list[dict[int, list[bytes]]]] = defaultdict(list)  # bytes that the same accesses touch
    for found in of_byte.values():
        if len(found) > 1:
            alike[tuple(found)].append(found)
    races, unfenced, fences = set(), set(), _fences(events)
    unordered = functools.cache(lambda i, j: _conflict(accesses[i], accesses[j]))
    for numbers_of_byte, of_bytes in alike.items():
        for i, j in combinations(numbers_of_byte, 2):
            if not unordered(i, j):
                continue
            a, b = accesses[i], accesses[j]
            stores = a.kind == b.kind and a.kind in (WRITE_SHARED, WRITE_GLOBAL)
            if not stores or any(set(found[i]) != set(found[j]) for found in of_bytes):
                races.add((min(a.pc, b.pc), max(a.pc, b.pc)))
        unfenced |= _unfenced([accesses[i] for i in numbers_of_byte], fences)
    return Verdict(
        frozenset(races), frozenset(_lanes(result)), frozenset(_registers(result, over)), frozenset(unfenced)
    )


def _conflict(a: Access, b: Access) -> bool:
    return (a.writes or b.writes) and not a.before(b) and not b.before(a)


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


def _lanes(result: Result) -> set[tuple[int, int]]:
    """Stores to shared memory, and reads of the same bytes by other lanes of the warp, with no barrier between."""
    events, operation = result.events, result.program.code["op"]
    executed = events[events["kind"] == EXECUTED]
    barriers = executed[np.isin(operation[executed["pc"]], (CODE["BARRIER"], CODE["WARP_BARRIER"]))]
    found: set[tuple[int, int]] = set()
    plain = events[np.isin(events["kind"], (READ_SHARED, WRITE_SHARED))]
    for cta, warp in np.unique(plain[["cta", "warp"]]).tolist():
        of_warp = plain[(plain["cta"] == cta) & (plain["warp"] == warp)]
        passed = np.sort(barriers["position"][(barriers["cta"] == cta) & (barriers["warp"] == warp)])
        lane = np.where(np.isin(operation[of_warp["pc"]], (CODE["LDMATRIX"], CODE["STMATRIX"])), 32, of_warp["lane"])
        each = np.repeat(np.arange(len(of_warp)), of_warp["bytes"])  # bytes of shared memory, of which event
        byte = of_warp["address"].astype(np.int64)[each] + _counted(of_warp["bytes"])
        position = of_warp["position"].astype(np.int64)[each]
        order = np.lexsort((position, byte))
        each, byte, position = each[order], byte[order], position[order]
        writes = of_warp["kind"][each] == WRITE_SHARED
        last = np.maximum.accumulate(
            np.where(writes, np.arange(len(each)), -1)
        )  # write before, of this byte or another
        read = np.flatnonzero(~writes & (last >= 0) & (byte[last] == byte))
        read = read[np.searchsorted(passed, position[read]) == np.searchsorted(passed, position[last[read]])]
        written = byte << 40 | position << 6  # of 18, 34 and 6 bits
        own = np.isin(written[last[read]] | lane[each[read]], written[writes] | lane[each[writes]])
        pairs = np.stack([of_warp["pc"][each[read]], of_warp["pc"][each[last[read]]]])[:, ~own]
        found |= {(min(a, b), max(a, b)) for a, b in np.unique(pairs, axis=1).T.tolist()}
    return found


def _counted(sizes: np.ndarray) -> np.ndarray:
    """0, 1, … for each size in turn."""
    return np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)


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
