"""Charts as SVG: lines with labels at their ends, bands, small multiples and heat maps. Colours are CSS classes."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

COLORS = {
    "hyperbolic": ("#08306b", "#2171b5", "#4292c6", "#6baed6", "#9ecae1"),
    "spherical": ("#7f2704", "#d94801", "#f16913", "#fd8d3c", "#fdae6b"),
    "euclidean": ("#252525", "#636363", "#969696", "#bdbdbd"),
}
"""The shades of each space, from dark to light; experts of one space take them in turn."""

MAX_POINTS = 160
"""Points drawn of a curve; between them it is thinned out, the first and the last kept."""


@dataclass
class Line:
    """A curve. css: classes for its colour. label: written at its end. title: shown when pointed at."""

    points: Sequence[tuple[float, float]]
    css: str
    label: str = ""
    title: str = ""
    dots: bool = False


@dataclass
class Band:
    """The area between two curves over the same steps."""

    low: Sequence[tuple[float, float]]
    high: Sequence[tuple[float, float]]
    css: str


@dataclass
class Rule:
    """A horizontal line at a value that means something."""

    value: float
    label: str = ""


def shade(spaces: Sequence[str], expert: int) -> str:
    """The CSS classes of an expert's colour: its space, and which of its shades."""
    space = spaces[expert]
    return f"{space} s{list(spaces[:expert]).count(space) % len(COLORS[space])}"


def layer_of(name: str) -> int:
    """The index in a module's name, as the 3 of bert.encoder.layer.3.output.dense; -1 without one."""
    found = re.search(r"\.(\d+)(\.|$)", name)
    return int(found[1]) if found else -1


def projection_of(name: str) -> str:
    """What follows the layer's index in a module's name."""
    found = re.search(r"\.\d+\.(.+)$", name)
    return found[1] if found else name


