"""What a run leaves behind: metrics.json, predictions.jsonl, plots, and the table on the screen."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import platform
import resource
import sys
from pathlib import Path

import torch
import transformers

import mos_kernels
from mos_kernels.config import MoSConfig
from mos_kernels.finetune import plots
from mos_kernels.finetune.model import parameter_counts
from mos_kernels.finetune.trainer import evaluations
from mos_kernels.run_report.log import write_text


def write_results(args, trainer, config, names, settings: dict, summary: dict, evaluation: dict) -> None:
    """Write metrics.json (last, and in one step: it marks a complete run), predictions and plots; print the table."""
    entries, device = trainer.run_log.entries, trainer.args.device
    lines = _predictions(evaluation, summary.get("classes"), trainer.outputs)
    write_text(args.output / "predictions.jsonl", lines)
    plotted = _plot(args, entries, config, trainer.routing)
    found = evaluations(entries)
    evaluating = sum(entry.get("eval_runtime", 0.0) for entry in entries)
    metrics = {
        "final": found[-1],
        "evaluations": found,
        "settings": {**settings, "adapter": config.to_dict() if isinstance(config, MoSConfig) else config},
        "data": summary,
        "parameters": parameter_counts(trainer.model),
        "linears": names,
        "steps": trainer.state.global_step,
        "seconds": {"total": round(trainer.run_log.seconds, 3), "evaluation": round(evaluating, 3)},
        "memory": _peak_memory(device),
        "routing": trainer.routing,
        "versions": _versions(),
        "machine": {"device": str(device), "threads": torch.get_num_threads(), "platform": platform.platform()},
    }
    write_text(args.output / "metrics.json", json.dumps(metrics, indent=2, default=str) + "\n")
    _print_result(args, metrics, plotted)


def _peak_memory(device: torch.device) -> dict[str, float]:
    unit = 2**20 if sys.platform == "darwin" else 2**10
    memory = {"peak_rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)}
    if device.type == "cuda":
        memory["peak_cuda_mib"] = round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    return memory


def _versions() -> dict[str, str]:
    versions = {"mos_kernels": mos_kernels.__version__, "python": platform.python_version()}
    versions |= {"torch": torch.__version__, "transformers": transformers.__version__}
    for package in ("peft", "accelerate", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _plot(args, entries: list[dict], config, routing: dict) -> list[Path]:
    if args.no_plots:
        return []
    if importlib.util.find_spec("matplotlib") is None:
        print("note: no plots without matplotlib: pip install matplotlib; log.jsonl holds what they show")
        return []
    title = f"{args.method} on {Path(args.model).name}, {args.task}, seed {args.seed}"
    written = [args.output / "loss.png"]
    plots.plot_loss(entries, written[0], title)
    if isinstance(config, MoSConfig):
        if set(config.spaces) != {"euclidean"}:
            written.append(args.output / "curvature.png")
            plots.plot_curvature(entries, config.expert_spaces, written[-1], f"curvature of each expert: {title}")
        written.append(args.output / "routing.png")
        k = config.num_experts_per_tok
        shares = {name: [k * share for share in summary["share"]] for name, summary in routing.items() if summary}
        plots.plot_routing(
            shares, config.expert_spaces, written[-1], f"share of tokens that each expert serves: {title}"
        )
    return written


def _predictions(evaluation: dict[str, dict], classes: list[str] | None, outputs) -> str:
    """A JSON line for each evaluation row, in order: its text, its target, and what the model made of it."""
    rows = [
        {"file": name, "text": text if len(text) > 1 else text[0], "target": target}
        for name, part in evaluation.items()
        for text, target in zip(part["texts"], part["targets"] or [None] * len(part["texts"]), strict=True)
    ]
    for row, output in zip(rows, outputs, strict=True):
        if classes is not None:
            row |= {"predicted": classes[int(output.argmax())], "logits": output.tolist()}
        else:
            row |= {"loss": float(output[0] / output[1]), "tokens": int(output[1]), "exact_match": bool(output[2])}
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _print_result(args: argparse.Namespace, metrics: dict, plotted: list[Path]) -> None:
    final = metrics["final"]
    rows = {"pooled" if "files" in final else next(iter(metrics["data"]["eval_rows"])): final, **final.get("files", {})}
    names = [name for name, value in final.items() if isinstance(value, float) and name not in ("epoch", "seconds")]
    width = max(map(len, rows))
    print(f"\n{'evaluation':<{max(width, 10)}}  " + "  ".join(f"{name.replace('_', ' '):>20}" for name in names))
    for row, values in rows.items():
        print(f"{row:<{max(width, 10)}}  " + "  ".join(f"{values[name]:>20.4f}" for name in names))
    seconds = metrics["seconds"]
    print(f"{metrics['steps']} steps in {seconds['total']:.0f} s, {seconds['evaluation']:.0f} s of them evaluating")
    print(
        "written: "
        + ", ".join(
            map(str, [args.output / "adapter", args.output / "metrics.json", args.output / "log.jsonl", *plotted])
        )
    )
