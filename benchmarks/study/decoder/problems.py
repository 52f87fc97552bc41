"""Word problems with the equations that solve them, and whether an equation does."""

from __future__ import annotations

import ast
import hashlib
import json
import math
import operator
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

RELATIVE = 1e-3
"""How far from the true answer an equation's may be: some of the data's answers are rounded to three digits."""
SVAMP_TRAIN = 700
"""Its problems are variations of fewer, which stand side by side: a split in the file's order parts few of them."""


class Problem(NamedTuple):
    text: str
    equation: str
    answer: float


class Data(NamedTuple):
    """sha256: of each file read, by name."""

    train: list[Problem]
    test: list[Problem]
    sha256: dict[str, str]


def mawps(folder: Path) -> Data:
    """1,898 problems to train on, and 212 of the 238 of the test set: those that do not stand in the training set."""
    files = {split: folder / "mawps" / f"{split}set.json" for split in ("train", "test")}
    train, test = (
        [
            Problem(row["original_text"].strip(), row["equation"].replace("X", "x"), float(row["ans"]))
            for row in json.loads(path.read_text())
        ]
        for path in files.values()
    )
    known = {problem.text for problem in train}
    return Data(train, [problem for problem in test if problem.text not in known], _digests(files.values()))


def svamp(folder: Path) -> Data:
    """700 problems to train on and 300 to test on, in the file's order."""
    path = folder / "svamp" / "SVAMP.json"
    problems = []
    for row in json.loads(path.read_text()):
        body, equation = row["Body"].strip(), row["Equation"].replace(" ", "")
        body += "" if body.endswith((".", "?", "!", ",")) else "."
        problems.append(Problem(f"{body} {row['Question'].strip()}", f"x={equation}", float(row["Answer"])))
    return Data(problems[:SVAMP_TRAIN], problems[SVAMP_TRAIN:], _digests([path]))


DATASETS: dict[str, Callable[[Path], Data]] = {"mawps": mawps, "svamp": svamp}


def _digests(paths) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def solves(equation: str, answer: float) -> bool:
    """Whether `answer` is the root of an equation in one unknown, to three digits; "3*4" stands for "x=3*4".

    Newton's step from the answer is the distance to the root: exactly where the unknown is alone on a side.
    """
    left, equals, right = equation.partition("=")
    try:
        sides = [ast.parse(side.strip(), mode="eval").body for side in ((left, right) if equals else ("x", left))]
        names = {node.id for side in sides for node in ast.walk(side) if isinstance(node, ast.Name)}
        if len(names) != 1:
            return False

        def difference(x: float) -> float:
            return _value(sides[0], x) - _value(sides[1], x)

        h = 1e-4 * max(abs(answer), 1.0)
        slope = (difference(answer + h) - difference(answer - h)) / (2 * h)
        if not math.isfinite(slope) or abs(slope) < 1e-9:
            return False
        return abs(difference(answer) / slope) <= RELATIVE * abs(answer) + 1e-6
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return False


_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def _value(node: ast.expr, x: float) -> float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return float(node.value)
    if isinstance(node, ast.Name):
        return x
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        return -_value(node.operand, x) if isinstance(node.op, ast.USub) else _value(node.operand, x)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left, x), _value(node.right, x))
    raise ValueError(f"no arithmetic: {ast.dump(node)}")
