"""The report of a run as one HTML page that needs nothing else: no script, no font, no picture from anywhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from mos_kernels.config import SPACES
from mos_kernels.run_report.charts import (
    COLORS,
    Band,
    Line,
    Rule,
    chart,
    heat_map,
    layer_of,
    number,
    padded_range,
    panel,
    panels,
    projection_of,
    shade,
    smooth,
    standalone,
)
from mos_kernels.run_report.log import TIMINGS, Run

CHARTS = ("loss", "curvature", "routing")
"""The charts that are written as files of their own too."""

_SPELLED = {"hyperbolic": "hyperbolic", "spherical": "spherical", "euclidean": "Euclidean"}


def page(run: Run) -> str:
    """The whole page. Sections for which the run has no numbers are left out."""
    sections = [_training(run), _curvature(run), _routing(run), _settings(run)]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f"<title>{escape(run.name)}</title>\n<style>{_IN_PAGE}{_style()}</style>\n</head>\n<body>\n<main>\n"
        f"{_head(run)}\n{chr(10).join(filter(None, sections))}\n</main>\n</body>\n</html>\n"
    )


def _head(run: Run) -> str:
    parts = []
    if run.adapter:
        adapter = run.adapter
        spaces = " · ".join(
            f'<span class="key {space} s1">{adapter.spaces[space]} {_SPELLED[space]}</span>'
            for space in SPACES
            if adapter.spaces.get(space)
        )
        used = f"{adapter.num_experts_per_tok} of {adapter.num_experts} experts a token, rank {adapter.r}"
        for name, own in (adapter.spaces_pattern or {}).items():
            used += f" · {escape(name)}: {', '.join(f'{count} {_SPELLED[space]}' for space, count in own.items())}"
        parts.append(f"<p>{spaces} · {used}</p>")
    loss, evaluation = run.curve("loss"), run.curve("eval_loss")
    facts = [("steps", f"{max((e['step'] for e in run.entries), default=0):,}")]
    if loss:  # smoothing leaves out what is not finite
        last = loss[-1][1]
        facts.append(("training loss at the end", number(smooth(loss)[-1][1] if math.isfinite(last) else last)))
    if evaluation:
        best = min(evaluation, key=lambda point: (not math.isfinite(point[1]), point[1]))
        facts.append((f"lowest evaluation loss, at step {number(best[0])}", number(best[1])))
    entropy, imbalance = run.curve("mos/entropy"), run.curve("mos/aux_loss")
    if entropy and run.adapter:
        experts = number(math.exp(entropy[-1][1]))
        facts.append((f"experts a token really uses, of {run.adapter.num_experts_per_tok}", experts))
    if imbalance:
        facts.append(("load-balancing loss at the end, 1 is even", number(imbalance[-1][1])))
    tiles = "".join(f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for name, value in facts)
    return f'<header><h1>{escape(run.name)}</h1>{"".join(parts)}<div class="facts">{tiles}</div></header>'


def svg_files(run: Run) -> dict[str, str]:
    """Those charts of `CHARTS` for which the run has numbers, each as an SVG of its own, by name."""
    rows = _panels(run)[0]
    columns = list(dict.fromkeys(part for found in rows.values() for part in found))
    grid = [[rows[layer].get(name, "") for name in columns] for layer in sorted(rows)]
    names = [f"layer {layer}" if layer >= 0 else "" for layer in sorted(rows)]
    curvature = panels(grid, names, columns, "curvature of each expert of each linear") if grid else ""
    drawn = dict(zip(CHARTS, (_loss_chart(run), curvature, _share_map(run)), strict=True))
    return {name: standalone(chart, _style()) for name, chart in drawn.items() if chart}


def _loss_chart(run: Run) -> str:
    loss, evaluation = run.curve("loss"), run.curve("eval_loss")
    lines = []
    if loss:
        smoothed = smooth(loss) if len(loss) >= 10 else loss
        if smoothed is not loss:
            lines.append(Line(loss, "faint", title="training loss, as logged"))
        lines.append(Line(smoothed, "ink", "training", "training loss"))
    if evaluation:
        lines.append(Line(evaluation, "accent", "evaluation", "evaluation loss", dots=True))
    return chart(lines, width=560, height=250, name="loss over the steps") if lines else ""


def _training(run: Run) -> str:
    figures = [_figure("loss (nats)", drawn)] if (drawn := _loss_chart(run)) else []
    small = [("learning_rate", "learning rate"), ("grad_norm", "gradient norm")]
    found = {key.removeprefix("eval_"): key for e in run.entries for key in e if key.startswith("eval_")}
    small += [
        (key, f"evaluation: {name.replace('_', ' ')}")
        for name, key in found.items()
        if name not in ("loss", *TIMINGS) and "/" not in name
    ]
    for key, name in small:
        points = run.curve(key)
        if points:
            line = Line(points, "ink", title=name, dots=key in found.values())
            figures.append(_plot(name, [line], margins=(10, 16, 24, 60)))
    return _section("Training", "", f'<div class="pair">{"".join(figures)}</div>') if figures else ""


def _curvature(run: Run) -> str:
    overall, bands, lines = [], [], []
    for space in SPACES:
        mean = run.curve(f"mos/curvature/{space}_mean")
        if mean:
            bands.append(
                Band(run.curve(f"mos/curvature/{space}_min"), run.curve(f"mos/curvature/{space}_max"), f"{space} s1")
            )
            lines.append(Line(mean, f"{space} s1", _SPELLED[space], f"{space}: mean over experts and linears"))
    if lines:
        caption = "κ̂: mean of each space, and the range over all experts and linears"
        overall.append(_plot(caption, lines, width=1140, bands=bands, rules=[Rule(0.0)]))
    rows, x, y = _panels(run)
    if rows:
        across = f"steps {number(x[0])} to {number(x[1])} across, κ̂ from {y[0]:.2f} to {y[1]:.2f} upwards"
        caption = f"each expert of each linear: {across}; the thin line is κ̂ = 0"
        overall.append(_figure(caption, _grid(rows), "wide"))
    if not overall:
        return ""
    text = (
        "κ̂ = κ · length_unit², dimensionless: below 0 an expert is hyperbolic, above 0 spherical, at 0 flat. "
        "The colour says in which space an expert started; Euclidean experts stay at 0."
    )
    return _section("Curvature", text, _legend(run) + "".join(overall))


def _panels(run: Run) -> tuple[dict[int, dict[str, str]], tuple[float, float], tuple[float, float]]:
    """(panel by layer and projection, steps across, κ̂ upwards); no panels where the run has no curvature."""
    kept = [entry for entry in run.entries if isinstance(entry.get("curvature"), dict) and entry["curvature"]]
    if not kept or not run.expert_spaces:
        return {}, (0, 1), (0, 1)
    values = [v for entry in kept for experts in entry["curvature"].values() for v in experts]
    x, y = (kept[0]["step"], max(kept[-1]["step"], kept[0]["step"] + 1)), padded_range(values, least=0.02)
    rows: dict[int, dict[str, str]] = {}
    for name in kept[0]["curvature"]:
        rows.setdefault(layer_of(name), {})[projection_of(name)] = panel(
            _expert_lines(run, kept, name), x=x, y=y, name=f"curvature of the experts of {name}"
        )
    return rows, x, y


def _expert_lines(run: Run, kept: Sequence[dict], name: str) -> list[Line]:
    lines, spaces = [], run.spaces_of(name, len(kept[0]["curvature"][name]))
    for expert, space in enumerate(spaces):
        points = [(e["step"], e["curvature"][name][expert]) for e in kept if name in e["curvature"]]
        title = f"{space} expert {spaces[:expert].count(space) + 1}"
        if points:
            title += f": {number(points[0][1])} to {number(points[-1][1])}"
        lines.append(Line(points, shade(spaces, expert), title=title))
    return lines


def _grid(rows: dict[int, dict[str, str]]) -> str:
    columns = list(dict.fromkeys(part for panels in rows.values() for part in panels))
    head = "<th></th>" + "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = []
    for layer in sorted(rows):
        cells = "".join(f"<td>{rows[layer].get(name, '')}</td>" for name in columns)
        body.append(f"<tr><th>{f'layer {layer}' if layer >= 0 else ''}</th>{cells}</tr>")
    return f'<div class="scroll"><table class="panels"><tr>{head}</tr>{"".join(body)}</table></div>'


def _routing(run: Run) -> str:
    figures, spaces = [], run.expert_spaces
    by_space = [
        Line(points, f"{space} s1", _SPELLED[space], f"share of the {space} experts together")
        for space in SPACES
        if (points := run.curve(f"mos/share/{space}")) and any(v for _, v in points)
    ]
    if by_space:
        figures.append(_plot("share of the assignments, by space (mean over routers)", by_space))
    entropy = run.curve("mos/entropy")
    if entropy:
        each = [
            Line(
                [(e["step"], e["entropy"][name]) for e in run.entries if name in e.get("entropy", {})],
                "faint",
                "",
                name,
            )
            for name in next((e["entropy"] for e in run.entries if isinstance(e.get("entropy"), dict)), {})
        ]
        k = run.adapter.num_experts_per_tok if run.adapter else 0
        rules = [Rule(math.log(k), f"ln {k}: all {k} experts used evenly")] if k > 1 else []
        caption = "entropy of a token's gates (nats): the mean" + (", and each router" if each else "")
        lines = [*each, Line(entropy, "ink", "mean", "mean over routers")]
        figures.append(_plot(caption, lines, rules=rules))
    imbalance, largest = run.curve("mos/aux_loss"), run.curve("mos/share/max")
    if imbalance:
        caption = "load-balancing loss E·Σ f·P (mean over routers)"
        line = Line(imbalance, "ink", title=caption)
        figures.append(_plot(caption, [line], rules=[Rule(1.0, "1: even")], margins=(10, 16, 24, 52)))
    if largest:
        caption = "largest share of any expert in any router"
        rules = [Rule(1 / len(spaces), f"1/{len(spaces)}: even")] if spaces else []
        line = Line(largest, "ink", title=caption)
        figures.append(_plot(caption, [line], rules=rules, margins=(10, 16, 24, 52)))
    shown = f'<div class="pair">{"".join(figures)}</div>' if figures else ""
    if drawn := _share_map(run):
        step = next(e["step"] for e in reversed(run.entries) if isinstance(e.get("share"), dict) and e["share"])
        even = f"{100 / len(spaces):.1f}%"
        shown += _figure(f"share of the assignments at step {number(step)}, expert by expert; {even} is even",
                         f'<div class="scroll">{drawn}</div>', "wide")  # fmt: skip
    return _section("Routing", "Which experts the tokens use, padding left out.", shown) if shown else ""


def _share_map(run: Run) -> str:
    share = next((e["share"] for e in reversed(run.entries) if isinstance(e.get("share"), dict) and e["share"]), None)
    groups: dict[tuple[str, ...], dict[str, list[float]]] = {}
    for name, values in (share or {}).items():
        groups.setdefault(run.spaces_of(name, len(values)), {})[name] = values
    maps = []
    for spaces, shares in groups.items():
        if spaces:
            columns = [(_SPELLED[space], str(spaces[:i].count(space) + 1)) for i, space in enumerate(spaces)]
            css = [f"{space} s1" for space in spaces]
            maps.append(heat_map(_row_names(list(shares)), columns, list(shares.values()), css, "share of each expert"))
    return "".join(maps)


def _row_names(names: list[str]) -> list[str]:
    layers = [layer_of(name) for name in names]
    if -1 not in layers and len(set(layers)) == len(names):
        return [f"layer {layer}" for layer in layers]
    return [
        f"{layer} {projection_of(name).removesuffix('.mos_router')}" if layer >= 0 else name
        for layer, name in zip(layers, names, strict=True)
    ]


def _settings(run: Run) -> str:
    rows = "".join(
        f"<tr><th>{escape(str(name))}</th><td>{escape(_shown(value))}</td></tr>"
        for name, value in run.settings.items()
        if value is not None
    )
    return _section("Settings", "", f'<table class="settings">{rows}</table>') if rows else ""


def _shown(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_shown(item)}" for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_shown, value))
    return number(value) if isinstance(value, float) else str(value)


def _legend(run: Run) -> str:
    items = []
    for space in dict.fromkeys(run.expert_spaces):
        experts = [i for i, other in enumerate(run.expert_spaces) if other == space]
        swatches = "".join(f'<i class="{shade(run.expert_spaces, i)}"></i>' for i in experts)
        items.append(f"<span>{swatches}{len(experts)} {_SPELLED[space]}</span>")
    return f'<p class="legend">{"".join(items)}</p>' if items else ""


def _section(title: str, text: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{f'<p>{text}</p>' if text else ''}{content}</section>"


def _figure(caption: str, content: str, css: str = "") -> str:
    return f'<figure class="{css}"><figcaption>{escape(caption)}</figcaption>{content}</figure>'


def _plot(caption: str, lines: Sequence[Line], width: int = 560, **options) -> str:
    """A figure of curves. options: of `chart`."""
    return _figure(caption, chart(lines, width=width, height=250, name=caption, **options))


def _style() -> str:
    light = "".join(f".{s}.s{i}{{--c:{c}}}" for s, shades in COLORS.items() for i, c in enumerate(shades))
    dark = "".join(f".{s}.s{i}{{--c:{c}}}" for s, shades in COLORS.items() for i, c in enumerate(_for_dark(shades)))
    return f"{_LAYOUT}{light}@media (prefers-color-scheme: dark){{:root{{{_DARK}}}{dark}}}"


def _for_dark(shades: Sequence[str]) -> Sequence[str]:
    """The same shades for a dark ground: none so dark that it vanishes, the second the space's clearest."""
    light = shades[2:]
    return [light[-1], *light][: len(shades)] + list(light[: len(shades) - 1 - len(light)])


