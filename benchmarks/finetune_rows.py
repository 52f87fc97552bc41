"""Gather runs of the finetune command: `python -m benchmarks.finetune_rows RUN... --commit HASH [--write FILE]`.

Prints a table, a line for each data set, learning rate and method; --write keeps a JSON row for each run.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path


def row(run: Path, commit: str) -> dict:
    """What is kept of one run."""
    metrics = json.loads((run / "metrics.json").read_text())
    settings, data = metrics["settings"], metrics["data"]
    kept = ("method", "seed", "learning_rate", "epochs", "batch_size", "eval_size", "split_seed", "adapter")
    return {
        "data": " + ".join(Path(name).name for name in data["files"]),
        "data_sha256": list(data["files"].values()),
        **{name: settings[name] for name in kept if name in settings},
        **{name: metrics["final"][name] for name in ("accuracy", "matthews_correlation", "loss")},
        "steps": metrics["steps"], "parameters": metrics["parameters"], "seconds": metrics["seconds"],
        "train_rows": data["train_rows"], "eval_rows": data["eval_rows"],
        "machine": metrics["machine"], "versions": metrics["versions"], "commit": commit,
    }  # fmt: skip


def table(rows: list[dict]) -> str:
    """Mean over seeds, with each seed's value behind it."""
    groups = defaultdict(list)
    for r in rows:
        groups[r["data"].split(".")[0], r["learning_rate"], r["method"]].append(r)
    lines = ["| data | learning rate | method | accuracy | Matthews | evaluation loss |", "| --- " * 6 + "|"]
    for (data, rate, method), runs in sorted(groups.items()):
        cells = []
        for name in ("accuracy", "matthews_correlation", "loss"):
            values = [r[name] for r in sorted(runs, key=lambda r: r["seed"])]
            cells.append(f"{statistics.mean(values):.3f} ({', '.join(f'{v:.3f}' for v in values)})")
        lines.append(f"| {data} | {rate:g} | {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of the finetune command")
    parser.add_argument("--commit", required=True, help="the commit that the runs were made with")
    parser.add_argument("--write", type=Path, help="JSONL file for the rows")
    options = parser.parse_args()
    rows = [row(run, options.commit) for run in options.runs]
    if options.write:
        beside = options.write.with_suffix(".tmp")
        beside.write_text("".join(json.dumps(r) + "\n" for r in rows))
        beside.replace(options.write)
    print(table(rows))


if __name__ == "__main__":
    main()
