"""`python -m mos_kernels report RUN`: one HTML page with the curves of a run."""

from __future__ import annotations

import sys
from pathlib import Path

from mos_kernels.run_report.log import RunError, read_run, write_text
from mos_kernels.run_report.page import page


def run(folder: Path, output: Path | None = None) -> int:
    """The command: write the page (default: report.html in the folder). Returns 0, or 2 after an error said on stderr.

    The page is written beside its place and renamed, so a reader never finds half of it.
    """
    try:
        text = page(read_run(folder))
        output = folder / "report.html" if output is None else output
        write_text(output, text)
    except (RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"written: {output}")
    return 0
