"""The output folder of a run: what it holds, when it may be written, and where a resumed run goes on."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from mos_kernels.config import MoSConfig
from mos_kernels.finetune.options import given_options
from mos_kernels.finetune.trainer import remove_checkpoints_after
from mos_kernels.run_report.log import (
    FINETUNE_LOG,
    FINETUNE_SETTINGS,
    checkpoint_step,
    last_complete_checkpoint,
    write_text,
)

OWN_FILES = (
    FINETUNE_SETTINGS,
    "metrics.json",
    FINETUNE_LOG,
    "predictions.jsonl",
    "loss.png",
    "curvature.png",
    "routing.png",
    "report.html",
)
"""What a run writes into its folder, besides adapter/ and checkpoint-*/: what --overwrite may remove."""

NOT_RESUMED = ("output", "resume", "overwrite", "quiet", "device", "save_total_limit", "no_plots")
"""Settings that may differ between a run and its resumption."""


class FolderError(ValueError):
    """The output folder cannot be used as asked."""


def run_settings(args: argparse.Namespace, config, summary: dict) -> dict:
    """Every setting of the run in JSON types: the options, the adapter's configuration, the digests of the data."""
    options = {name: value for name, value in vars(args).items() if not callable(value) and name != "command"}
    for field in given_options(args):
        options.pop(field)
    options = {name: value for name, value in options.items() if name not in MoSConfig.__dataclass_fields__}
    adapter = config.to_dict() if isinstance(config, MoSConfig) else config
    settings = {**options, "adapter": adapter, "data_files": summary["files"]}
    return json.loads(json.dumps(settings, default=str))


def check_output(args: argparse.Namespace, settings: dict) -> Path | None:
    """Whether the output folder can be used; the checkpoint to resume from, or None. Changes nothing.

    Raises `FolderError` for a file, a folder that is not empty (without --resume or --overwrite), one that no run has
    written, and a resumption with other settings.
    """
    folder = args.output
    if folder.exists() and not folder.is_dir():
        raise FolderError(f"--output {folder} is a file: name a folder")
    if args.resume and args.overwrite:
        raise FolderError("--resume and --overwrite exclude each other")
    if not folder.is_dir() or not any(folder.iterdir()):
        return None
    earlier = _earlier_settings(folder)
    if args.resume:
        if earlier is None:
            raise FolderError(
                f"--resume: {folder} holds no run (settings.json): name the folder of the interrupted run"
            )
        _require_equal_settings(earlier, settings)
        return last_complete_checkpoint(folder)
    if not args.overwrite:
        raise FolderError(f"--output {folder} is not empty: name another folder, or add --resume or --overwrite")
    if earlier is None:
        raise FolderError(f"--overwrite: {folder} holds no run of this command (no settings.json): name another folder")
    return None


def open_output(args: argparse.Namespace, settings: dict, checkpoint: Path | None) -> None:
    """Make the folder ready for training: an earlier run removed (--overwrite), or what is after its checkpoint."""
    folder = args.output
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FolderError(f"--output {folder} cannot be made ({error}): name a folder that you may write") from None
    if args.resume:
        remove_checkpoints_after(folder, checkpoint_step(checkpoint) if checkpoint else 0)
    else:
        for path in folder.iterdir():
            if path.name in OWN_FILES:
                path.unlink()
            elif path.is_dir() and (path.name == "adapter" or path.name.startswith("checkpoint-")):
                shutil.rmtree(path)
    write_text(folder / FINETUNE_SETTINGS, json.dumps(settings, indent=2) + "\n")


def _earlier_settings(folder: Path) -> dict | None:
    try:
        return json.loads((folder / FINETUNE_SETTINGS).read_text())
    except (OSError, json.JSONDecodeError):
        return None


def _require_equal_settings(earlier: dict, settings: dict) -> None:
    names = sorted((set(earlier) | set(settings)) - set(NOT_RESUMED))
    pairs = {name: (earlier.get(name), settings.get(name)) for name in names}
    changed = [f"{name} was {before!r}, is {now!r}" for name, (before, now) in pairs.items() if before != now]
    if changed:
        raise FolderError(
            f"--resume goes on with the same settings, and these differ: {'; '.join(changed)}. Give the earlier ones, "
            "or start anew with --overwrite"
        )
