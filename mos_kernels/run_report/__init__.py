"""`python -m mos_kernels report RUN`: one HTML page with the curves of a run, and three of its charts as SVG files."""

from __future__ import annotations

import sys
from pathlib import Path

from mos_kernels.run_report.log import RunError, read_run, write_text
from mos_kernels.run_report.page import CHARTS, page, svg_files

FILES = ("report.html", *(f"report-{name}.svg" for name in CHARTS))
"""What the command writes into the run's folder."""


def run(folder: Path, output: Path | None = None) -> int:
    """The command: write the page (default: report.html in the folder) and the charts of `CHARTS` that the run has.

    The charts are beside the page, named after it: report-loss.svg. Returns 0, or 2 after an error said on stderr. Each
    file is written beside its place and renamed, so a reader never finds half of it.
    """
    try:
        found = read_run(folder)
        output = folder / FILES[0] if output is None else output
        write_text(output, page(found))
        for name, drawn in svg_files(found).items():
            write_text(output.with_name(f"{output.stem}-{name}.svg"), drawn)
    except (RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"written: {output}")
    return 0
