"""What the compiled kernels do at the shipped settings: instructions, 32-byte sectors, wavefronts of shared memory.

    python -m mos_kernels kernels --counts sm_90    the table, with the statements behind conflicts and wasted sectors
    python -m tests.emulator.counts                 of every architecture, in training and decoding, without these
    python -m tests.emulator.counts --write         store it in counts.json, which the tests hold the kernels to

A few programs of each launch run, on the Qwen2-1.5B shapes in bf16, and stand for all of them. Instructions are those
of PTX; sectors are what the instructions ask for, before any cache.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from . import build, compilation, launched, machine

FILE = Path(__file__).parent / "counts.json"
ARCHITECTURES, TOKENS = ("sm_80", "sm_90", "sm_100"), (8192, 16)
PROGRAMS = 3  # of each launch that run
PROCESSORS = 132  # of the device that a launch is divided for: an H100's or H200's

CLASSES = (
    ("tensor", r"mma\.|wgmma\.mma|tcgen05\.mma"),
    ("matrix", r"ldmatrix|stmatrix"),
    ("shared", r"(ld|st)\.shared"),
    ("global", r"(ld|st)\.global"),
    ("copy", r"cp\.async\.c[ag]"),
    ("shuffle", r"shfl|redux|vote|elect"),
    (
        "barrier",
        r"bar\.|barrier|fence|wgmma\.(fence|commit|wait)|cp\.async\.(commit|wait)|mbarrier|tcgen05\.(wait|commit)",
    ),
    ("memory", r"tcgen05"),
    ("special", r"(ex2|lg2|rcp|rsqrt|sqrt|sin|cos|tanh|div)\."),
    ("float", r"(fma|mul|add|sub|min|max|abs|neg)\.(\w+\.)*f32(x2)?"),
    ("convert", r"cvt\..*(f32|f16|f64)"),
    ("control", r"bra|ret|exit|ld\.param"),
    ("move", r"mov\."),
    ("integer", r"."),
)
"""Instructions by name; the first that fits. memory: tensor memory, read, written and allocated."""


def kind(name: str) -> str:
    return next(kind for kind, pattern in CLASSES if re.match(pattern, name))


def summary(result: machine.Result) -> dict[str, float]:
    """Instructions by class, of an average warp; the rest of all warps that ran."""
    totals: dict[str, float] = defaultdict(float)
    for statement, n in zip(result.program.statements, result.counts, strict=True):
        of_kind = kind(statement.name)
        totals[of_kind] += int(n["executed"]) / result.warps
        if of_kind in ("global", "copy"):
            way = "stored" if statement.name.startswith("st") else "loaded"
            totals[f"{way} sectors"] += int(n["sectors"])
            totals[f"{way} useful bytes"] += int(n["useful"])
        if of_kind in ("shared", "matrix", "copy"):
            totals["wavefronts"] += int(n["wavefronts"])
            totals["least wavefronts"] += int(n["least_wavefronts"])
    return dict(totals)


def waste(result: machine.Result, share: float = 0.05) -> list[str]:
    """The source lines that take at least `share` of all wavefronts, or sectors, beyond what their bytes would need."""
    found = []
    for unit, more, needed in (
        ("wavefronts", result.counts["wavefronts"], result.counts["least_wavefronts"]),
        ("sectors", result.counts["sectors"], result.counts["useful"] / 32),
    ):
        excess, total, of_line = more - needed.astype(float), max(more.sum(), 1), defaultdict(list)
        for pc in np.flatnonzero(excess > 0).tolist():
            of_line[result.program.statements[pc].source].append(pc)
        for pcs in sorted(of_line.values(), key=lambda pcs: -excess[pcs].sum())[:4]:
            if excess[pcs].sum() > share * total:
                found.append(
                    f"{more[pcs].sum() / result.warps:.1f} {unit} a warp where {needed[pcs].sum() / result.warps:.1f} "
                    f"would do, of {total / result.warps:.1f} in all, by {len(pcs)} instructions, the dearest: "
                    + result.program.where(max(pcs, key=excess.__getitem__))
                )
    return found


@dataclass(frozen=True)
class Row:
    """One launch, scaled to its whole grid."""

    key: str  # the kernel, and what tells its variants apart
    grid: tuple[int, ...]
    instructions: dict[str, float]  # by class, of an average warp
    sectors: float  # loaded and stored
    useful_bytes: float
    wavefronts: float
    least_wavefronts: float
    waste: tuple[str, ...]

    def stored(self) -> dict[str, float]:
        """What the tests hold the kernel to, in whole numbers."""
        return {name: round(getattr(self, name)) for name in HELD}


HELD = ("sectors", "useful_bytes", "wavefronts", "least_wavefronts")


def rows(architecture: str, T: int) -> list[Row]:
    """The distinct launches of the defaults and of silu, for an FFN's router and a linear's own."""
    from mos_kernels import MoSConfig
    from mos_kernels.backends.triton import compiled, launch

    found: dict[compilation.Specialised, tuple] = {}

    def run(kernel, grid, arguments, constants) -> None:
        what, values = compilation.specialised(kernel, arguments, constants, architecture)
        if what in found or 0 in grid:
            return
        made, whole = compilation.compiled(what), (*grid, 1, 1)[:3]
        total = whole[0] * whole[1] * whole[2]
        chosen = sorted({total * (2 * i + 1) // (2 * PROGRAMS) for i in range(PROGRAMS)})
        result = machine.run(made.program, grid, made.warps, made.shared_bytes, values, check=False, programs=chosen)
        found[what] = (whole, result, total / len(chosen))

    @contextmanager
    def recorded(_: str) -> Iterator[list]:
        with launched.on_cpu(architecture, run):
            yield []

    configs = [(MoSConfig(router_scope="linear"), False), (MoSConfig(), False), (MoSConfig(activation="silu"), False)]
    processors = mock.patch.object(launch, "processors", lambda device: PROCESSORS)
    with processors, mock.patch.object(compiled, "recorded", recorded):
        for config, wrapped in [*configs, (MoSConfig(), True)]:
            compiled.layer_launches(architecture, config, T, 1536, 8960, torch.bfloat16, wrapped, device="cpu")
        compiled.ffn_launches(architecture, MoSConfig(), T, 8960, torch.bfloat16, device="cpu")
    return [
        _row(key, *of_launch) for key, of_launch in zip(_keys(list(found)), found.values(), strict=True)
    ]  # fmt: skip


def _row(key: str, grid: tuple[int, ...], result: machine.Result, scale: float) -> Row:
    totals = summary(result)

    def scaled(*names: str) -> float:
        return scale * sum(totals.get(name, 0.0) for name in names)

    return Row(
        key, grid, {name: totals.get(name, 0.0) for name, _ in CLASSES}, scaled("loaded sectors", "stored sectors"),
        scaled("loaded useful bytes", "stored useful bytes"), scaled("wavefronts"), scaled("least wavefronts"),
        tuple(waste(result)),
    )  # fmt: skip


def _keys(launches: list[compilation.Specialised]) -> list[str]:
    """Names that outlive a change of settings: a kernel's own constants, then its types, then a number."""
    from mos_kernels.backends.triton import launch

    def of_settings(name: str, kernel: str) -> bool:
        buckets = launch.table()["default"].get(kernel, {}).values()
        return name.startswith("BLOCK") or any(name in settings for settings in buckets)

    def traits(one: compilation.Specialised, types: bool) -> dict:
        own = {name: value for name, value in one.constants if not of_settings(name, one.name)}
        return {**own, **dict(one.signature), **{f"{name}%16": 0 for name in one.aligned}} if types else own

    keys: list[str] = []
    for one in launches:
        alike = [other for other in launches if other.kernel is one.kernel]
        types = [traits(other, False) for other in alike].count(traits(one, False)) > 1
        others, own = [traits(other, types) for other in alike], traits(one, types)
        varying = sorted(name for name in own if any(other.get(name) != own[name] for other in others))
        key = " ".join([one.name, *(f"{name}={own[name]}" for name in varying)])
        keys.append(key if key not in keys else f"{key} #{sum(k.startswith(key) for k in keys) + 1}")
    return keys


