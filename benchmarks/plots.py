"""PNG plots from rows: a colour for each provider, labels at lines and bars, log axes where growth is shown."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path

from benchmarks import providers as p
from benchmarks.tables import first, groups_of, is_gpu

BLACK, GREY = "#222222", "#8a8a8a"
BLUE, LIGHT_BLUE, TEAL, PURPLE, LILAC = "#2b6cb0", "#7fb0de", "#1f9e9a", "#6b46a3", "#a98fd0"
ORANGE, LIGHT_ORANGE, RED, BROWN, PINK = "#d97706", "#f0b35b", "#c53030", "#7b4b2a", "#e08a8a"
GREEN, LIGHT_GREEN = "#1b7a3d", "#67b56f"

STYLES = {  # provider -> (colour, line style)
    p.FROZEN: (BLACK, "-"),
    p.PEFT_8: (BLUE, "-"), p.PEFT_8_AS_BASE: (LIGHT_BLUE, "-"), p.PEFT_64: (BLUE, ":"),
    p.PEFT_64_AS_BASE: (LIGHT_BLUE, ":"),
    p.FUSED_8: (TEAL, "-"), p.LORA_BRANCH: (TEAL, "--"), p.HYDRA: (PURPLE, "-"), p.MIXTURE: (LILAC, "-"),
    p.PRINTED: (ORANGE, "-"), p.TIDIED: (LIGHT_ORANGE, "-"),
    p.EXP_LOG: (RED, "-"), p.EXP_LOG_COMPILED: (RED, "--"), p.GEOOPT: (BROWN, "-"),
    p.EXP_LOG_EAGER: (PINK, "-"), p.EXP_LOG_TRITON: (PINK, "--"),
    p.EAGER: (LIGHT_GREEN, "-"), p.EAGER_COMPILED: (LIGHT_GREEN, "--"), p.EAGER_OWN: (LIGHT_GREEN, ":"),
    p.TRITON: (GREEN, "-"), p.TRITON_OWN: (GREEN, ":"), p.TRITON_APART: (GREEN, "--"),
    p.EAGER_APART: (LIGHT_GREEN, "-."), p.LIGER: (GREY, "-"), p.SWIGLU: (GREY, "-."), p.LORA_MLP: (TEAL, "-."),
    p.LILY: (PURPLE, "-."),
    p.COLLAPSED: (GREY, "-"), p.COLLAPSED_COMPILED: (GREY, "--"), p.MAPPED: (ORANGE, "-"),
    p.MAPPED_COMPILED: (ORANGE, "--"),
    "stereographic, eager": (ORANGE, "-"), "stereographic, compiled": (ORANGE, "--"),
    "exp/log, eager": (RED, "-"), "exp/log, compiled": (RED, "--"),
    "stereographic, our eager": (LIGHT_GREEN, "-"), "stereographic, our Triton": (GREEN, "-"),
    "exp/log, our eager": (PINK, "-"), "exp/log, our Triton": (PINK, "--"),
}  # fmt: skip


def style(provider: str) -> tuple[str, str]:
    if provider in STYLES:
        return STYLES[provider]
    return (BLACK, "-") if provider.startswith("base ") else (TEAL, "-") if "addmm" in provider else (GREEN, "-")


def all_plots(rows: list[dict], folder: Path) -> list[Path]:
    """Every plot that the rows of one machine allow, in `folder`."""
    made = []
    for name, draw in PLOTS.items():
        figure = draw(rows)
        if figure is not None:
            folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(folder / f"{name}.png", dpi=130)
            made.append(folder / f"{name}.png")
    return made


def over_frozen(group: dict[str, dict]) -> dict[str, float]:
    return {name: row["median_s"] / group[p.FROZEN]["median_s"] for name, row in group.items() if name != p.FROZEN}


def layer_plot(rows: list[dict], kind: str = "layer"):
    """Time over the frozen linear, a panel for each shape."""
    groups = [group for group in groups_of(rows, kind) if p.FROZEN in group]
    return _bars(
        groups, over_frozen, "one adapted linear, forward + backward: time over the frozen linear", "{:.2f}×",
        start=1.0,
    )  # fmt: skip


def branch_plot(rows: list[dict]):
    """The adapter without its base product, over the fastest form of ours."""
    groups = groups_of(rows, "branch")

    def over_ours(group: dict[str, dict]) -> dict[str, float]:
        ours = group.get(p.TRITON) or group.get(p.EAGER) or min(group.values(), key=lambda row: row["median_s"])
        return {name: row["median_s"] / ours["median_s"] for name, row in group.items()}

    name = p.TRITON if groups and all(p.TRITON in group for group in groups) else p.EAGER
    return _bars(groups, over_ours, f"the adapter alone, forward + backward: time over {name}", "{:.2f}×")


def memory_plot(rows: list[dict]):
    """Bytes saved for backward a token, beyond x and the parameters."""
    groups = groups_of(rows, "layer")
    return _bars(
        groups,
        lambda group: {n: r["saved_bytes"] / r["tokens"] for n, r in group.items() if r.get("saved_bytes")},
        "saved for backward beyond x and the parameters, bytes a token", "{:,.0f}", log=True,
    )  # fmt: skip


def steps_plot(rows: list[dict]):
    """The share of the measured ceiling that each step reaches."""
    return _bars(
        groups_of(rows, "steps"), lambda group: {n: 100 * r["share_of_ceiling"] for n, r in group.items()},
        "each step alone: share of the measured ceiling, %", "{:.0f}%", keep_order=True,
    )  # fmt: skip


def dimension_plot(rows: list[dict]):
    panels = [("conversion", "the conversion alone"), ("with the linear", "with the linear around it")]
    return _lines(rows, "dimension", "d_in", "embedding dimension", panels)


def depth_plot(rows: list[dict]):
    return _lines(rows, "depth", "layers", "number of layers", [("conversion", "the conversions of all layers")])


def growth_plot(rows: list[dict]):
    """Time over the frozen linear as T, E and r grow, and at odd widths."""
    axes_of = [
        ("tokens", "tokens", "tokens T"),
        ("experts", "experts", "experts E (r = 8)"),
        ("rank", "rank", "rank r (E = 8)"),
    ]
    present = [(kind, axis, label) for kind, axis, label in axes_of if len(groups_of(rows, kind)) > 1]
    widths = groups_of(rows, "width")
    if not present and not widths:
        return None
    panels = len(present) + bool(widths)
    columns = min(panels, 2)
    figure, grid = _figure(5.6 * columns, 3.6 * -(-panels // columns) + 0.4, -(-panels // columns), columns)
    for axes in grid.flat[panels:]:
        axes.set_visible(False)
    for axes, (kind, axis, label) in zip(grid.flat, present, strict=False):
        _draw_lines(axes, groups_of(rows, kind), axis, lambda row, base: row["median_s"] / base["median_s"])
        axes.set(xscale="log", xlabel=label, ylabel="time over the frozen linear")
        axes.set_xscale("log", base=2)
        drawn = [y for line in axes.get_lines() for y in line.get_ydata()]
        if max(drawn) > 8 * min(drawn):
            axes.set_yscale("log")
        _plain_ticks(axes, sorted({first(group)[axis] for group in groups_of(rows, kind)}))
        _label_ends(axes)
    if widths:
        _width_panel(grid.flat[panels - 1], widths)
    figure.suptitle("growth, forward + backward", fontsize=11)
    return figure


def _width_panel(axes, groups: list[dict[str, dict]]) -> None:
    names = [name for name in groups[0] if name != p.FROZEN]
    for i, name in enumerate(names):
        ratios = [
            g[name]["median_s"] / g[p.FROZEN]["median_s"] if name in g and p.FROZEN in g else math.nan for g in groups
        ]
        places = [j + 0.8 * ((i + 0.5) / len(names) - 0.5) for j in range(len(groups))]
        axes.bar(places, ratios, 0.7 / len(names), color=style(name)[0], label=name)
        for place, ratio in zip(places, ratios, strict=True):
            if not math.isnan(ratio):
                axes.text(place, ratio, f" {ratio:.2f}", ha="center", va="bottom", fontsize=6.5, rotation=90)
    axes.set_xticks(
        range(len(groups)), [f"{first(g)['d_in']}→{first(g)['d_out']}" for g in groups], fontsize=7, rotation=20
    )
    axes.set(ylabel="time over the frozen linear", xlabel="widths, even and odd")
    axes.set_ylim(top=axes.get_ylim()[1] * 1.5)
    axes.legend(frameon=False, fontsize=6.5, loc="upper left", ncols=2)
    _bare(axes)


def ffn_plot(rows: list[dict]):
    """Gated FFNs in training: time over the frozen one, and bytes saved for backward over what that saves."""
    groups = [group for group in groups_of(rows, "ffn") if p.FROZEN in group]

    def saved(group: dict[str, dict]) -> dict[str, float]:
        base = group[p.FROZEN].get("saved_bytes")
        return {n: r["saved_bytes"] / base for n, r in group.items() if base and n != p.FROZEN and "saved_bytes" in r}

    def numbers(group: dict[str, dict]) -> dict[str, float]:
        return over_frozen(group) if not group.get("saved") else saved({n: r for n, r in group.items() if n != "saved"})

    weighed = [{**group, "saved": {"median_s": 1.0}} for group in groups if saved(group)]
    titles = ["{d_in}→{d_out}, T = {tokens}, {step}".format(**first(group)) for group in groups]
    titles += ["{d_in}→{d_out}, T = {tokens}: saved for backward".format(**first(group)) for group in weighed]
    return _bars(
        [*groups, *weighed], numbers, "over the frozen FFN as transformers runs it", "{:.2f}×", start=1.0,
        titles=titles, columns=2,
    )  # fmt: skip


def whole_plot(rows: list[dict]):
    """An FFN in decoding, and a whole model: time over the frozen one."""
    wanted = [("decode", None), ("model", "training step"), ("model", "decoding")]
    titles = {
        ("decode", None): "gated FFN, decoding, T = {tokens}",
        ("model", "training step"): "model of {layers} layers, training step, {tokens} tokens",
        ("model", "decoding"): "model of {layers} layers, decoding, batch {tokens}",
    }  # fmt: skip
    groups = [(g, titles[key].format(**first(g))) for key in wanted for g in groups_of(rows, *key) if p.FROZEN in g]
    return _bars(
        [group for group, _ in groups],
        over_frozen,
        "time over the same without adapters", "{:.2f}×", start=1.0, titles=[title for _, title in groups], columns=3,
    )  # fmt: skip


PLOTS = {
    "ffn": ffn_plot,
    "layer": layer_plot, "compiled": functools.partial(layer_plot, kind="compiled"),
    "branch": branch_plot, "memory": memory_plot, "steps": steps_plot,
    "figure3_dimension": dimension_plot, "figure3_depth": depth_plot, "growth": growth_plot, "whole": whole_plot,
}  # fmt: skip


def _bars(
    groups: list[dict[str, dict]], numbers: Callable[[dict[str, dict]], dict[str, float]], title: str, form: str, *,
    start: float = 0.0, log: bool = False, keep_order: bool = False, titles: list[str] | None = None, columns: int = 2,
):  # fmt: skip
    """A panel of labelled bars for each group; bars begin at `start`."""
    titles = titles or [f"{first(g)['d_in']} → {first(g)['d_out']}, T = {first(g)['tokens']}" for g in groups]
    panels = [(panel, numbers(group)) for panel, group in zip(titles, groups, strict=True)]
    shown = [(panel, values) for panel, values in panels if len(values) > 1]
    if not shown:
        return None
    columns = min(columns, len(shown))
    lines = -(-len(shown) // columns)
    tallest = max(len(values) for _, values in shown)
    width = 5.4 if columns < 3 else 4.6
    figure, grid = _figure(width * columns + 0.6, lines * (0.9 + 0.24 * tallest) + 0.5, lines, columns)
    for axes in grid.flat[len(shown) :]:
        axes.set_visible(False)
    for axes, (panel, values) in zip(grid.flat, shown, strict=False):
        names = list(values) if keep_order else sorted(values, key=values.get)
        wide = log or (not keep_order and max(values.values()) > 12 * min(values.values()))
        left = min(min(values.values()), 1) * 0.8 if wide and start else min(values.values()) * 0.5 if wide else start
        for i, name in enumerate(names):
            colour, dashes = style(name)
            axes.barh(i, values[name] - left, left=left, color=colour, alpha=0.55 if dashes != "-" else 1,
                      hatch={"--": "///", ":": "..."}.get(dashes), edgecolor="white", lw=0.5)  # fmt: skip
            axes.text(max(values[name], left), i, " " + form.format(values[name]), va="center", ha="left", fontsize=7.5)
        most = max(values.values())
        if wide:
            axes.set_xscale("log")
            axes.set_xlim(left, most * (most / left) ** 0.18)
        else:
            low = min(start, min(values.values()))
            axes.set_xlim(low, most + 0.16 * (most - low))
            if low < start:
                axes.axvline(start, color=BLACK, lw=0.8)
        axes.set_yticks(range(len(names)), names, fontsize=7.5)
        for tick, name in zip(axes.get_yticklabels(), names, strict=True):
            tick.set_fontweight("bold" if name.startswith("MoS") else "normal")
        axes.invert_yaxis()
        axes.set_title(panel, fontsize=9)
        axes.tick_params(axis="x", labelsize=7)
        _bare(axes)
        axes.tick_params(axis="y", length=0)
    figure.suptitle(title, fontsize=11)
    return figure


def _lines(rows: list[dict], kind: str, axis: str, label: str, panels: list[tuple[str, str]]):
    """Time over an axis, log-log; on a CPU over that of the first base variant."""
    shown = [(step, title) for step, title in panels if len(groups_of(rows, kind, step)) > 1]
    if not shown:
        return None
    gpu = is_gpu(rows)
    figure, grid = _figure(7.2 * len(shown), 4.6, 1, len(shown))
    for axes, (step, title) in zip(grid[0], shown, strict=True):
        groups = groups_of(rows, kind, step)
        unit = 1e-3 if gpu else first(groups[0]).get("base") and groups[0][first(groups[0])["base"]]["median_s"]
        _draw_lines(axes, groups, axis, lambda row, base, unit=unit: row["median_s"] / unit)
        row = first(groups[0])
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set(xlabel=label, ylabel="ms" if gpu else f"time over “{row['base']}” at {row[axis]}")
        axes.set_title(f"{title} ({row['tokens']} tokens, {row['experts']} experts, forward)", fontsize=9)
        _plain_ticks(axes, [first(group)[axis] for group in groups])
        _label_ends(axes)
    return figure


def _draw_lines(axes, groups: list[dict[str, dict]], axis: str, number: Callable[[dict, dict | None], float]) -> None:
    names = list(dict.fromkeys(name for group in groups for name in group))
    for name in names:
        points = []
        for group in groups:
            base = group.get(first(group)["base"])
            if name in group and base is not None:
                points.append((first(group)[axis], number(group[name], base)))
        if points:
            colour, dashes = style(name)
            bold = 2.2 if "our" in name or name.startswith("MoS") else 1.4
            axes.plot(*zip(*points, strict=True), color=colour, ls=dashes, lw=bold, marker="o", ms=3, label=name)
    axes.grid(alpha=0.2, which="major")
    _bare(axes)
    if axes.get_xscale() != "log":
        axes.set_xscale("log", base=2)
    _label_ends(axes)


def _label_ends(axes) -> None:
    """Each line's name at its right end, in its colour, moved apart where they would meet."""
    for text in list(axes.texts):
        text.remove()
    log = axes.get_yscale() == "log"
    lines = [line for line in axes.get_lines() if not line.get_label().startswith("_")]
    low, high = axes.get_ylim()
    scale = (lambda v: math.log(v / low) / math.log(high / low)) if log else (lambda v: (v - low) / (high - low))
    ends = sorted(((scale(line.get_ydata()[-1]), line) for line in lines), key=lambda end: end[0])
    places = _spread([y for y, _ in ends], 0.05)
    for (y, line), place in zip(ends, places, strict=True):
        axes.annotate(
            line.get_label(), (1.0, y), xytext=(1.04, place), xycoords="axes fraction",
            textcoords="axes fraction",
            fontsize=7, color=line.get_color(), va="center", annotation_clip=False,
            arrowprops={"color": line.get_color(), **CONNECTOR},
        )  # fmt: skip


CONNECTOR = {"arrowstyle": "-", "lw": 0.5, "shrinkA": 0, "shrinkB": 0, "relpos": (0, 0.5)}


def _spread(wanted: list[float], least: float) -> list[float]:
    """Places at least so far apart, in order and within [0, 1] where they fit, each cluster around what it wanted."""
    clusters: list[list[float]] = []  # sum of wanted places, each less its rank in the cluster's spacing; their number
    for place in wanted:
        clusters.append([place, 1])
        while len(clusters) > 1:
            (low, m), (high, n) = clusters[-2:]
            if high / n - low / m >= least * (m + n) / 2:
                break
            clusters[-2:] = [[low + high, m + n]]
    places = []
    for total, count in clusters:
        first = total / count - least * (count - 1) / 2
        first = max(min(first, 1 - least * (count - 1)), places[-1] + least if places else 0.0)
        places += [first + least * i for i in range(count)]
    return places


def _plain_ticks(axes, ticks: list[int]) -> None:
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=7)
    axes.minorticks_off()
    axes.tick_params(axis="y", labelsize=7)


def _bare(axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _figure(width: float, height: float, rows: int, columns: int):
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, and no global state
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)
