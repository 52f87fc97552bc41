"""The rows: one line of JSON for each finished run, and what a run leaves behind made into one."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.study import products
from benchmarks.study.norms import FILE as NORMS
from benchmarks.study.plan import Cell
from mos_kernels.run_report.log import write_text

RESULTS = Path(__file__).resolve().parents[1] / "results" / "cpu-2core" / "study.jsonl"
CURVATURES = 20
"""How many points of each curvature's trajectory a row keeps, at most and besides the start."""


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def remaining(planned: Sequence[Cell], path: Path) -> list[Cell]:
    """The cells without a row."""
    done = {row["key"] for row in read(path)}
    return [cell for cell in planned if cell.key not in done]


def append(path: Path, row: dict) -> None:
    """Add a row, in one step: a reader, and whoever comes after a kill, finds all of it or nothing.

    ValueError where a row of this key is there.
    """
    if any(row["key"] == earlier["key"] for earlier in read(path)):
        raise ValueError(f"{path} has a row for {row['key']!r} already")
    path.parent.mkdir(parents=True, exist_ok=True)
    text = path.read_text() if path.is_file() else ""
    write_text(path, text + json.dumps(row, separators=(",", ":"), ensure_ascii=False) + "\n")


@contextlib.contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Hold the folder of the rows; RuntimeError where another runner holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise RuntimeError(f"another runner writes into {path.parent}: wait for it, or name another --rows") from None
    finally:
        os.close(folder)


def row_of(cell: Cell, output: Path, failure: str | None, commit: str) -> dict:
    """What is kept of a run in `output`, finished or failed in training, made from its files alone."""
    settings = json.loads((output / "settings.json").read_text())
    log = _log(output)
    gradients = [entry["grad_norm"] for entry in log if "grad_norm" in entry]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    finite = [norm for norm in gradients if math.isfinite(norm)]
    row = {
        "key": cell.key, "dataset": cell.dataset, "options": list(cell.entry.options), "rate": cell.rate,
        "seed": cell.seed, "failure": failure,
        "nan": failure is not None or len(finite) < len(gradients),
        "largest_grad_norm": max(finite, default=None), "first_grad_norm": next(iter(finite), None),
        "curvature": None if failure else _curvatures(log, settings),
        "norms": None if failure else _json(output / NORMS),
        "learning_rate": settings["learning_rate"], "dtype": settings["dtype"],
        "bfloat16_products": products.kind(), "epochs": settings["num_train_epochs"],
        "batch_size": settings["per_device_train_batch_size"],
        "group_by_length": settings.get("train_sampling_strategy") == "group_by_length",
        "adapter": settings["adapter"], "data_sha256": list(settings["data_files"].values()),
        "commit": commit, "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    if failure is not None:
        return row
    metrics = json.loads((output / "metrics.json").read_text())
    final = metrics["final"]
    predictions = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    counts = metrics["data"]["eval_rows_of_class"]
    return row | {
        **{name: final[name] for name in ("accuracy", "matthews_correlation", "loss")},
        **({"files": final["files"]} if "files" in final else {}),
        "majority": max(counts.values()) / sum(counts.values()),
        "train_loss": sum(losses[-10:]) / len(losses[-10:]),
        "correct": _bits([prediction["predicted"] == prediction["target"] for prediction in predictions]),
        "classes_predicted": len({prediction["predicted"] for prediction in predictions}),
        "evaluations": [
            {name: e[name] for name in ("step", "accuracy", "matthews_correlation", "loss")}
            for e in metrics["evaluations"]
        ],
        "steps": metrics["steps"], "parameters": metrics["parameters"], "seconds": metrics["seconds"],
        "shares": {
            name: [round(share, 4) for share in summary["share"]] for name, summary in metrics["routing"].items()
        },
        "train_rows": metrics["data"]["train_rows"], "eval_rows": metrics["data"]["eval_rows"],
        "versions": metrics["versions"], "machine": metrics["machine"],
    }  # fmt: skip


def correct(row: dict) -> list[int]:
    """0 or 1 for each evaluation row, in the data's order."""
    size = sum(row["eval_rows"].values())
    return [int(bit) for bit in bin(int(row["correct"], 16))[3:]][:size]


def _bits(values: list[bool]) -> str:
    return hex(int("1" + "".join(str(int(value)) for value in values), 2))  # the 1 keeps leading zeros


def _log(output: Path) -> list[dict]:
    path = output / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _json(path: Path) -> dict | None:
    return json.loads(path.read_text()) if path.is_file() else None


def _curvatures(log: list[dict], settings: dict) -> dict | None:
    """{"spaces": of each expert, "steps": …, "linears": {name: [κ̂ of each expert] for each step}}."""
    entries = [entry for entry in log if entry.get("curvature")]
    spaces = [s for s, count in (settings["adapter"] or {}).get("spaces", {}).items() for _ in range(count)]
    if not entries or not set(spaces) - {"euclidean"}:
        return None
    every = max(math.ceil((len(entries) - 1) / CURVATURES), 1)
    kept = [entry for i, entry in enumerate(entries) if i % every == 0 or entry is entries[-1]]
    linears = {
        name: [[round(value, 3) for value in entry["curvature"][name]] for entry in kept]
        for name in entries[0]["curvature"]
    }
    return {"spaces": spaces, "steps": [entry["step"] for entry in kept], "linears": linears}
