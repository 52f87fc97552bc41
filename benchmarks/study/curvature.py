"""The plot of every expert's curvature (the paper's Figure 2) with matplotlib, and the figures it is drawn in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mos_kernels.run_report.charts import COLORS, layer_of, projection_of

MAX_LAYERS = 8
"""Curvature panels a row: of a deeper model, layers at even distances are drawn."""


def plot_curvature(log: Sequence[Mapping], expert_spaces: Sequence[str], path: str | Path, title: str = "") -> None:
    """κ̂ of each expert over the steps: a panel for each adapted linear, layers from left to right.

    log: entries with "step" and "curvature", a dict from the linear's name to E numbers. expert_spaces: E geometries.
    """
    entries = [entry for entry in log if "curvature" in entry]
    steps = [entry["step"] for entry in entries]
    names = {(layer_of(name), projection_of(name)): name for name in entries[0]["curvature"]} if entries else {}
    layers, projections = sorted({layer for layer, _ in names}), list(dict.fromkeys(part for _, part in names))
    shown = (
        layers
        if len(layers) <= MAX_LAYERS
        else [layers[round(i * (len(layers) - 1) / (MAX_LAYERS - 1))] for i in range(MAX_LAYERS)]
    )
    columns = min(len(shown), 6 if len(shown) <= 6 else 4) or 1
    bands = [shown[start : start + columns] for start in range(0, len(shown), columns)] or [[]]
    rows = max(len(bands) * len(projections), 1)
    figure, grid = new_figure(1.2 + 1.9 * max(columns, 3), 1.1 + 1.55 * rows, rows, columns, sharex=True, sharey=True)
    for axes in grid.flat:
        axes.set_visible(False)
    for band, members in enumerate(bands):
        for row, projection in enumerate(projections, band * len(projections)):
            for column, layer in enumerate(members):
                if (layer, projection) not in names:
                    continue
                axes, name = grid[row, column], names[layer, projection]
                axes.set_visible(True)
                axes.axhline(0, color="black", lw=0.5, alpha=0.4)
                for expert in range(len(expert_spaces)):
                    values = [entry["curvature"][name][expert] for entry in entries]
                    axes.plot(steps, values, color=_color(expert_spaces, expert), lw=1.3)
                axes.set_title(f"layer {layer}" if layer >= 0 else name, fontsize=8, pad=3)
                axes.tick_params(labelsize=7)
                axes.grid(alpha=0.2)
                if column == 0:
                    axes.set_ylabel(_wrapped(projection) + "\nκ̂", fontsize=8)
                if row == rows - 1:
                    axes.set_xlabel("step", fontsize=8)
    _space_legend(figure, expert_spaces)
    note = "" if shown == layers else f" ({len(shown)} of {len(layers)} layers)"
    figure.suptitle((title or "curvature of each expert") + note, fontsize=10)
    figure.savefig(path, dpi=130)


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **options):
    """A figure of this size in inches, and its axes: one, or with more rows, columns or options an array of them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, and no global state
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    if rows == columns == 1 and not options:
        return figure, figure.subplots()
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def _color(expert_spaces: Sequence[str], expert: int) -> str:
    shades = COLORS[expert_spaces[expert]]
    return shades[list(expert_spaces[:expert]).count(expert_spaces[expert]) % len(shades)]


def _space_legend(figure, expert_spaces: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    first = {space: list(expert_spaces).index(space) for space in dict.fromkeys(expert_spaces)}
    handles = [Line2D([], [], color=COLORS[space][1], lw=2) for space in first]
    names = [f"{space} at the start ({list(expert_spaces).count(space)})" for space in first]
    figure.legend(handles, names, loc="outside lower center", ncols=len(first), frameon=False, fontsize=8)


def _wrapped(name: str) -> str:
    return name if len(name) <= 18 else name.replace(".", ".\n")
