"""`python -m benchmarks report`: tables and plots, from the stored rows alone.

results/<machine>/report.md and plots/*.png hold everything of a machine. Between two markers, docs/performance.md holds
the targets and the most telling table of each machine. Between two others, it and README.md hold a summary of one.
"""

from __future__ import annotations

import os
import textwrap
from pathlib import Path

from benchmarks import plots, providers, store, tables
from benchmarks.machine import RESULTS, ROOT
from mos_kernels.run_report.log import write_text

SUMMARY, SECTION = (
    (f"<!-- {name}: written by python -m benchmarks report -->", f"<!-- end of {name} -->")
    for name in ("summary", "performance")
)
PAGE, README = ROOT / "docs" / "performance.md", ROOT / "README.md"
CPU_NOTE = "Numbers are ratios within one run. Absolute times of a CPU depend on what else it does, and are not given."
NOT_ON_THE_PAGE = (providers.PEFT_64, providers.PEFT_64_AS_BASE, providers.TIDIED, providers.GEOOPT)
EXP_LOG_NOTE = (
    "Both mappings multiply the vector by a scalar. So a fused exp/log mapping moves the same bytes as the "
    "stereographic one, and the difference that remains is due to PyTorch. “our eager” and “our Triton” never compute "
    "the vectors: their time is that of ‖x‖² and A x in one pass, and of λ, q and e of every expert."
)


def machines(results: Path = RESULTS) -> dict[str, list[dict]]:
    """The rows of every machine that has some, GPUs first."""
    found = {folder.name: store.load(folder) for folder in sorted(results.iterdir())} if results.exists() else {}
    found = {name: rows for name, rows in found.items() if store.measured(rows)}
    return dict(sorted(found.items(), key=lambda item: not tables.is_gpu(item[1])))


def write_all(results: Path = RESULTS, page: Path | None = None, readme: Path | None = None) -> list[Path]:
    """Every machine's report and plots, and what stands between the markers of a page and a README; the files written.

    page, readme: the project's own where the results are; None for results elsewhere: none.
    """
    if results == RESULTS:
        page, readme = page or PAGE, readme or README
    written, found = [], machines(results)
    for name, rows in found.items():
        pictures = plots.all_plots(rows, results / name / "plots")
        report = results / name / "report.md"
        write_text(report, machine_report(name, rows, [p.relative_to(results / name) for p in pictures]))
        written += [*pictures, report]
    for file, marks, text in (
        (page, SUMMARY, lambda: summary(found)),
        (page, SECTION, lambda: section(found, results, page.parent)),
        (readme, SUMMARY, lambda: summary(found)),
    ):
        if file is not None and tables.write_between(file, *marks, text):
            written.append(file)
    return list(dict.fromkeys(written))


def machine_report(name: str, rows: list[dict], pictures: list[Path]) -> str:
    gpu = tables.is_gpu(rows)
    picture = {path.stem: f"\n![{path.stem}]({path})\n" for path in pictures}
    over = (
        "time / over the frozen linear / over peft LoRA r=8" if gpu else "over the frozen linear / over peft LoRA r=8"
    )
    parts = [
        f"# {name}", "Written by `python -m benchmarks report` from `suite.jsonl`.", tables.made_with(rows) + ".",
        *([] if gpu else [CPU_NOTE]),
        "## Targets", tables.targets(rows, ("gpu",) if gpu else ("cpu",)),
        "## A gated FFN, forward and backward", tables.ffn_note(rows), tables.ffns(rows), picture.get("ffn"),
        *(["Launch settings found before “settings found”:", tables.settings_found(rows)] if gpu else []),
        f"## One adapted linear, forward and backward ({over})", tables.layers(rows), picture.get("layer"),
        "## One Euclidean expert, a LoRA: training", tables.layers(rows, "lora"),
        "## The same for one token, forward", tables.layers(rows, "lora, a token"),
        "## An adapted linear through torch.compile", tables.layers(rows, "compiled"), picture.get("compiled"),
        *(["## The same in a CUDA graph: without Python's share", tables.layers(rows, "graph")] if gpu else []),
        "## Memory", tables.memory(rows), tables.launches(rows) if gpu else None, picture.get("memory"),
        "## The adapter without its base product", tables.shares(rows, "branch"), picture.get("branch"),
        "## Each step alone", tables.shares(rows), picture.get("steps"),
        "## The order of the products, forward", tables.shares(rows, "order"),
        "## A gated FFN in decoding, and a whole model, over the same without adapters",
        *_titled(rows, (("decode", "tokens", None, "A gated FFN in decoding, forward"),
                        ("model", "tokens", "training step", "A whole model, a training step"),
                        ("model", "tokens", "decoding", "A whole model in decoding"))), picture.get("whole"),
        "## The paper's Figure 3", EXP_LOG_NOTE, "The conversion alone, over the embedding dimension:",
        tables.by_axis(rows, "dimension", "d_in", "conversion"), "With the linear around it:",
        tables.by_axis(rows, "dimension", "d_in", "with the linear"), picture.get("figure3_dimension"),
        "Over the number of layers:", tables.by_axis(rows, "depth", "layers"), picture.get("figure3_depth"),
        "## Growth, over the frozen linear",
        *_titled(rows, (("tokens", "tokens", None, "Forward and backward over the number of tokens"),
                        ("experts", "experts", None, "Over the number of experts"),
                        ("rank", "rank", None, "Over the rank"),
                        ("width", "width", None, "Over the widths"))), picture.get("growth"),
        "## Left out, or failed", tables.not_measured(rows),
    ]  # fmt: skip
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def _titled(rows: list[dict], wanted: tuple[tuple[str, str, str | None, str], ...]) -> list[str]:
    """A title and a table for each (kind, axis, step, title); the title has the widths too, where they are one pair."""
    parts = []
    for kind, axis, step, title in wanted:
        shapes = {_shape(group) for group in tables.groups_of(rows, kind, step) if tables.first(group).get("d_out")}
        where = f", {shapes.pop()}" if len(shapes) == 1 else ""
        parts += [f"{title}{where}:", tables.by_axis(rows, kind, axis, step)]
    return parts


