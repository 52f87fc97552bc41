"""The study's own split of data that has no evaluation files, so that rows of every time count the same examples."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mos_kernels.finetune.data import read_rows
from mos_kernels.run_report.log import write_text

EVAL_SIZE = 0.3


def split_file(path: Path, label: str, renames: Mapping[str, str], folder: Path) -> tuple[Path, Path]:
    """(training file, evaluation file) in `folder`, of the rows of `path`: 30% of each class are set aside."""
    rows = [row for _, row in read_rows(str(path))]
    strata = [renames.get(str(row[label]), str(row[label])) for row in rows]
    folder.mkdir(parents=True, exist_ok=True)
    files = folder / "train.jsonl", folder / "held_out.jsonl"
    for file, chosen in zip(files, stratified_split(strata, EVAL_SIZE, 0), strict=True):
        write_text(file, "".join(json.dumps(rows[i]) + "\n" for i in chosen))
    return files


def stratified_split(strata: Sequence[str], eval_size: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices (train, eval), each in the file's order, with every class in the same proportion on both sides.

    eval_size: a share in (0, 1), or a number of rows. The eval side has exactly that many rows (by largest remainder),
    and never all rows of a class: a class with a single row is trained on. Depends on `seed` and on nothing else.
    """
    total = len(strata)
    wanted = round(eval_size * total) if eval_size < 1 else int(eval_size)
    counts = Counter(strata)
    room = {name: count - 1 for name, count in counts.items()}
    if not 0 < wanted <= sum(room.values()):
        raise ValueError(
            f"{eval_size:g} asks for {wanted} of {total} rows in {len(counts)} classes: at least one row, "
            f"and at most {sum(room.values())} (one of each class stays in training), can be set aside"
        )
    names = sorted(counts)
    share = {name: min(wanted * counts[name] // total, room[name]) for name in names}
    by_remainder = sorted(names, key=lambda name: (-(wanted * counts[name] % total), name))
    while (missing := wanted - sum(share.values())) > 0:
        for name in [name for name in by_remainder if share[name] < room[name]][:missing]:
            share[name] += 1
    order = np.random.default_rng(seed).permutation(total)
    evaluation = []
    for name in names:
        evaluation += [int(i) for i in order if strata[i] == name][: share[name]]
    chosen = set(evaluation)
    return [i for i in range(total) if i not in chosen], sorted(evaluation)
