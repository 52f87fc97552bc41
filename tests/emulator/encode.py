"""Statements -> the arrays that the machine interprets.

A register is a slot: 32 lanes of 4 or 8 bytes, named by its offset in a warp's registers. Constants, parameters and
special registers are slots too, filled before the first instruction. What the machine does not know is refused with its
line: nothing is guessed.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

import numpy as np

from . import build, flow
from .ptx import Address, Statement, Text, Unsupported, read

OPERATIONS = [
    "BRANCH", "RETURN", "BARRIER", "WARP_BARRIER", "NOTHING", "LOAD_GLOBAL", "STORE_GLOBAL", "LOAD_SHARED",
    "STORE_SHARED", "CP_ASYNC", "CP_COMMIT", "CP_WAIT", "LDMATRIX", "STMATRIX", "MMA", "WGMMA", "WGMMA_FENCE",
    "WGMMA_COMMIT", "WGMMA_WAIT", "PROXY_FENCE", "SHUFFLE", "REDUX", "VOTE", "ELECT", "UNPACK", "PACK",
    "TENSOR_ALLOCATE", "TENSOR_LOAD", "TENSOR_STORE", "TENSOR_WAIT", "TENSOR_PRODUCT", "TENSOR_COMMIT", "MBARRIER_INIT",
    "MBARRIER_WAIT",
]  # fmt: skip
CODE = {name: 100_000 + i for i, name in enumerate(OPERATIONS)}
"""As in machine/state.h; below them are the lines of machine/elementwise.def."""

INSTRUCTION = np.dtype(
    [
        (name, "i4")
        for name in ["op", "guard", "negated", "first", "count", "results", "a", "b", "c", "d", "line", "rank"]
    ]
    + [("offset", "i8")]
)
LANE_VALUES = ("%tid.x", "%laneid", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%warpid")
LANES = 32
SLOT = 4 * LANES
PARAMETERS = 64
"""The address of the first parameter, in the space of parameters."""
SHARED_BASE = 1024
"""Where shared memory begins: no address in it is 0, and it is aligned as the swizzles want it."""


@dataclass(frozen=True)
class Program:
    """One kernel. `initial` holds a warp's registers before its first instruction."""

    text: Text
    code: np.ndarray  # INSTRUCTION
    operands: np.ndarray
    statements: tuple[Statement, ...]  # that each instruction came from
    initial: bytes
    parameters: dict[str, tuple[int, int]]  # name -> its slot, bytes
    lane_slots: np.ndarray
    wide: np.ndarray  # by slot of 4 bytes a lane, whether it starts one of 8

    @property
    def name(self) -> str:
        return self.text.name

    def where(self, pc: int) -> str:
        """An instruction, in words: its line and what it came from."""
        if not 0 <= pc < len(self.statements):
            return "-"
        statement = self.statements[pc]
        return f"{statement.source}: {self.text.lines[statement.line - 1].strip()[:110]} (PTX line {statement.line})"


def program(ptx: str) -> Program:
    """The kernel of a PTX module."""
    return _Encoder(read(ptx)).program()