def section(found: dict[str, list[dict]], results: Path, root: Path) -> str:
    """The performance of every machine, for a page in the folder `root`."""
    gpus = {name: rows for name, rows in found.items() if tables.is_gpu(rows)}
    parts = []
    for name, rows in found.items():
        folder = os.path.relpath(results / name, root)
        title = "GPU" if name in gpus else "CPU"
        note = "" if name in gpus else " " + CPU_NOTE
        over = ("time / " if name in gpus else "") + "time over that of the frozen linear / of peft LoRA r=8"
        shape = tables.first(tables.groups_of(rows, "layer")[0]) if tables.groups_of(rows, "layer") else None
        what = f"One linear, {shape['dtype']}, {shape['tokens']} tokens, forward and backward; {over}:" if shape else ""
        everything = f"All tables: [{folder}/report.md]({folder}/report.md)."
        about = f"**{title}** ({tables.made_with(rows)}).{note} {everything}"
        ffn_about = f"A gated FFN, forward and backward. {tables.ffn_note(rows)}"
        targets = tables.targets(rows, ("gpu",) if name in gpus else ("cpu",))
        parts += [_filled(about), _filled(ffn_about), tables.ffns(rows), targets]
        parts += [_filled(what), tables.layers(rows, without=NOT_ON_THE_PAGE)] if what else []
        picture = results / name / "plots" / "figure3_dimension.png"
        if picture.exists():
            parts.append(f"![conversion over the embedding dimension]({folder}/plots/figure3_dimension.png)")
    if not gpus:
        parts += ["**GPU targets.** None is measured yet: `make gpu` on a machine with a GPU fills this table.",
                  tables.targets([], ("gpu",))]  # fmt: skip
    if not any(name not in gpus for name in found):
        parts += ["**CPU targets**, not measured yet: `make bench` fills this table.", tables.targets([], ("cpu",))]
    return "\n\n".join(parts)


def _filled(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def summary(found: dict[str, list[dict]]) -> str:
    """What a MoS layer costs, in one table: of the first machine, which is a GPU where there is one."""
    if not found:
        return "Nothing is measured yet: `make bench` (any machine) or `make gpu` fills this table."
    rows = next(iter(found.values()))
    gpu = tables.is_gpu(rows)
    ours = (providers.TRITON_OWN, providers.TRITON) if gpu else (providers.EAGER_OWN, providers.EAGER)
    shown = {
        "peft LoRA r=8": (providers.PEFT_8,),
        "**MoS r=8**": ours,
        "the paper's formula, expert by expert": (providers.PRINTED,),
    }
    lines = []

    def add(what: str, group: dict[str, dict], number) -> None:
        cells = [next((group[name] for name in names if name in group), None) for names in shown.values()]
        known = [row is not None and row["base"] in group for row in cells]
        lines.append(
            [what, *(number(row, group[row["base"]]) if k else "" for row, k in zip(cells, known, strict=True))]
        )

    def over(row: dict, base: dict) -> str:
        return f"{row['median_s'] / base['median_s']:.2f}×"

    def more(name: str):
        def number(row: dict, base: dict) -> str:
            return f"{row[name] / base[name]:.2f}×" if row.get(name) and base.get(name) else ""

        return number

    for group in tables.groups_of(rows, "ffn", "forward+backward"):
        add(f"training, a gated FFN {_shape(group)}, {_tokens(group)}: time", group, over)
        add("the same: bytes saved for backward", group, more("saved_bytes"))
    for kind, step, what in (
        ("decode", None, "decoding, a gated FFN"),
        ("model", "decoding", "decoding, a whole model of Qwen2-1.5B's widths"),
    ):
        found = [group for group in tables.groups_of(rows, kind, step) if tables.first(group)["tokens"] == 1]
        for group in found[: 2 if kind == "decode" else 1]:
            where = f" {_shape(group)}" if kind != "model" else ""
            add(f"{what}{where}, {_tokens(group)}: time", group, over)
    for group in tables.groups_of(rows, "layer")[:1]:
        add(f"training, one linear {_shape(group)}, {_tokens(group)}: time", group, over)
    for group in tables.groups_of(rows, "tokens")[:1]:
        add(f"training, one small linear {_shape(group)}, {_tokens(group)}: time", group, over)
    what = "Each number is a ratio to the same layer or model without an adapter."
    return _filled(f"{what} Measured on {tables.made_with(rows)}.") + "\n\n" + tables.table(["", *shown], lines)


def _shape(group: dict[str, dict]) -> str:
    row = tables.first(group)
    return f"{row['d_in']}→{row['d_out']}"


def _tokens(group: dict[str, dict]) -> str:
    return tables.counted(tables.first(group)["tokens"], "token")