_DARK = "--ground:#14161a;--card:#1b1e24;--ink:#e6e8eb;--soft:#9aa3ad;--grid:#2b3038;--accent:#e58fd0;"
_IN_PAGE = "svg{display:block;width:100%;height:auto;overflow:visible}svg.heat{max-width:760px}"
_LAYOUT = """
:root{color-scheme:light dark;--ground:#fbfbfa;--card:#ffffff;--ink:#1d2126;--soft:#68717b;--grid:#e7e8e6;
--accent:#a0268a;font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
body{margin:0;background:var(--ground);color:var(--ink)}
main{max-width:1180px;margin:0 auto;padding:40px 28px 80px}
h1{font-size:30px;line-height:1.2;letter-spacing:-.02em;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:20px;letter-spacing:-.01em;margin:52px 0 4px}
p{margin:0 0 12px;color:var(--soft);max-width:80ch}
.key{color:var(--c);font-weight:600}
.facts{display:flex;flex-wrap:wrap;gap:14px 44px;margin:24px 0 0}
.facts b{display:block;font-size:24px;font-weight:600;letter-spacing:-.02em;font-variant-numeric:tabular-nums}
.facts span{color:var(--soft);font-size:13px}
.pair{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,480px),1fr));gap:16px}
figure{margin:0;padding:14px 16px 10px;background:var(--card);border:1px solid var(--grid);border-radius:10px}
figure{min-width:0}
figure.wide,section>figure{margin-top:16px}
figcaption{font-size:13px;color:var(--soft);margin-bottom:6px}
svg text{font-size:11.5px;font-variant-numeric:tabular-nums;fill:var(--soft)}
svg text.end{text-anchor:end}svg text.middle{text-anchor:middle}
svg text.label{font-size:12.5px;font-weight:600;fill:var(--c)}
.ink{--c:var(--ink)}.accent{--c:var(--accent)}.faint{--c:var(--soft)}
.line{fill:none;stroke:var(--c);stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round}
.line.faint{stroke-width:1;opacity:.5}
.line:hover{stroke-width:3.4;opacity:1}
.panel .line{stroke-width:1.5;vector-effect:non-scaling-stroke}
circle{fill:var(--c)}
.band{fill:var(--c);opacity:.14}
line.grid{stroke:var(--grid);stroke-width:1}
line.rule{stroke:var(--soft);stroke-width:1;stroke-dasharray:3 3;opacity:.65}
.panel line.rule{stroke-dasharray:none;opacity:.35}
.scroll{overflow-x:auto}
table.panels{border-collapse:separate;border-spacing:6px;width:100%}
table.panels th{font-size:12px;font-weight:500;color:var(--soft);text-align:center;white-space:nowrap}
table.panels th:first-child{text-align:right;padding-right:4px;width:1%}
table.panels td{padding:0;background:var(--ground);border-radius:6px;min-width:120px}
.cell{fill:var(--c)}
svg text.cell-text{fill:var(--ink)}svg text.cell-text.strong{fill:var(--card)}
.legend{display:flex;flex-wrap:wrap;gap:4px 26px;margin:4px 0 0}
.legend i{display:inline-block;width:16px;height:4px;border-radius:2px;background:var(--c)}
.legend i{margin-right:4px;vertical-align:3px}
table.settings{border-collapse:collapse;font-size:13px;margin-top:8px}
table.settings th{font-weight:500;text-align:left;color:var(--soft);padding:4px 28px 4px 0;vertical-align:top}
table.settings td{padding:4px 0;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
table.settings tr+tr{border-top:1px solid var(--grid)}
"""