class _Encoder:
    def __init__(self, text: Text):
        self.text, self.table = text, build.elementwise()
        self.initial, self.wide_slots, self.slots = bytearray(), [], {}
        self.parameters = {name: (self._new(size), size) for name, size in text.parameters}
        self.lane_slots = [self._new(4) for _ in LANE_VALUES]
        self.code: list[dict] = []
        self.operands: list[int] = []

    def program(self) -> Program:
        starts, statements = [], []
        for statement in self.text.statements:
            starts.append(len(self.code))
            try:
                self._encode(statement)
            except (KeyError, IndexError, ValueError, TypeError, StopIteration, AssertionError) as error:
                line = self.text.lines[statement.line - 1].strip()
                raise Unsupported(f"line {statement.line}: {line} ({error!r})") from error
            statements += [statement] * (len(self.code) - len(statements))
        starts.append(len(self.code))
        code = np.zeros(len(self.code), INSTRUCTION)
        for i, fields in enumerate(self.code):
            if fields["op"] == CODE["BRANCH"]:
                fields["a"] = starts[fields["a"]]
            for name, value in fields.items():
                code[name][i] = value
        branches = {int(i): int(code["a"][i]) for i in np.flatnonzero(code["op"] == CODE["BRANCH"])}
        returns = set(np.flatnonzero(code["op"] == CODE["RETURN"]).tolist())
        code["rank"] = flow.ranks(branches, set(np.flatnonzero(code["guard"] >= 0).tolist()), returns, len(code))
        wide = np.zeros(len(self.initial) // SLOT + 1, np.uint8)
        wide[[at // SLOT for at in self.wide_slots]] = 1
        return Program(
            self.text, code, np.array(self.operands, np.int32), tuple(statements), bytes(self.initial), self.parameters,
            np.array(self.lane_slots, np.int32), wide,
        )  # fmt: skip

    # slots

    def _new(self, size: int, value: bytes | None = None) -> int:
        """A slot, of poison unless it has a value."""
        at = len(self.initial)
        if size == 8:
            self.wide_slots.append(at)
        self.initial += (value or b"\xff" * size) * LANES
        return at

    def _size_of(self, register: str) -> int:
        return next(declared.bytes for declared in reversed(self.text.registers) if declared.covers(register))

    def _slot(self, operand: str, size: int) -> int:
        """The slot of a register, special register or constant that is used as `size` bytes."""
        width = 8 if size == 8 else 4
        key = (operand, width)
        if key not in self.slots:
            self.slots[key] = self._slot_of(operand, width)
        return self.slots[key]

    def _slot_of(self, operand: str, width: int) -> int:
        if operand in LANE_VALUES:
            return self.lane_slots[LANE_VALUES.index(operand)]
        if operand in ("%tid.y", "%tid.z"):
            return self._new(4, bytes(4))
        if operand.startswith("%nctaid."):
            self.parameters[operand] = (self._new(4), 4)
            return self.parameters[operand][0]
        if operand == "_":
            return self._new(8)
        if operand.startswith("%") or any(declared.covers(operand) for declared in self.text.registers):
            size = self._size_of(operand)
            if (size == 8) != (width == 8):
                raise ValueError(f"{operand} used as {width} bytes")
            return self._new(size)
        return self._new(width, self._constant(operand, width))

    def _constant(self, operand: str, width: int) -> bytes:
        if hexadecimal := re.match(r"0[fFdD]([0-9a-fA-F]{8}|[0-9a-fA-F]{16})$", operand):
            return int(hexadecimal.group(1), 16).to_bytes(width, "little")
        if operand in ("true", "false"):
            return int(operand == "true").to_bytes(width, "little")
        if operand in self.parameters:  # its address, by which a selected one may be loaded
            return (PARAMETERS + 8 * list(self.parameters).index(operand)).to_bytes(width, "little")
        if re.match(r"[A-Za-z_$]", operand):
            if "smem" not in operand:
                raise KeyError(operand)
            return SHARED_BASE.to_bytes(width, "little")  # the one array that all of shared memory is
        if "." in operand:
            return struct.pack("<d" if width == 8 else "<f", float(operand))
        return (int(operand.rstrip("U"), 0) & ((1 << 8 * width) - 1)).to_bytes(width, "little")

    def _address(self, operand: Address, size: int) -> tuple[int, int]:
        return self._slot(operand.base, size), operand.offset

    def _emit(self, s: Statement, op: int | str, slots: list[int] = (), results: int = 0, **fields) -> None:
        guard = -1 if s.guard is None else self._slot(s.guard, 4)
        self.code.append(
            {
                "op": CODE[op] if isinstance(op, str) else op, "guard": guard, "negated": s.negated,
                "first": len(self.operands), "count": len(slots), "results": results, "line": s.line, **fields,
            }
        )  # fmt: skip
        self.operands.extend(slots)

    # instructions

    def _encode(self, s: Statement) -> None:
        parts = s.name.split(".")
        special = getattr(self, f"_op_{parts[0]}", None)
        if special is None or special(s, parts, s.operands) is False:
            self._elementwise(s, parts, s.operands)

    def _elementwise(self, s: Statement, parts: list[str], o) -> None:
        number, sizes = self.table[self._known(s.name)]
        assert len(o) == len(sizes) and all(isinstance(x, str) and "|" not in x for x in o), "operands"
        if parts[0] == "cvt" and sizes[1] < 8 and o[1].startswith("%") and self._size_of(o[1]) == 8:
            low = self._new(4)  # a narrow conversion of a wide register is one of its low half
            self._emit(s, self.table["cvt.u32.u64"][0], [low, self._slot(o[1], 8)], 1)
            self._emit(s, number, [self._slot(o[0], sizes[0]), low], 1)
            return
        self._emit(s, number, [self._slot(x, size) for x, size in zip(o, sizes, strict=True)], 1, d=parts[0] == "mov")

    def _known(self, name: str) -> str:
        """The table's name of an instruction: without roundings that are its only ones."""
        if name in self.table:
            return name
        for pattern, by in (
            (r"^(add|sub|mul|fma|mad)\.rn\.(f32|f64)", r"\1.\2"),
            (r"^(add|sub|mul)\.rn\.(bf16|f16)", r"\1.\2"),
            (r"^cvt\.(f32|f64)\.(s|u)", r"cvt.rn.\1.\2"),
            (r"^(setp\.(?:eq|ne|lt|le|gt|ge))\.b(16|32|64)", r"\1.u\2"),
            (r"^shr\.b", "shr.u"),
            (r"^mul24\.lo", "mul.lo"),
        ):
            changed = re.sub(pattern, by, name)
            if changed in self.table:
                return changed
        if ".ftz" in name:  # subnormals are kept, but in the approximate instructions that the table has with .ftz
            return self._known(name.replace(".ftz", ""))
        raise KeyError(name)

    def _op_setp(self, s, parts, o):
        if not parts[-1].endswith("x2"):
            return False
        number, _ = self.table[self._known(s.name.removesuffix("x2"))]
        for result, shift in zip(o[0].split("|"), ("0", "16"), strict=True):
            halves = []
            for pair in o[1:]:
                halves.append(self._new(4))
                slots = [halves[-1], self._slot(pair, 4), self._slot(shift, 4)]
                self._emit(s, self.table["shr.b32"][0], slots, 1)
            self._emit(s, number, [self._slot(result, 4), *halves], 1)

    def _op_fma(self, s, parts, o):
        """A half, or a product of halves, that is added to a float32: the halves are widened, which is exact."""
        if parts[1:] not in (["rn", "f32", "f16"], ["rn", "f32", "bf16"]):
            return False
        wide = [self._new(4) for _ in o[1:-1]]
        for half, to in zip(o[1:], wide, strict=False):
            self._emit(s, self.table[f"cvt.f32.{parts[3]}"][0], [to, self._slot(half, 2)], 1)
        self._emit(s, self.table[f"{parts[0]}.f32"][0], [self._slot(o[0], 4), *wide, self._slot(o[-1], 4)], 1)

    _op_add = _op_sub = _op_fma

    def _op_max(self, s, parts, o):
        if len(o) < 4:
            return False
        number, (_, size, _) = self.table[self._known(s.name)]
        first = self._new(size)
        self._emit(s, number, [first, self._slot(o[1], size), self._slot(o[2], size)], 1)
        self._emit(s, number, [self._slot(o[0], size), first, self._slot(o[3], size)], 1)

    _op_min = _op_max

    def _op_bra(self, s, parts, o):
        self._emit(s, "BRANCH", a=self.text.labels[o[0]])

    def _op_ret(self, s, parts, o):
        self._emit(s, "RETURN")

    _op_exit = _op_ret

    def _op_bar(self, s, parts, o):
        if parts[1:] == ["warp", "sync"]:
            assert int(o[0], 0) in (-1, 0xFFFFFFFF), "a barrier of some lanes"
            self._emit(s, "WARP_BARRIER")
        else:
            assert parts[1] == "sync" and o in (("0",), ()), "only the barrier of all warps"
            self._emit(s, "BARRIER")

    def _op_barrier(self, s, parts, o):
        self._op_bar(s, [part for part in parts if part not in ("cta", "aligned")], o)

    def _op_fence(self, s, parts, o):
        assert "proxy" not in parts or "async" in " ".join(parts), "a proxy fence other than for async"
        self._emit(s, "PROXY_FENCE" if "proxy" in parts else "NOTHING")

    def _op_membar(self, s, parts, o):
        self._emit(s, "NOTHING")

    _op_griddepcontrol = _op_membar

    def _op_ld(self, s, parts, o):
        if "param" not in parts:
            self._access(s, parts, o[0], o[1], load=True)
            return
        to, address = o
        assert address.offset == 0, "part of a parameter"
        if address.base not in self.parameters:
            self._load_selected(s, to, address.base)
            return
        size, (at, width) = self._size_of(to), self.parameters[address.base]
        wider = "cvt.s64.s32" if parts[-1][0] == "s" else "cvt.u64.u32"
        move = "mov.b32" if size < 8 else "mov.b64" if width == 8 else wider
        self._emit(s, self.table[move][0], [self._slot(to, size), at], 1)

    def _load_selected(self, s, to: str, address: str):
        """The parameter of that width whose address is in a register."""
        size, chosen = self._size_of(to), self._new(4)
        for name, (at, width) in list(self.parameters.items()):
            if width == size and name in (operand for operand, _ in self.slots):
                place = self._slot(name, 4)
                self._emit(s, self.table["setp.eq.u32"][0], [chosen, self._slot(address, 4), place], 1)
                result = self._slot(to, size)
                self._emit(s, self.table[f"selp.b{8 * size}"][0], [result, at, result, chosen], 1)

    def _op_st(self, s, parts, o):
        self._access(s, parts, o[1], o[0], load=False)

    def _access(self, s, parts, values, address, load: bool):
        space = "SHARED" if any(part.startswith("shared") for part in parts) else "GLOBAL"
        assert space == "SHARED" or "global" in parts, "an address space other than global and shared"
        bits = int(re.search(r"\d+$", parts[-1]).group())
        values = values if isinstance(values, list) else [values]
        at, offset = self._address(address, 8 if space == "GLOBAL" else 4)
        extended = [value for value in values if bits < 64 and value.startswith("%") and self._size_of(value) == 8]
        narrow = {value: self._new(4) for value in extended}  # a narrow access to a wide register: to its low half
        slots = [narrow[value] if value in narrow else self._slot(value, bits // 8) for value in values]
        for value in () if load else narrow:
            self._emit(s, self.table["cvt.u32.u64"][0], [narrow[value], self._slot(value, 8)], 1)
        self._emit(
            s, f"{'LOAD' if load else 'STORE'}_{space}", [*slots, at] if load else [at, *slots],
            len(slots) if load else 0, a=bits // 8, b=len(slots), c=parts[-1][0] == "s", offset=offset,
        )  # fmt: skip
        widened = "cvt.s64.s32" if parts[-1][0] == "s" else "cvt.u64.u32"
        for value in narrow if load else ():
            self._emit(s, self.table[widened][0], [self._slot(value, 8), narrow[value]], 1)

    def _op_cp(self, s, parts, o):
        assert parts[1] == "async" and "bulk" not in parts, "a copy other than cp.async"
        if "commit_group" in parts:
            self._emit(s, "CP_COMMIT")
        elif "wait_group" in parts or "wait_all" in parts:
            self._emit(s, "CP_WAIT", a=int(o[0], 0) if o else -1)
        else:
            (to, offset), (source, source_offset) = self._address(o[0], 4), self._address(o[1], 8)
            slots = [to, source, self._slot(o[3] if len(o) > 3 else o[2], 4)]
            self._emit(s, "CP_ASYNC", slots, a=int(o[2], 0), c=source_offset, offset=offset)

    def _op_ldmatrix(self, s, parts, o):
        self._matrices(s, parts, o[0], o[1], load=True)

    def _op_stmatrix(self, s, parts, o):
        self._matrices(s, parts, o[1], o[0], load=False)

    def _matrices(self, s, parts, values, address, load: bool):
        assert parts[-1] == "b16" and "m8n8" in parts, "matrices other than 8 by 8 of 16 bits"
        slots, (at, offset) = [self._slot(value, 4) for value in values], self._address(address, 4)
        self._emit(
            s, "LDMATRIX" if load else "STMATRIX", [*slots, at] if load else [at, *slots], len(slots) if load else 0,
            a=len(slots), b="trans" in parts, offset=offset,
        )  # fmt: skip

    def _op_mma(self, s, parts, o):
        k = next(int(found.group(1)) for part in parts if (found := re.fullmatch(r"m16n8k(8|16)", part)))
        assert parts[-4] == "f32" and parts[-1] == "f32" and parts[-2] == parts[-3] in ("bf16", "f16"), "types"
        self._emit(s, "MMA", [self._slot(x, 4) for group in o for x in group], 4, a=k, b=parts[-2] == "bf16")

    def _op_wgmma(self, s, parts, o):
        if parts[1] == "fence":
            self._emit(s, "WGMMA_FENCE")
        elif parts[1] == "commit_group":
            self._emit(s, "WGMMA_COMMIT")
        elif parts[1] == "wait_group":
            self._emit(s, "WGMMA_WAIT", a=int(o[0], 0))
        else:
            assert parts[-3] == "f32" and parts[-1] == parts[-2] in ("bf16", "f16"), "types"
            results, left, right, accumulate, sign_a, sign_b, *transposed = o
            in_registers = isinstance(left, list)
            transposed_b = int(transposed[-1]) if transposed else 0
            transposed_a = int(transposed[0]) if len(transposed) > 1 else 0
            of_a = [self._slot(x, 4) for x in left] if in_registers else [self._slot(left, 8)]
            slots = [*(self._slot(x, 4) for x in results), *of_a, self._slot(right, 8), self._slot(accumulate, 4)]
            flags = in_registers | transposed_a << 1 | transposed_b << 2 | (parts[-1] == "bf16") << 3
            n = int(re.search(r"m64n(\d+)k16", s.name).group(1))
            self._emit(s, "WGMMA", slots, len(results), a=n, b=flags, c=int(sign_a), d=int(sign_b))

    def _op_shfl(self, s, parts, o):
        results = o[0].split("|")
        slots = [self._slot(x, 4) for x in [*results, *o[1:4]]]
        kind = ("bfly", "idx", "up", "down").index(parts[2])
        self._emit(s, "SHUFFLE", slots, len(results), a=kind, b=len(results) - 1)

    def _op_redux(self, s, parts, o):
        kind = ("add", "min", "max", "and", "or", "xor").index(parts[2])
        self._emit(s, "REDUX", [self._slot(x, 4) for x in o[:2]], 1, a=kind, b=parts[-1] == "s32")

    def _op_vote(self, s, parts, o):
        kind = ("ballot", "any", "all").index(parts[2])
        self._emit(s, "VOTE", [self._slot(x, 4) for x in o[:2]], 1, a=kind)

    def _op_elect(self, s, parts, o):
        self._emit(s, "ELECT", [self._slot(x, 4) for x in o[0].split("|")], 2)

    def _op_tcgen05(self, s, parts, o):
        what = parts[1]
        if what in ("relinquish_alloc_permit", "dealloc"):
            self._emit(s, "NOTHING")
        elif what == "alloc":
            self._emit(s, "TENSOR_ALLOCATE", [self._address(o[0], 4)[0]], a=int(o[1], 0))
        elif what.startswith("wait::"):
            self._emit(s, "TENSOR_WAIT", a=what == "wait::st")
        elif what in ("ld", "st"):
            load, form = what == "ld", ("32x32b", "16x32bx2", "16x256b").index(parts[4])
            values, address, *rest = o if load else (o[-1], o[0], *o[1:-1])
            slots, (at, offset) = [self._slot(value, 4) for value in values], self._address(address, 4)
            self._emit(
                s, "TENSOR_LOAD" if load else "TENSOR_STORE", [*slots, at] if load else [at, *slots],
                len(slots) if load else 0, a=len(slots), b=form, c=int(rest[0], 0) if rest else 0, offset=offset,
            )  # fmt: skip
        elif what == "mma":
            assert parts[2:] == ["cta_group::1", "kind::f16"] and len(o) == 5, "a kind of product"
            (to, offset), in_memory = self._address(o[0], 4), isinstance(o[1], Address)
            left, left_offset = self._address(o[1], 4) if in_memory else (self._slot(o[1], 8), 0)
            slots = [to, left, self._slot(o[2], 8), self._slot(o[3], 4), self._slot(o[4], 4)]
            self._emit(s, "TENSOR_PRODUCT", slots, a=in_memory, c=left_offset, offset=offset)
        elif what == "commit":
            shared = parts[4:5] == ["shared::cluster"]  # the address is one of shared memory then, of 32 bits
            assert [*parts[2:4], parts[-1]] == ["cta_group::1", "mbarrier::arrive::one", "b64"], "a kind of commit"
            assert len(parts) == 5 + shared, "a kind of commit"
            at, offset = self._address(o[0], 4 if shared else 8)
            if shared:
                narrow, at = at, self._new(8)
                self._emit(s, self.table["cvt.u64.u32"][0], [at, narrow], 1)
            self._emit(s, "TENSOR_COMMIT", [at], offset=offset)
        else:
            raise KeyError(s.name)

    def _op_mbarrier(self, s, parts, o):
        if parts[1] == "inval":
            self._emit(s, "NOTHING")
        elif parts[1] == "init":
            at, offset = self._address(o[0], 4)
            self._emit(s, "MBARRIER_INIT", [at, self._slot(o[1], 4)], offset=offset)
        else:
            assert parts[1:3] == ["try_wait", "parity"], "a kind of mbarrier"
            at, offset = self._address(o[1], 4)
            self._emit(s, "MBARRIER_WAIT", [self._slot(o[0], 4), at, self._slot(o[2], 4)], 1, offset=offset)

    def _op_mov(self, s, parts, o):
        to, value = o
        if not isinstance(to, list) and not isinstance(value, list):
            return False
        bits = int(re.search(r"\d+$", parts[1]).group())
        pieces, whole = (to, value) if isinstance(to, list) else (value, to)
        of_pieces, of_whole = [self._slot(x, 4) for x in pieces], self._slot(whole, bits // 8)
        if pieces is to:
            self._emit(s, "UNPACK", [*of_pieces, of_whole], len(to), a=len(to), b=bits // len(to) // 8)
        else:
            self._emit(s, "PACK", [of_whole, *of_pieces], 1, a=len(value), b=bits // len(value) // 8)

    def _op_cvta(self, s, parts, o):
        self._emit(s, self.table["mov.b64"][0], [self._slot(x, 8) for x in o], 1)
