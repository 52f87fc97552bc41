"""Every instruction of machine/elementwise.def, one by one, against Python's integers and numpy's numbers."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from . import build, by_hand, machine

NAMES = sorted(build.elementwise()) if build.missing() is None else []
THREADS = 128
WIDTH = {"pred": 1, "s8": 16, "u8": 16, "bf16": 16, "f16": 16, "bf16x2": 32, "f16x2": 32, "f32x2": 64, "tf32": 32}
FLOATS = {"f32": (np.uint32, np.float32), "f64": (np.uint64, np.float64)}
HALVES = {"bf16": (8, -133), "f16": (11, -24)}  # digits, exponent of the least number


def width(kind: str) -> int:
    return WIDTH.get(kind) or int(kind[1:])


def types(name: str) -> tuple[str, list[str]]:
    """Of the result and of the operands."""
    parts = name.split(".")
    last = parts[-1]
    if parts[0] == "cvt":
        return (parts[-2], ["f32", "f32"]) if parts[-2].endswith("x2") else (parts[-2], [last])
    if parts[0] == "setp":
        return "pred", [last, last]
    if parts[0] == "selp":
        return last, [last, last, "pred"]
    if parts[0] in ("shl", "shr"):
        return last, [last, "u32"]
    if parts[1] == "wide":
        wide = f"{last[0]}{2 * width(last)}"
        return wide, [last, last] + [wide] * (parts[0] == "mad")
    if parts[0] in ("popc", "clz"):
        return "u32", [last]
    if parts[0] in ("bfe", "bfi"):
        return last, [last] * (2 if parts[0] == "bfi" else 1) + ["u32", "u32"]
    return last, [last] * (len(build.elementwise()[name][1]) - 1)


# raw bits <-> numbers


def signed(raw: int, bits: int) -> int:
    return raw - (1 << bits) if raw >> (bits - 1) & 1 else raw


def number(raw: int, kind: str):
    """A raw value as an integer, or as a numpy or Python float."""
    if kind in FLOATS:
        of_bits, of_numbers = FLOATS[kind]
        return np.array(raw, of_bits).view(of_numbers)[()]
    if kind == "bf16":
        return float(number(raw << 16, "f32"))
    if kind == "f16":
        return float(np.array(raw, np.uint16).view(np.float16)[()])
    if kind in ("s8", "u8"):
        raw &= 0xFF
        return signed(raw, 8) if kind == "s8" else raw
    return signed(raw, width(kind)) if kind[0] == "s" else raw


def raw(value, kind: str) -> int:
    if kind in FLOATS:
        of_bits, of_numbers = FLOATS[kind]
        with np.errstate(all="ignore"):
            return int(np.array(value).astype(of_numbers).view(of_bits)[()])
    if kind in HALVES:
        return half(value, kind)
    if kind == "pred":
        return int(bool(value))
    return int(value) & ((1 << width(kind)) - 1)


def half(value: float, kind: str) -> int:
    """To nearest even, computed on the number and not on its bits."""
    digits, least = HALVES[kind]
    bias, fraction = (127, 7) if kind == "bf16" else (15, 10)
    value = float(value)
    sign = int(math.copysign(1, value) < 0) << 15
    if math.isnan(value):
        return 0x7FFF
    if value == 0:
        return sign
    infinity = ((1 << (15 - fraction)) - 1) << fraction
    if math.isinf(value):
        return sign | infinity
    quantum = max(math.frexp(value)[1] - digits, least)
    steps = round(Fraction(abs(value)) / Fraction(2) ** quantum)
    exponent = quantum + digits - 1 + bias  # of a number of `digits` digits
    found = steps if quantum == least else (exponent << fraction) + steps - (1 << fraction)
    return sign | min(found, infinity)


# operands


def operands(kinds: list[str], name: str) -> list[list[int]]:
    rng = np.random.default_rng(len(name) + sum(map(ord, name)))
    return [operand(kind, name, i, rng) for i, kind in enumerate(kinds)]


def operand(kind: str, name: str, place: int, rng) -> list[int]:
    if kind == "pred":
        return rng.integers(0, 2, THREADS).tolist()
    if name.startswith(("shl", "shr", "bfe", "bfi")) and kind == "u32" and place:
        return [*rng.integers(0, 70, THREADS - 4).tolist(), 0, 31, 32, 255]
    if kind.endswith("x2"):
        low, high = (operand(kind[:-2], name, place, rng) for _ in range(2))
        return [a | b << width(kind[:-2]) for a, b in zip(low, high, strict=True)]
    if kind in HALVES:
        # few digits, so that sums and products are exact before they are rounded once
        steps = rng.integers(-255, 256, THREADS) / 16 if kind == "bf16" else rng.integers(-1023, 1024, THREADS) / 32
        return [half(value, kind) for value in steps]
    if kind in FLOATS:
        return [raw(value, kind) for value in floats(kind, name, rng)]
    bits = width(kind)
    found = [
        int(value) & ((1 << bits) - 1)
        for value in rng.integers(-(2**62), 2**62, THREADS) >> rng.integers(0, 60, THREADS)
    ]
    edges = [0, 1, (1 << bits) - 1, 1 << (bits - 1), (1 << (bits - 1)) - 1, 2]
    found[: len(edges)] = edges
    found[len(edges) : 2 * len(edges)] = rng.permutation(edges).tolist() if bits < 64 else edges[::-1]
    if name.startswith(("div", "rem")) and place == 1:
        found = [value or 3 for value in found]  # PTX leaves x / 0 open
    return found


def floats(kind: str, name: str, rng) -> np.ndarray:
    """Numbers of 12 digits: float64 then holds what is exact of float32 before it is rounded."""
    values = np.round(rng.uniform(-1, 1, THREADS) * 2048) / 2048 * 2.0 ** rng.integers(-6, 7, THREADS)
    special = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan]
    if name.startswith(("min", "max", "setp", "abs", "neg", "copysign", "mov", "selp", "cvt")):
        values[: len(special)], values[8 : 8 + len(special)] = special, rng.permutation(special)
        values[16:20] = [2.5, 3.5, -2.5, 0.5]
    if name.startswith("cvt"):
        values[20:30] = [2**31, -(2**31), 2**32, -1e30, 1e30, 2**63, 65504.0, 65520.0, 1e-8, 6e-8]
        values[30:60] *= 1.000244140625  # more digits than a half has
    if name.startswith(("sqrt", "rsqrt", "lg2")):
        values = np.abs(values) + 2**-20
    if name.startswith(("rcp", "rsqrt", "div")):
        values = np.where(values == 0, 1.5, values)
    if name.startswith("ex2"):
        values = np.clip(values, -100, 100)
    return values


# what is right


def exact(value: Fraction | float, kind: str):
    return value if kind != "f64" else float(value)


def fma(a, b, c, kind: str):
    if kind == "f64":
        return float(Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c)))
    return float(a) * float(b) + float(c)


def nan_aware(a, b, pick, propagate: bool):
    if a != a or b != b:
        return math.nan if propagate or (a != a and b != b) else (b if a != a else a)
    if a == b:
        return pick((math.copysign(1, a), a), (math.copysign(1, b), b))[1]
    return pick(a, b)


def to_integer(value, kind: str, mode: str) -> int:
    if math.isnan(value):
        return 0
    bits = width(kind)
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if kind[0] == "s" else (0, (1 << bits) - 1)
    if math.isinf(value):
        return high if value > 0 else low
    whole = {"rzi": math.trunc, "rni": round, "rmi": math.floor, "rpi": math.ceil}[mode](float(value))
    return min(max(whole, low), high)


def quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


COMPARE = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b, "lo": lambda a, b: a < b, "ls": lambda a, b: a <= b,
    "hi": lambda a, b: a > b, "hs": lambda a, b: a >= b,
}  # fmt: skip
APPROXIMATE = {
    "ex2": np.exp2, "lg2": np.log2, "rcp": lambda a: 1 / a, "rsqrt": lambda a: 1 / np.sqrt(a), "sqrt": np.sqrt,
    "sin": np.sin, "cos": np.cos, "tanh": np.tanh, "div": lambda a, b: a / b,
}  # fmt: skip


def compared(operation: str, a, b) -> bool:
    unordered = a != a or b != b
    if operation in ("num", "nan"):
        return unordered == (operation == "nan")
    if operation.endswith("u") and operation[:-1] in COMPARE:
        return unordered or COMPARE[operation[:-1]](a, b)
    return not unordered and COMPARE[operation](a, b)


def field(value: int, start: int, length: int, bits: int, is_signed: bool) -> int:
    start, length = start & 255, length & 255
    kept = [
        value >> min(start + i, bits - 1) & 1 if is_signed or start + i < bits else 0 for i in range(min(length, bits))
    ]
    found = sum(one << i for i, one in enumerate(kept))
    if is_signed and length:
        sign = value >> min(start + length - 1, bits - 1) & 1
        found |= sum(sign << i for i in range(len(kept), bits))
    return found


def expected(name: str, result: str, kinds: list[str], raws: list[int]):
    """The raw result of one thread, or None where PTX leaves it open."""
    parts, operation, kind = name.split("."), name.split(".")[0], kinds[0]
    if result.endswith("x2") and operation != "cvt":
        half_name, half_kind = name.removesuffix("x2"), result.removesuffix("x2")
        bits = width(half_kind)
        low, high = (
            expected(half_name, half_kind, [half_kind] * len(raws), [r >> shift & ((1 << bits) - 1) for r in raws])
            for shift in (0, bits)
        )
        return low | high << bits
    values = [number(r, kind) for r, kind in zip(raws, kinds, strict=True)]
    bits, a = width(kind), values[0]
    b = values[1] if len(values) > 1 else None
    if operation in ("add", "sub", "mul", "mad", "fma") and parts[1] != "hi":
        c = values[2] if len(values) > 2 else 0
        if operation == "fma":
            return raw(fma(a, b, c, kind), result)
        found = {"add": lambda: a + b, "sub": lambda: a - b, "mul": lambda: a * b, "mad": lambda: a * b + c}[
            operation
        ]()
        return raw(found, result)
    if operation == "mul":
        return raw(a * b >> bits, result)
    if operation in ("min", "max"):
        pick = min if operation == "min" else max
        return raw(nan_aware(a, b, pick, "NaN" in parts) if kind in FLOATS else pick(a, b), result)
    if operation in ("div", "rem") and kind not in FLOATS:
        return raw(quotient(a, b) if operation == "div" else a - b * quotient(a, b), result)
    if operation == "setp":
        return raw(compared(parts[1], a, b), "pred")
    if operation in ("and", "or", "xor"):
        return {"and": a & b, "or": a | b, "xor": a ^ b}[operation]
    if operation == "not":
        return raws[0] ^ ((1 << bits) - 1)
    if operation == "neg":
        return raws[0] ^ (1 << (bits - 1)) if kind in FLOATS or kind in HALVES else raw(-a, result)
    if operation == "abs":
        return raws[0] & ((1 << (bits - 1)) - 1) if kind in FLOATS or kind in HALVES else raw(abs(a), result)
    if operation == "copysign":
        return (raws[1] & ((1 << (bits - 1)) - 1)) | (raws[0] >> (bits - 1)) << (bits - 1)
    if operation == "mov":
        return raws[0]
    if operation == "selp":
        return raws[0] if raws[2] else raws[1]
    if operation == "shl":
        return raw(raws[0] << b if b < bits else 0, result)
    if operation == "shr":
        return raw(a >> min(b, bits) if kind[0] == "s" or b < bits else 0, result)
    if operation == "bfe":
        return field(raws[0], raws[1], raws[2], bits, kind[0] == "s")
    if operation == "bfi":
        start, length = raws[2] & 255, raws[3] & 255
        places = [i for i in range(start, start + length) if i < bits]
        kept = raws[1] & ~sum(1 << i for i in places)
        return kept | sum((raws[0] >> (i - start) & 1) << i for i in places)
    if operation == "lop3":
        chosen = [sum((r >> i & 1) << (2 - n) for n, r in enumerate(raws[:3])) for i in range(32)]
        return sum((raws[3] >> index & 1) << i for i, index in enumerate(chosen))
    if operation == "prmt":
        source, found = raws[0] | raws[1] << 32, 0
        for i in range(4):
            which = raws[2] >> 4 * i & 15
            byte = source >> 8 * (which & 7) & 255
            found |= (255 * (byte >> 7) if which & 8 else byte) << 8 * i
        return found
    if operation == "shf":
        both, by = raws[0] | raws[1] << 32, raws[2] & 31
        return (both << by >> 32 if parts[1] == "l" else both >> by) & 0xFFFFFFFF
    if operation == "popc":
        return bin(raws[0]).count("1")
    if operation == "clz":
        return 32 - raws[0].bit_length()
    if operation == "cvt":
        return converted(parts, result, kinds, values)
    if parts[1] == "rn":
        exactly = {"div": lambda: a / b, "rcp": lambda: type(a)(1) / a, "sqrt": lambda: np.sqrt(a)}
        return raw(exactly[operation](), result)
    return raw(APPROXIMATE[operation](*(np.float64(value) for value in values)), result)


def converted(parts: list[str], result: str, kinds: list[str], values: list) -> int:
    a = values[0]
    if result.endswith("x2"):
        return half(values[1], result[:-2]) | half(a, result[:-2]) << 16
    if result == "tf32":
        steps = math.floor(abs(float(a)) / 2.0 ** (math.frexp(a)[1] - 11) + 0.5) if math.isfinite(a) and a else 0
        return raw(math.copysign(math.ldexp(steps, math.frexp(a)[1] - 11), a) if steps else a, "f32")
    if kinds[0] in FLOATS and result not in FLOATS and result not in HALVES:
        return raw(to_integer(a, result, parts[1]), result)
    if parts[1] in ("rni", "rmi", "rpi", "rzi"):
        return raw({"rni": np.rint, "rmi": np.floor, "rpi": np.ceil, "rzi": np.trunc}[parts[1]](a), result)
    if result in ("s8", "u8"):
        return number(int(a), result) & 0xFFFF
    return raw(float(a) if result in HALVES else a, result)


# the machine


def executed(name: str, result: str, kinds: list[str], raws: list[list[int]]) -> list[int]:
    registers = {1: "p", 16: "h", 32: "r", 64: "d"}
    body, used = by_hand.own_part(len(kinds) + 1, 8), []
    for i, kind in enumerate(kinds):
        bits = width(kind)
        if bits == 1:
            body += f"ld.global.b32 %r{20 + i}, [%d{51 + i}];\nsetp.ne.s32 %p{i}, %r{20 + i}, 0;\n"
            used.append(f"%p{i}")
        else:
            used.append(f"%{registers[bits]}{30 + i}")
            body += f"ld.global.b{bits} {used[-1]}, [%d{51 + i}];\n"
    if name.startswith("lop3"):
        used[-1] = hex(raws[-1][0])
    to = f"%{registers[width(result)]}9"
    body += f"{name} {to}, {', '.join(used)};\n"
    if result == "pred":
        body, to = body + "selp.b32 %r8, 1, 0, %p9;\n", "%r8"
    body += f"st.global.b{max(width(result), 16) if result != 'pred' else 32} [%d{51 + len(kinds)}], {to};\n"
    arrays = [torch.tensor([signed(r, 64) for r in one]) for one in raws]
    found = torch.zeros(THREADS, dtype=torch.int64)
    assert by_hand.run(body, [*arrays, found], warps=THREADS // 32).faults() == []
    return [value & ((1 << 64) - 1) for value in found.tolist()]


@pytest.mark.parametrize("name", NAMES)
def test_every_elementwise_instruction(name):
    result, kinds = types(name)
    raws = operands(kinds, name)
    tables = [1 << case for case in range(8)] if name.startswith("lop3") else [None]
    for table in tables:  # lop3's: each case of three bits alone
        assert_right(name, result, kinds, raws if table is None else [*raws[:3], [table] * THREADS])


def assert_right(name: str, result: str, kinds, raws) -> None:
    found = executed(name, result, kinds, raws)
    with np.errstate(all="ignore"):
        wanted = [expected(name, result, kinds, list(one)) for one in zip(*raws, strict=True)]
    as_float = result if result in FLOATS else "f32" if result == "tf32" else None
    for thread, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        shown = (name, [hex(one[thread]) for one in raws], hex(ours), hex(theirs))
        if as_float or result in HALVES:
            kind = as_float or result
            a, b = number(ours, kind), number(theirs, kind)
            if a != a and b != b:
                continue
            if "approx" in name or "full" in name:
                assert a == b or math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-37), shown
                continue
        assert ours == theirs, shown


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_are_added_to_a_float32(dtype):
    kind = {torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    torch.manual_seed(0)
    halves = torch.randn(2, 32, dtype=torch.float64).to(dtype)
    added, found = torch.randn(32), torch.zeros(3, 32)
    body = (
        by_hand.own_part(2, 2)
        + f"""ld.global.b16 %h1, [%d51];
    ld.global.b16 %h2, [%d52];
    mul.wide.u32 %d50, %r0, 4;
    add.s64 %d53, %d3, %d50;
    add.s64 %d54, %d4, %d50;
    ld.global.b32 %r5, [%d53];
    fma.rn.f32.{kind} %r6, %h1, %h2, %r5;
    add.rn.f32.{kind} %r7, %h1, %r5;
    max.f32 %r8, %r5, %r6, %r7;
    st.global.b32 [%d54], %r6;
    st.global.b32 [%d54+128], %r7;
    st.global.b32 [%d54+256], %r8;
    """
    )
    assert by_hand.run(body, [*halves, added, found]).faults() == []
    a, b = halves.double()
    sums = torch.stack([a * b + added.double(), a + added.double()]).float()
    assert torch.equal(found[:2], sums)
    assert torch.equal(found[2], torch.maximum(added, sums.amax(0)))


def test_a_comparison_of_pairs_has_two_results():
    first = torch.tensor([1.0, 3.0, -2.0, torch.nan] * 16, dtype=torch.float16)
    second = torch.tensor([2.0, 2.0, -2.0, 1.0] * 16, dtype=torch.float16)
    body = (
        by_hand.own_part(3, 4)
        + """ld.global.b32 %r5, [%d51];
    ld.global.b32 %r6, [%d52];
    setp.lt.f16x2 %p1|%p2, %r5, %r6;
    selp.b32 %r7, 1, 0, %p1;
    selp.b32 %r8, 2, 0, %p2;
    or.b32 %r7, %r7, %r8;
    st.global.b32 [%d53], %r7;
    """
    )
    found = torch.zeros(32, dtype=torch.int32)
    assert by_hand.run(body, [first, second, found]).faults() == []
    assert found.tolist() == [1, 0] * 16


def test_approximate_instructions_may_err_by_what_is_documented():
    """In units of the last place, and by no more; the same for the same number."""
    values = torch.linspace(0.1, 9.0, 32)
    body = by_hand.own_part(2, 4) + "ld.global.b32 %r5, [%d51];\nrcp.approx.f32 %r6, %r5;\nst.global.b32 [%d52], %r6;\n"
    exact, rough, again = (torch.zeros(32) for _ in range(3))
    by_hand.run(body, [values, exact])
    for found in (rough, again):
        by_hand.run(body, [values, found], machine.Schedule(rough=True))
    apart = (rough.view(torch.int32) - exact.view(torch.int32)).abs()
    assert torch.equal(rough, again) and apart.max() == 1
