"""Word problems of one or two steps with the equations that solve them, made from templates: the demo's data."""

from __future__ import annotations

import random

from benchmarks.study.decoder.problems import Problem

_NAMES = "Ana Ben Clara David Ella Felix Greta Hugo Ines Jan Kira Leo Mara Nils Olga Paul Rosa Sven Tara Udo"
_THINGS = "apples pens shells stamps marbles books cards stones coins buttons nuts stickers"
NAMES, THINGS = _NAMES.split(), _THINGS.split()  # noqa: SIM905
TEMPLATES = (
    ("{n} has {a} {t}. {m} gives {n} {b} more. How many {t} does {n} have now?", "x={a}+{b}"),
    ("{n} had {c} {t} and lost {b} of them. How many {t} are left?", "x={c}-{b}"),
    ("{n} buys {b} boxes with {a} {t} in each. How many {t} does {n} buy?", "x={b}*{a}"),
    ("{n} and {m} share {d} {t} evenly. How many {t} does each of them get?", "x={d}/2"),
    ("{n} has {c} {t}, which is {b} more than {m} has. How many {t} does {m} have?", "x={c}-{b}"),
    ("{n} has {a} {t} and buys {b} bags of {e} {t}. How many {t} does {n} have then?", "x={a}+{b}*{e}"),
    ("{n} fills {b} boxes with {e} {t} each and has {a} left. How many {t} are there?", "x={b}*{e}+{a}"),
    ("{n} had {c} {t}, gave {b} to {m} and found {a}. How many {t} does {n} have now?", "x={c}-{b}+{a}"),
)


def make(count: int, seed: int) -> list[Problem]:
    """`count` problems, each another text; the same for the same seed."""
    draw, found = random.Random(seed), {}
    while len(found) < count:
        text, equation = draw.choice(TEMPLATES)
        n, m = draw.sample(NAMES, 2)
        a, b, e = draw.randint(2, 60), draw.randint(2, 12), draw.randint(3, 9)
        values = {"n": n, "m": m, "t": draw.choice(THINGS), "a": a, "b": b, "c": a + b, "d": 2 * a, "e": e}
        equation = equation.format(**values)
        text = text.format(**values)
        found[text] = Problem(text, equation, float(eval(equation.removeprefix("x="))))
    return list(found.values())
