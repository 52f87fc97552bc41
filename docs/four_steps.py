"""Draws four_steps.svg, the picture in the README: `python docs/four_steps.py`."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

WIDE, NARROW, CURVED, TEXT = "#c9d7e8", "#f6e3b4", "#d9ecd0", "#222222"
matplotlib.rcParams["svg.hashsalt"] = "four_steps"  # the same file from every run
matplotlib.rcParams["svg.fonttype"] = "none"
matplotlib.rcParams["font.family"] = "sans-serif"


def box(ax, x, y, width, height, colour, title, *lines):
    ax.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.04", facecolor=colour, edgecolor="#555555")
    )
    middle = x + width / 2
    ax.text(middle, y + height - 0.2, title, ha="center", va="center", fontsize=12, weight="bold", color=TEXT)
    for i, line in enumerate(lines):
        ax.text(middle, y + height - 0.52 - 0.27 * i, line, ha="center", va="center", fontsize=9.5, color=TEXT)


def arrow(ax, start, end, label="", above=0.14):
    ax.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": "#444444", "linewidth": 1.4})
    ax.text((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + above, label, ha="center", fontsize=9, color=TEXT)


figure, ax = plt.subplots(figsize=(11, 3.9))
box(ax, 0.0, 1.45, 1.1, 1.1, WIDE, "x", "(T, d_in)")
box(ax, 2.0, 1.2, 1.9, 1.6, WIDE, "shrink", "p = A x", "n = ‖x‖²", "logits = Router x")
box(ax, 4.85, 2.35, 2.0, 1.0, NARROW, "route", "gates =", "top-k softmax")
box(ax, 4.85, 0.35, 2.0, 1.5, CURVED, "bridge", "h = λ(n; κ) p", "q = hᵀ(BᵀB)h", "z = (α/r) g e(q; κ) h")
box(ax, 7.9, 0.55, 1.75, 1.1, WIDE, "expand", "y₀ = z Bᵀ + bias")
box(ax, 7.9, 2.35, 1.75, 1.0, WIDE, "frozen base", "y₀ + x Wᵀ")
box(ax, 10.65, 2.35, 1.1, 1.0, WIDE, "y", "(T, d_out)")
arrow(ax, (1.15, 2.0), (1.95, 2.0))
arrow(ax, (3.95, 2.3), (4.8, 2.8), "(T, E)", 0.25)
arrow(ax, (3.95, 1.6), (4.8, 1.2), "(T, r)", 0.2)
arrow(ax, (5.85, 2.3), (5.85, 1.9))
arrow(ax, (6.9, 1.1), (7.85, 1.1), "z (T, E·r)")
arrow(ax, (8.77, 1.7), (8.77, 2.3))
arrow(ax, (9.7, 2.85), (10.6, 2.85))
ax.plot([0.55, 0.55, 8.77], [2.6, 3.75, 3.75], color="#444444", linewidth=1.4)
arrow(ax, (8.77, 3.75), (8.77, 3.4))
for i, (colour, text) in enumerate(
    [(WIDE, "as wide as the model"), (NARROW, "E numbers a token"), (CURVED, "everything curved: E·r numbers a token")]
):
    ax.add_patch(plt.Rectangle((0.05 + 3.0 * i, -0.35), 0.3, 0.2, facecolor=colour, edgecolor="#555555"))
    ax.text(0.45 + 3.0 * i, -0.25, text, va="center", fontsize=9.5, color=TEXT)
ax.set_xlim(-0.2, 11.95)
ax.set_ylim(-0.5, 4.0)
ax.axis("off")
figure.savefig(Path(__file__).with_suffix(".svg"), bbox_inches="tight", metadata={"Date": None})