def stored() -> dict[str, dict[str, dict[str, dict[str, int]]]]:
    """architecture -> tokens -> key -> HELD."""
    return json.loads(FILE.read_text())


def worse(found: list[Row], kept: dict[str, dict[str, int]]) -> list[str]:
    """The kernels that fetch more or conflict more than the stored table says, and those that it does not know."""
    lines = []
    for row in found:
        now, before = row.stored(), kept.get(row.key)
        if before is None:
            lines.append(f"{row.key} is not in the table")
            continue
        for name in ("sectors", "wavefronts"):
            if now[name] > 1.01 * before[name]:
                lines += [f"{row.key}: {now[name]} {name} instead of {before[name]}", *row.waste]
    gone = kept.keys() - {row.key for row in found}
    return lines + [f"{key} is in the table and not launched" for key in sorted(gone)]


def table(architecture: str, T: int, found: list[Row], lines: bool) -> Iterator[str]:
    yield (
        f"{architecture}, {T} tokens: MB in sectors / asked for, wavefronts / least (thousands), instructions a warp, "
        "and of these " + " ".join(name for name, _ in CLASSES)
    )
    for row in found:
        counts = " ".join(f"{row.instructions[name]:.0f}" for name, _ in CLASSES)
        yield (
            f"  {row.sectors * 32e-6:9.2f} /{row.useful_bytes * 1e-6:9.2f} {row.wavefronts / 1e3:10.1f} /"
            f"{row.least_wavefronts / 1e3:10.1f} {sum(row.instructions.values()):8.0f}: {counts}  {row.key}"
        )
        if lines:
            yield from (f"      {line}" for line in row.waste)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.emulator.counts", description=__doc__.split("\n")[0])
    parser.add_argument("architectures", nargs="*", default=ARCHITECTURES)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--lines", action="store_true", help="the statements behind conflicts and wasted sectors")
    parser.add_argument("--write", action="store_true", help=f"store the table in {FILE.name}")
    arguments = parser.parse_args(argv)
    unknown = sorted(set(arguments.architectures) - set(ARCHITECTURES))
    if missing := build.missing() or (f"unknown {unknown}: choose from {list(ARCHITECTURES)}" if unknown else None):
        print(f"error: {missing}", file=sys.stderr)
        return 2
    kept: dict = {}
    for architecture in arguments.architectures:
        for T in arguments.tokens:
            found = rows(architecture, T)
            print(*table(architecture, T, found, arguments.lines), sep="\n", flush=True)
            kept.setdefault(architecture, {})[str(T)] = {
                row.key: row.stored() for row in sorted(found, key=lambda r: r.key)
            }
    if arguments.write:
        stored = json.loads(FILE.read_text())
        for architecture, counted in kept.items():
            stored.setdefault(architecture, {}).update(counted)
        beside = FILE.with_suffix(".new")
        beside.write_text(json.dumps(stored, indent=1) + "\n")
        beside.replace(FILE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