def chart(
    lines: Sequence[Line],
    *,
    width: int,
    height: int,
    bands: Sequence[Band] = (),
    rules: Sequence[Rule] = (),
    x: tuple[float, float] | None = None,
    y: tuple[float, float] | None = None,
    name: str = "",
    margins: tuple[int, int, int, int] = (10, 96, 24, 52),
    axes: bool = True,
) -> str:
    """An SVG of curves over the steps. x, y: the range shown (default: what is there). margins: CSS's order.

    Points that are no finite numbers are left out. name: for screen readers.
    """
    lines = [Line(_finite(line.points), line.css, line.label, line.title, line.dots) for line in lines]
    bands = [Band(_finite(band.low), _finite(band.high), band.css) for band in bands]
    curves = [line.points for line in lines] + [c for band in bands for c in (band.low, band.high)]
    steps, values = [s for c in curves for s, _ in c], [v for c in curves for _, v in c]
    left, right = x or (min(steps, default=0), max(steps, default=1))
    low, high = y or padded_range([*values, *(rule.value for rule in rules)])
    top, r, bottom, l = margins
    inner_width, inner_height = width - l - r, height - top - bottom

    def px(step):
        return l + inner_width * (step - left) / ((right - left) or 1)

    def py(value):
        return top + inner_height * (high - value) / ((high - low) or 1)

    parts = []
    for tick in ticks(low, high, max(inner_height // 34, 2)) if axes else ():
        parts.append(_rule("grid", l, py(tick), l + inner_width))
        parts.append(_text("tick end", l - 6, py(tick) + 3.5, number(tick)))
    for tick in ticks(left, right, max(inner_width // 80, 2)) if axes else ():
        parts.append(_text("tick middle", px(tick), height - 7, number(tick)))
    for rule in rules:
        parts.append(_rule("rule", l, py(rule.value), l + inner_width))
        if rule.label:
            parts.append(_text("tick", l + 4, py(rule.value) - 4, rule.label))
    for band in bands:
        there = [(px(s), py(v)) for s, v in thinned(band.high)] + [(px(s), py(v)) for s, v in thinned(band.low)][::-1]
        if there:
            parts.append(f'<path class="band {band.css}" d="{_path(there)}Z"/>')
    for line in lines:
        there = [(px(s), py(v)) for s, v in thinned(line.points)]
        if not there:
            continue
        title = f"<title>{escape(line.title)}</title>" if line.title else ""
        parts.append(f'<path class="line {line.css}" d="{_path(there)}">{title}</path>')
        if line.dots or len(there) == 1:
            parts += [f'<circle class="{line.css}" cx="{a:.1f}" cy="{b:.1f}" r="2.6"/>' for a, b in there]
    labelled = [line for line in lines if line.label and line.points]
    heights = _apart([py(line.points[-1][1]) for line in labelled], 14, top + 4, height - bottom)
    for line, at in zip(labelled, heights, strict=True):
        parts.append(_text(f"label {line.css}", px(line.points[-1][0]) + 7, at + 4, line.label))
    return _svg(width, height, "chart" if axes else "panel", name, parts)


def panel(lines: Sequence[Line], *, x: tuple[float, float], y: tuple[float, float], name: str) -> str:
    """A small multiple: curves in a common range, no axes but zero."""
    rules = [Rule(0.0)] if y[0] <= 0 <= y[1] else []
    return chart(lines, width=240, height=76, x=x, y=y, rules=rules, name=name, margins=(4, 5, 4, 5), axes=False)


def heat_map(
    rows: Sequence[str],
    columns: Sequence[tuple[str, str]],
    values: Sequence[Sequence[float]],
    css: Sequence[str],
    name: str,
) -> str:
    """Cells in the colour of their column (css), the stronger the larger: full at the largest value, numbers in %.

    columns: (group, label within the group), columns of a group side by side.
    """
    cell_width, cell_height, l, top = 62, 25, 150, 36
    highest = max((v for row in values for v in row if math.isfinite(v)), default=1) or 1
    width, height = l + cell_width * len(columns) + 4, top + cell_height * len(rows) + 4
    parts = []
    groups = [group for group, _ in columns]
    for i, (group, label) in enumerate(columns):
        parts.append(_text(f"label middle {css[i]}", l + cell_width * (i + 0.5), 28, label))
        if groups.index(group) == i:
            middle = l + cell_width * (i + groups.count(group) / 2)
            parts.append(_text(f"label middle {css[i]}", middle, 12, group))
    for j, row in enumerate(rows):
        y = top + cell_height * j
        parts.append(_text("tick end", l - 8, y + cell_height / 2 + 4, row))
        for i, value in enumerate(values[j]):
            if not math.isfinite(value):
                continue
            strength, at = value / highest, l + cell_width * i
            parts.append(
                f'<rect class="cell {css[i]}" x="{at + 1}" y="{y + 1}" width="{cell_width - 2}" '
                f'height="{cell_height - 2}" rx="3" fill-opacity="{strength:.3f}">'
                f"<title>{escape(row)}, {escape(' '.join(columns[i]))}: {100 * value:.1f}%</title></rect>"
            )
            strong = " strong" if strength > 0.8 else ""
            middle = y + cell_height / 2 + 4
            parts.append(_text(f"cell-text middle{strong}", at + cell_width / 2, middle, f"{100 * value:.0f}%"))
    return _svg(width, height, "heat", name, parts)


def padded_range(values: Sequence[float], least: float = 0.0) -> tuple[float, float]:
    """The range of the finite values with a margin, at least `least` high."""
    finite = [v for v in values if math.isfinite(v)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    margin = max(0.06 * (high - low), (least - (high - low)) / 2)
    if margin < 1e-6 * abs(high) or margin == 0:  # one value, in the middle
        margin = 0.2 * abs(high) or 0.1
    return low - margin, high + margin


def ticks(low: float, high: float, count: int) -> list[float]:
    """At most about `count` round numbers within a range."""
    span = high - low
    if not span > 0 or not math.isfinite(span):
        return [low]
    raw = span / max(count, 1)
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) + 0.0 for i in range(first, math.floor(high / step + 1e-9) + 1)]  # no -0


def number(value: float) -> str:
    """Short: 0.25, 1e-4, 12000, inf."""
    if not math.isfinite(value):
        return str(value)
    if value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e6):
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The mean over a centred window of a tenth of the points."""
    points = _finite(points)
    half = max(len(points) // 20, 1)
    windows = [points[max(0, i - half) : i + half + 1] for i in range(len(points))]
    return [(s, sum(v for _, v in w) / len(w)) for (s, _), w in zip(points, windows, strict=True)]


def thinned(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    if len(points) <= MAX_POINTS:
        return points
    last = len(points) - 1
    return [points[round(i * last / (MAX_POINTS - 1))] for i in range(MAX_POINTS)]


def _finite(points) -> list[tuple[float, float]]:
    return [(s, v) for s, v in points if math.isfinite(v) and math.isfinite(s)]


def _apart(heights: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The heights pushed apart to `gap`, within low and high where there is room."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed, at = list(heights), low - gap
    for i in order:
        at = placed[i] = max(heights[i], at + gap)
    at = high + gap
    for i in reversed(order):
        at = placed[i] = min(placed[i], at - gap)
    return placed


def _path(points) -> str:
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in points)


def _rule(css: str, left: float, y: float, right: float) -> str:
    return f'<line class="{css}" x1="{left:.1f}" y1="{y:.1f}" x2="{right:.1f}" y2="{y:.1f}"/>'


def _text(css: str, x: float, y: float, text: str) -> str:
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def standalone(drawn: str, style: str) -> str:
    """A chart as a file of its own: with its colours, and its own size."""
    width, height = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', drawn).groups()
    attributes = f'xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
    head, _, rest = drawn.removeprefix("<svg ").partition(">")
    ground = '<rect width="100%" height="100%" fill="var(--ground)"/>'
    return f"<svg {attributes}{head}><style>{style}</style>{ground}{rest}\n"


def panels(rows: Sequence[Sequence[str]], names: Sequence[str], heads: Sequence[str], name: str) -> str:
    """One SVG of small multiples: a row each with its name, columns under their heads; an empty string is a gap."""
    left, top, width, height = 70, 22, 246, 82
    parts = [_text("label middle", left + width * (i + 0.5), 14, head) for i, head in enumerate(heads)]
    for j, row in enumerate(rows):
        parts.append(_text("tick end", left - 6, top + height * (j + 0.5), names[j]))
        for i, drawn in enumerate(row):
            place = f'<svg x="{left + width * i}" y="{top + height * j}" width="{width - 6}" height="{height - 6}" '
            parts.append(drawn.replace("<svg ", place, 1))
    return _svg(left + width * len(heads), top + height * len(rows), "panels", name, parts)


def _svg(width: float, height: float, css: str, name: str, parts: Sequence[str]) -> str:
    attributes = f'class="{css}" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(name)}"'
    return f"<svg {attributes}>{''.join(parts)}</svg>"
