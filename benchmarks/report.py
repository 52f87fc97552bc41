"""`python -m benchmarks report`: tables, plots and the README's performance section, from the stored rows alone.

results/<machine>/report.md and plots/*.png hold everything of a machine; the README's section, between its two markers,
the targets and the most telling table of each machine.
"""

from __future__ import annotations

import os
import textwrap
from pathlib import Path

from benchmarks import plots, providers, store, tables
from benchmarks.machine import RESULTS, ROOT
from mos_kernels.run_report.log import write_text

BEGIN, END = "<!-- performance: written by python -m benchmarks report -->", "<!-- end of performance -->"
CPU_NOTE = "Ratios within one run: absolute times of a CPU depend on what else it does, and are not given."
NOT_IN_README = (providers.PEFT_64, providers.PEFT_64_AS_BASE, providers.TIDIED, providers.GEOOPT)
EXP_LOG_NOTE = (
    "Both mappings are a scalar times the vector: fused, exp/log moves the same bytes as the stereographic one, and "
    "the difference that is left between them is PyTorch's, not the mathematics'. “our eager” and “our Triton” never "
    "form the vectors: what they are charged with is ‖x‖² and A x in one pass, and λ, q and e of every expert."
)


def machines(results: Path = RESULTS) -> dict[str, list[dict]]:
    """The rows of every machine that has some, GPUs first."""
    found = {folder.name: store.load(folder) for folder in sorted(results.iterdir())} if results.exists() else {}
    found = {name: rows for name, rows in found.items() if store.measured(rows)}
    return dict(sorted(found.items(), key=lambda item: not tables.is_gpu(item[1])))


def write_all(results: Path = RESULTS, readme: Path | None = None) -> list[Path]:
    """Every machine's report and plots, and a README's section between its markers; the files written.

    readme: the project's own where the results are; None for results elsewhere: none.
    """
    if readme is None and results == RESULTS:
        readme = ROOT / "README.md"
    written, found = [], machines(results)
    for name, rows in found.items():
        pictures = plots.all_plots(rows, results / name / "plots")
        report = results / name / "report.md"
        write_text(report, machine_report(name, rows, [p.relative_to(results / name) for p in pictures]))
        written += [*pictures, report]
    if readme is not None and tables.write_between(
        readme, BEGIN, END, lambda: readme_section(found, results, readme.parent)
    ):
        written.append(readme)
    return written


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
        f"## One adapted linear, forward and backward ({over})", tables.layers(rows), picture.get("layer"),
        "## The same through torch.compile", tables.layers(rows, "compiled"), picture.get("compiled"),
        *(["## The same in a CUDA graph: without Python's share", tables.layers(rows, "graph")] if gpu else []),
        "## Memory", tables.memory(rows), tables.launches(rows) if gpu else None, picture.get("memory"),
        "## The adapter without its base product", tables.shares(rows, "branch"), picture.get("branch"),
        "## Each step alone", tables.shares(rows), picture.get("steps"),
        "## The order of the products, forward", tables.shares(rows, "order"),
        "## A gated FFN, and a whole model, over the same without adapters",
        *(tables.by_axis(rows, kind, "tokens", step) for kind, step in
          (("ffn", None), ("decode", None), ("model", "training step"), ("model", "decoding"))), picture.get("whole"),
        "## The paper's Figure 3", EXP_LOG_NOTE, "The conversion alone, over the embedding dimension:",
        tables.by_axis(rows, "dimension", "d_in", "conversion"), "With the linear around it:",
        tables.by_axis(rows, "dimension", "d_in", "with the linear"), picture.get("figure3_dimension"),
        "Over the number of layers:", tables.by_axis(rows, "depth", "layers"), picture.get("figure3_depth"),
        "## Growth, over the frozen linear",
        *(tables.by_axis(rows, kind, axis) for kind, axis in
          (("tokens", "tokens"), ("experts", "experts"), ("rank", "rank"), ("width", "width"))), picture.get("growth"),
        "## Left out, or failed", tables.not_measured(rows),
    ]  # fmt: skip
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def readme_section(found: dict[str, list[dict]], results: Path, root: Path) -> str:
    gpus = {name: rows for name, rows in found.items() if tables.is_gpu(rows)}
    parts = []
    for name, rows in found.items():
        folder = os.path.relpath(results / name, root)
        title = "GPU" if name in gpus else "CPU"
        note = "" if name in gpus else " " + CPU_NOTE
        over = ("time / " if name in gpus else "") + "over the frozen linear / over peft LoRA r=8"
        shape = tables.first(tables.groups_of(rows, "layer")[0]) if tables.groups_of(rows, "layer") else None
        what = f"One linear, {shape['dtype']}, {shape['tokens']} tokens, forward and backward: {over}." if shape else ""
        everything = f"Everything: [{folder}/report.md]({folder}/report.md)."
        about = f"**{title}** ({tables.made_with(rows)}). {what}{note} {everything}"
        measured = tables.layers(rows, without=NOT_IN_README)
        targets = tables.targets(rows, ("gpu",) if name in gpus else ("cpu",))
        parts += [textwrap.fill(about, 120, break_long_words=False, break_on_hyphens=False), measured, targets]
        picture = results / name / "plots" / "figure3_dimension.png"
        if picture.exists():
            parts.append(f"![conversion over the embedding dimension]({folder}/plots/figure3_dimension.png)")
    if not gpus:
        parts += ["**GPU targets**, none of them measured yet: `make gpu` on a machine with one fills this table.",
                  tables.targets([], ("gpu",))]  # fmt: skip
    if not any(name not in gpus for name in found):
        parts += ["**CPU targets**, not measured yet: `make bench` fills this table.", tables.targets([], ("cpu",))]
    return "\n\n".join(parts)
