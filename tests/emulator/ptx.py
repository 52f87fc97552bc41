"""PTX text -> statements: what is written, without what it means."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path


class Unsupported(Exception):
    """PTX that the emulator does not know."""


@dataclass(frozen=True)
class Address:
    """[base+offset]"""

    base: str
    offset: int


Operand = str | list[str] | Address


@dataclass(frozen=True)
class Statement:
    """One instruction: @guard name operands."""

    line: int  # of the PTX text, from 1
    source: str | None  # file:line of the kernel's source; of Triton's own functions, the line that calls them
    guard: str | None
    negated: bool
    name: str
    operands: tuple[Operand, ...]


@dataclass(frozen=True)
class Registers:
    """A declaration: one register, or `prefix` followed by a number."""

    prefix: str
    numbered: bool
    bytes: int

    def covers(self, name: str) -> bool:
        if not self.numbered:
            return name == self.prefix
        return name.startswith(self.prefix) and name[len(self.prefix) :].isdigit()


@dataclass(frozen=True)
class Text:
    """The one kernel of a PTX module."""

    name: str
    parameters: tuple[tuple[str, int], ...]  # name, bytes
    registers: tuple[Registers, ...]
    statements: tuple[Statement, ...]
    labels: dict[str, int]  # -> the statement that follows
    lines: list[str]


def read(text: str) -> Text:
    """Parse a module with one kernel and no functions."""
    entries = re.findall(r"\.entry\s+(\w+)\s*\(([^)]*)\)", text)
    if len(entries) != 1 or re.search(r"^\s*(\.visible\s+|\.extern\s+)?\.func\b", text, re.MULTILINE):
        raise Unsupported("a module with other than one kernel and no functions")
    (name, declared), lines = entries[0], text.splitlines()
    parameters = tuple(
        (parameter, 8 if kind.endswith("64") else 4)
        for kind, parameter in re.findall(r"\.param\s+\.(\w+)[^,]*?(\w+)\s*(?:,|$)", declared.strip())
    )
    registers, statements, labels = [], [], {}
    for number, source, scope, piece in _pieces(lines):
        if piece.startswith(".reg"):
            registers += _registers(piece)
        elif piece.endswith(":"):
            labels[piece[:-1] + scope] = len(statements)
        else:
            statement = _statement(number, source, piece)
            if scope and statement.name.startswith("bra"):  # out of a scope nothing branches
                statement = replace(statement, operands=(statement.operands[0] + scope,))
            statements.append(statement)
    return Text(name, parameters, tuple(registers), tuple(statements), labels, lines)


def _pieces(lines: list[str]) -> Iterator[tuple[int, str | None, str, str]]:
    """(line, source, scope, piece) of the body: instructions, declarations of registers, labels, which end in a colon.

    A scope is a block of inline assembly, with labels of its own; "" outside of them.
    """
    files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]+)"', "\n".join(lines), re.MULTILINE))
    tritons = {Path(path).name for path in files.values() if "/triton/language/" in path}
    depth, source, scope = 0, None, ""
    for number, line in enumerate(lines, 1):
        line, _, comment = (part.strip() for part in line.partition("//"))
        if line in ("{", "}"):
            depth += 1 if line == "{" else -1
            scope = f"@{number}" if depth > 1 else ""
        elif not depth or not line:
            continue
        elif place := re.match(r"\.loc\s+(\d+)\s+(\d+)", line):
            file, row = place.groups()
            callers = [(Path(files.get(file, file)).name, row), *re.findall(r"([\w.]+):(\d+):\d+", comment)]
            source = ":".join(next((caller for caller in callers if caller[0] not in tritons), callers[0]))
        elif line.startswith((".local", ".shared")):
            raise Unsupported(f"line {number}: {line}")
        elif line.startswith(".") and not line.startswith(".reg"):
            continue
        else:
            if label := re.match(r"([$\w]+):(?!:)", line):
                yield number, source, scope, label.group()
                line = line[label.end() :]
            for piece in re.sub(r"^\{|\}$", "", line).split(";") if ".reg" in line else line.split(";"):
                if piece.strip():
                    yield number, source, scope, piece.strip()


def _registers(piece: str) -> Iterator[Registers]:
    kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", piece).groups()
    size = 8 if kind.endswith("64") else 4
    for name in names.split(","):
        numbered = re.match(r"(.*)<(\d+)>", name.strip())
        yield Registers(numbered.group(1) if numbered else name.strip(), bool(numbered), size)


def _statement(number: int, source: str | None, piece: str) -> Statement:
    found = re.match(r"(?:@(!?)(%?\w+)\s+)?([a-z][\w.:]*)\s*(.*)$", piece, re.DOTALL)
    if not found:
        raise Unsupported(f"line {number}: {piece}")
    negated, guard, name, operands = found.groups()
    return Statement(number, source, guard, negated == "!", name, tuple(_operands(operands)))


def _operands(text: str) -> Iterator[Operand]:
    depth, start = 0, 0
    for i, c in enumerate(text + ","):
        depth += (c in "{[(") - (c in "}])")
        if c == "," and depth == 0:
            piece, start = text[start:i].strip(), i + 1
            if piece.startswith("{"):
                yield [part.strip() for part in piece[1:-1].split(",") if part.strip()]
            elif piece.startswith("["):
                base, _, offset = piece[1:-1].partition("+")
                yield Address(base.strip(), int(offset.strip() or "0", 0))
            elif piece:
                yield piece
