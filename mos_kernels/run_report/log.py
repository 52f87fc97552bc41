"""The log of a run: JSON lines, readable whenever the run was killed; and what a run's folder holds."""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mos_kernels.config import MoSConfig

HISTORY = "mos_history.jsonl"
"""What MoSCallback writes into a Trainer's output_dir. The first line has the settings, each other one a log."""

FINETUNE_LOG, FINETUNE_SETTINGS = "log.jsonl", "settings.json"
TRAINER_STATE = "trainer_state.json"

TIMINGS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
"""What Trainer puts beside the metrics of an evaluation."""


class RunError(ValueError):
    """A folder that holds no run, or one that cannot be read."""


@dataclass
class Run:
    """What a folder says about a training run.

    entries: one dictionary a log, in the order of "step": loss, learning_rate, eval_loss and mos/* as numbers; and
    where they were kept, by name of linear or router: curvature κ̂ and share of each expert, entropy.
    """

    name: str
    entries: list[dict]
    adapter: MoSConfig | None = None
    settings: dict = field(default_factory=dict)

    @property
    def expert_spaces(self) -> tuple[str, ...]:
        return self.adapter.expert_spaces if self.adapter else ()

    def spaces_of(self, name: str, experts: int) -> tuple[str, ...]:
        """The spaces of the experts of a linear or router: its own, by spaces_pattern, or those that are as many."""
        if self.adapter is None:
            return ()
        patterns = [{"spaces": spaces} for spaces in (self.adapter.spaces_pattern or {}).values()]
        found = [self.adapter.for_module(name), self.adapter]
        found += [dataclasses.replace(self.adapter, **p, num_experts_per_tok=1) for p in patterns]
        return next((config.expert_spaces for config in found if config.num_experts == experts), ())

    def curve(self, key: str) -> list[tuple[float, float]]:
        """(step, value) of a number in the logs."""
        return [(e["step"], e[key]) for e in self.entries if isinstance(e.get(key), (int, float))]


def read_run(folder: Path) -> Run:
    """The run in a folder of `finetune`, in a Trainer's output_dir, or up to one of its checkpoints.

    Raises RunError, which says what is missing or damaged.
    """
    if not folder.is_dir():
        raise RunError(f"{folder} is no folder: name the output folder of finetune, or a Trainer's output_dir")
    name = folder.resolve().name
    if (folder / FINETUNE_LOG).is_file() and (folder / FINETUNE_SETTINGS).is_file():
        settings = _json(folder / FINETUNE_SETTINGS)
        adapter = settings.pop("adapter", None)
        return Run(name, complete_lines(folder / FINETUNE_LOG), _config(adapter), {**settings, **_flat(adapter)})
    checkpoint = checkpoint_step(folder)
    places = [folder] if checkpoint is None else [folder, folder.resolve().parent]
    history = next((place / HISTORY for place in places if (place / HISTORY).is_file()), None)
    if history is not None:
        lines = complete_lines(history)
        if lines:
            first, step = lines[0], checkpoint or float("inf")
            settings = {**first.pop("settings", {}), **_flat(first.get("adapter"))}
            return Run(name, [e for e in lines if e["step"] <= step], _config(first.pop("adapter", None)), settings)
    state = _trainer_state(folder)
    if state is None:
        raise RunError(
            f"{folder} holds no run: {FINETUNE_LOG} and {FINETUNE_SETTINGS} (finetune), {HISTORY} (MoSCallback) and "
            f"{TRAINER_STATE} (Trainer) are all missing, or cut off in their first line"
        )
    values = {k: v for k in ("max_steps", "num_train_epochs", "train_batch_size") if (v := state.get(k)) is not None}
    logged = state.get("log_history")
    return Run(name, [e for e in logged if _has_step(e)] if isinstance(logged, list) else [], None, values)


def complete_lines(path: Path) -> list[dict]:
    """The entries of a file of JSON lines, up to one that was being written when the run was killed."""
    entries = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            break
        if not _has_step(entry):
            break
        entries.append(entry)
    return entries


def _has_step(entry) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("step"), (int, float))


def write_lines(path: Path, entries: Sequence[Mapping]) -> None:
    """Replace the file in one step."""
    write_text(path, "".join(json.dumps(entry) + "\n" for entry in entries))


def append_line(path: Path, entry: Mapping) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file in one step: a reader finds the old one or the new one, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def last_complete_checkpoint(folder: str | os.PathLike) -> Path | None:
    """The latest checkpoint-* of a Trainer whose writing was not interrupted; None without one.

    Trainer writes its state last, and takes the highest number for the last checkpoint even where that was cut off.
    Warns where there is no such folder, since training then starts from nothing.
    """
    if not Path(folder).is_dir():
        warnings.warn(f"{folder} is no folder, so it has no checkpoint: is its name right?", stacklevel=2)
    complete = [(s["global_step"], p) for p in Path(folder).glob("checkpoint-*") if (s := checkpoint_state(p))]
    return max(complete)[1] if complete else None


def checkpoint_step(folder: Path) -> int | None:
    """The number in checkpoint-NUMBER; None for a folder of another name."""
    name = folder.resolve().name
    number = name.removeprefix("checkpoint-")
    return int(number) if name.startswith("checkpoint-") and number.isdecimal() else None


def checkpoint_state(checkpoint: Path) -> dict | None:
    """What Trainer wrote last into a checkpoint; None where that is missing, cut off or no such thing."""
    try:
        state = json.loads((checkpoint / TRAINER_STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) and isinstance(state.get("global_step"), int) else None


def _trainer_state(folder: Path) -> dict | None:
    last = last_complete_checkpoint(folder)
    states = [state for place in (folder, last) if place is not None and (state := checkpoint_state(place))]
    return max(states, key=lambda state: state.get("global_step", 0), default=None)


def _json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise RunError(f"{path} is damaged: it holds no settings")
    return value


def _config(adapter) -> MoSConfig | None:
    if not isinstance(adapter, dict) or "spaces" not in adapter:
        return None
    try:
        return MoSConfig.from_dict(adapter)
    except (ValueError, TypeError) as error:
        raise RunError(f"the run's adapter configuration cannot be read: {error}") from None


def _flat(adapter) -> dict:
    return {f"adapter.{key}": value for key, value in adapter.items()} if isinstance(adapter, dict) else {}
