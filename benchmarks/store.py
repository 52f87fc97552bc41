"""Raw rows on disk: results/<machine>/suite.jsonl, written beside and renamed.

A run replaces the stored rows of the groups that it measured and leaves the others, each with its own run and commit:
what is compared within a group always comes from one run. Nothing else than these rows makes tables and plots.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from mos_kernels.run_report.log import write_lines

FILE = "suite.jsonl"
SHAPE = ("d_in", "d_out", "tokens", "experts", "rank", "layers", "batch", "length")


def group_key(row: dict) -> tuple:
    """What a row's group measures: rows of one key and one run were interleaved."""
    step = None if row["kind"] == "steps" else row["step"]
    return row["kind"], step, row["dtype"], *(row.get(name) for name in SHAPE)


def key(row: dict) -> tuple:
    return *group_key(row), row["provider"]


def load(folder: Path) -> list[dict]:
    """The stored rows; none where there is no file."""
    file = folder / FILE
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def save(folder: Path, rows: Iterable[dict]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / FILE
    write_lines(file, list(rows))
    return file


def merged(stored: Iterable[dict], new: Iterable[dict]) -> list[dict]:
    """The stored rows with every group that `new` measured replaced; what it left out it replaces only if unknown."""
    stored, new = list(stored), list(new)
    measured = {group_key(row) for row in new if row.get("median_s") is not None}
    known = {group_key(row) for row in stored if row.get("median_s") is not None}
    kept = [row for row in stored if group_key(row) not in measured]
    unmeasured = {group_key(row) for row in new} - measured - known
    kept = [row for row in kept if group_key(row) not in unmeasured]
    return kept + [row for row in new if group_key(row) in measured | unmeasured]


def measured(rows: Iterable[dict]) -> list[dict]:
    return [row for row in rows if row.get("median_s") is not None]


def groups(rows: Iterable[dict]) -> dict[tuple, dict[str, dict]]:
    """group key -> provider -> row."""
    found: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        found.setdefault(group_key(row), {})[row["provider"]] = row
    return found
