"""The Trainer of `python -m mos_kernels finetune`: small, complete checkpoints, a log that survives, exact metrics."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.utils.data import SequentialSampler
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_pt_utils import LengthGroupedSampler, get_length_grouped_indices

from mos_kernels.finetune.adalora import RankAllocation
from mos_kernels.huggingface.callback import MoSCallback
from mos_kernels.huggingface.routing_report import measured_routing
from mos_kernels.run_report.log import TIMINGS, append_line, checkpoint_step, complete_lines, write_lines

TRAINED = "trained.safetensors"


class FinetuneTrainer(Trainer):
    """Checkpoints hold the trained parameters alone; every log entry also goes to `run_log`.

    Of the latest evaluation, `outputs` are the rows' logits (classification) or `causal_sums`, and `routing` maps each
    router to its `RouterStatistics.summary`. With `is_mos`, the log has each expert's curvature and share too.
    """

    def __init__(
        self,
        *args,
        run_log: RunLog,
        is_mos: bool,
        is_classifier: bool,
        rank_allocation: RankAllocation | None = None,
        **kwargs,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.rank_allocation = rank_allocation
        if rank_allocation is not None:
            self.add_callback(rank_allocation)
        if is_classifier:
            # Classifiers take num_items_in_batch and drop it: Trainer must divide by the accumulation steps itself
            self.model_accepts_loss_kwargs = False
        self.run_log, self.routing, self.outputs = run_log, None, None
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self.add_callback(_Lines if self.args.disable_tqdm else _Progress)
        # this log has all that the callback's own file would
        self.mos_callback = MoSCallback.add_to(self, MoSCallback(history_file=None)) if is_mos else None

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        os.makedirs(output_dir, exist_ok=True)
        save_file(trained_parameters(self.model), os.path.join(output_dir, TRAINED))
        if self.rank_allocation is not None:
            self.rank_allocation.save(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        load_trained_parameters(self.model, os.path.join(resume_from_checkpoint, TRAINED))
        if self.rank_allocation is not None:
            self.rank_allocation.load(resume_from_checkpoint)

    def _get_train_sampler(self, train_dataset=None):
        sampler = super()._get_train_sampler(train_dataset)
        if not isinstance(sampler, LengthGroupedSampler):
            return sampler
        return _LengthGrouped(sampler.batch_size, lengths=sampler.lengths, seed=self.args.data_seed)

    def _get_eval_sampler(self, eval_dataset):
        return SequentialSampler(eval_dataset)  # each file's metrics and predictions.jsonl count on the data's order

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        super().log(logs, *args, **kwargs)
        if "train_runtime" in logs:  # Trainer's summary, which knows nothing of an interrupted part
            return
        entry = {"step": self.state.global_step, **{key: _plain(value) for key, value in logs.items()}}
        if "loss" in logs:
            if not math.isfinite(entry["loss"]):
                raise FloatingPointError(
                    f"the training loss is {entry['loss']} at step {self.state.global_step}: lower --learning-rate, or "
                    "train with --dtype float32"
                )
            if self.mos_callback is not None:
                measured = self.mos_callback.history[-1]
                entry |= {key: measured[key] for key in ("curvature", "share", "entropy")}
        self.run_log.write(entry)

    def evaluation_loop(self, *args, **kwargs):
        with measured_routing(self.model) if self.mos_callback else contextlib.nullcontext({}) as statistics:
            output = super().evaluation_loop(*args, **kwargs)
        self.outputs = output.predictions
        self.routing = {name: measured.summary() for name, measured in statistics.items()}
        prefix = kwargs.get("metric_key_prefix", "eval")
        exact = f"{prefix}_exact_loss"  # over all rows or tokens, where Trainer averages over batches
        if exact in output.metrics:
            output.metrics[f"{prefix}_loss"] = output.metrics.pop(exact)
        return output


class _LengthGrouped(LengthGroupedSampler):
    """transformers' sampler draws from the global generator: here an epoch's order depends on seed and epoch alone."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths)
        self._seed, self._epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __iter__(self):
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))


# checkpoints


def trained_parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The parameters that take gradients, by name, on the CPU."""
    return {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}


def load_trained_parameters(model: torch.nn.Module, path: str | Path) -> None:
    """Put a file of `trained_parameters` back. Names that do not match the model's raise `ValueError`."""
    saved = load_file(path)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if saved.keys() != trained.keys():
        raise ValueError(
            f"{path} does not fit this model: {sorted(saved.keys() ^ trained.keys())[:4]} are in one of the two only"
        )
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(saved[name])


def remove_checkpoints_after(folder: Path, step: int) -> None:
    """Remove what an interrupted run left behind: checkpoints after `step`, complete or not."""
    for path in folder.glob("checkpoint-*"):
        found = checkpoint_step(path)
        if found is not None and found > step:
            shutil.rmtree(path)


# log


class RunLog:
    """log.jsonl: an entry for every log and evaluation, with the seconds of training so far, over all resumptions."""

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        """resume_step: continue the file after this step, dropping what was logged beyond the checkpoint."""
        self.path = path
        self.entries: list[dict] = []
        if resume_step is not None and path.is_file():
            self.entries = [entry for entry in complete_lines(path) if entry["step"] <= resume_step]
        write_lines(path, self.entries)
        self._started = time.perf_counter() - (self.entries[-1]["seconds"] if self.entries else 0.0)

    @property
    def seconds(self) -> float:
        """Seconds of the run so far, without the time between an interruption and its resumption."""
        return time.perf_counter() - self._started

    def write(self, entry: Mapping) -> None:
        """Append an entry, adding the seconds. A second evaluation at the same step takes the place of the first."""
        if (
            "eval_loss" in entry
            and self.entries
            and "eval_loss" in self.entries[-1]
            and self.entries[-1]["step"] == entry["step"]
        ):
            self.entries.pop()
            write_lines(self.path, self.entries)
        self.entries.append({**entry, "seconds": round(self.seconds, 3)})
        append_line(self.path, self.entries[-1])


def _plain(value):
    return value.item() if hasattr(value, "item") else value


# metrics


def matthews_correlation(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Matthews correlation of any number of classes (Gorodkin's R_K); 0 where one side is constant."""
    size = int(max(predicted.max(), labels.max())) + 1
    confusion = np.zeros((size, size))
    np.add.at(confusion, (labels, predicted), 1)
    total, right, true, guessed = confusion.sum(), np.trace(confusion), confusion.sum(1), confusion.sum(0)
    spread = (total**2 - (guessed**2).sum()) * (total**2 - (true**2).sum())
    return float((right * total - (true * guessed).sum()) / math.sqrt(spread)) if spread > 0 else 0.0


def classification_scores(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """logits (N, C), labels (N,) -> exact_loss (mean cross entropy in nats), accuracy, matthews_correlation."""
    logits, predicted = logits.astype(np.float64), logits.argmax(-1)
    top = logits.max(-1)
    log_sum = top + np.log(np.exp(logits - top[:, None]).sum(-1))
    return {
        "exact_loss": float((log_sum - logits[np.arange(len(labels)), labels]).mean()),
        "accuracy": float((predicted == labels).mean()),
        "matthews_correlation": matthews_correlation(predicted, labels),
    }


def causal_scores(sums: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """sums (N, 3) of `causal_sums` -> exact_loss (nats a token), perplexity, exact_match (greedy decoding is right)."""
    loss = float(sums[:, 0].sum() / sums[:, 1].sum())
    return {"exact_loss": loss, "perplexity": math.exp(min(loss, 700.0)), "exact_match": float(sums[:, 2].mean())}


def causal_sums(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(N, 3) float64 for a batch: summed loss, number of tokens with a loss, 1 where each is the most likely one.

    The third is what greedy decoding would be scored: it follows the target exactly as long as it is right.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    logits, targets = logits[:, :-1], labels[:, 1:]
    kept = targets != -100
    losses = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2).float(), targets, ignore_index=-100, reduction="none"
    )
    right = ((logits.argmax(-1) == targets) | ~kept).all(-1)
    dtype = torch.float32 if logits.device.type == "mps" else torch.float64
    return torch.stack([losses.to(dtype).sum(-1), kept.sum(-1), right], -1).to(dtype)


def first_logits(logits, labels):
    """The logits of a sequence classifier, whose outputs may carry more."""
    return logits[0] if isinstance(logits, tuple) else logits


def scorer(score: Callable, parts: Mapping[str, int]) -> Callable:
    """compute_metrics for Trainer: `score` over all rows, and over each evaluation file, as "name/metric".

    parts: number of rows of each evaluation file, in their order.
    """

    def compute(prediction) -> dict[str, float]:
        outputs, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
        metrics, start = score(outputs, labels), 0
        for name, rows in parts.items() if len(parts) > 1 else ():
            part = score(outputs[start : start + rows], labels[start : start + rows])
            metrics |= {
                f"{name}/{key.removeprefix('exact_')}" if key == "exact_loss" else f"{name}/{key}": v
                for key, v in part.items()
            }
            start += rows
        return metrics

    return compute


# settings that moved between transformers versions


def training_arguments(**settings) -> transformers.TrainingArguments:
    """TrainingArguments; with `warmup_ratio` and `group_by_length` also where transformers has renamed them."""
    if "warmup_ratio" in settings and not hasattr(transformers.TrainingArguments, "warmup_ratio"):
        settings["warmup_steps"] = settings.pop("warmup_ratio")
    if "group_by_length" in settings and not hasattr(transformers.TrainingArguments, "group_by_length"):
        settings["train_sampling_strategy"] = "group_by_length" if settings.pop("group_by_length") else "random"
    return transformers.TrainingArguments(**settings)


# progress


class _Progress(ProgressCallback):
    """One progress bar, with the loss on it and a line for each evaluation."""

    def on_prediction_step(self, args, state, control, **kwargs):
        pass

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.4f}")

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        super().on_evaluate(args, state, control, **kwargs)
        if self.training_bar is not None and metrics:
            self.training_bar.write(evaluation_line(state, metrics))


class _Lines(PrinterCallback):
    """A line for each evaluation, and for about every tenth of the training: for logs and pipes."""

    _shown = 0

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs and state.global_step - self._shown >= state.max_steps / 10:
            self._shown = state.global_step
            print(
                f"step {state.global_step}/{state.max_steps} (epoch {state.epoch or 0:.2f}):  "
                f"training loss {logs['loss']:.4f}",
                flush=True,
            )

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        print(evaluation_line(state, metrics), flush=True)


def evaluation_line(state, metrics: Mapping[str, float]) -> str:
    """One line for an evaluation: step, and each pooled metric."""
    shown = {
        key.removeprefix("eval_"): value for key, value in metrics.items() if key.startswith("eval_") and "/" not in key
    }
    values = "  ".join(f"{key.replace('_', ' ')} {value:.4f}" for key, value in shown.items() if key not in TIMINGS)
    return f"step {state.global_step} (epoch {state.epoch or 0:.2f}):  {values}"


def evaluations(entries: Sequence[Mapping]) -> list[dict]:
    """The evaluations in a log: step, epoch, pooled metrics, and under "files" each file's."""
    result = []
    for entry in entries:
        if "eval_loss" not in entry:
            continue
        record: dict = {"step": entry["step"], "epoch": entry.get("epoch"), "seconds": entry["seconds"]}
        for key, value in entry.items():
            name, slash, metric = key.removeprefix("eval_").rpartition("/")
            if not key.startswith("eval_") or metric in TIMINGS:
                continue
            (record.setdefault("files", {}).setdefault(name, {}) if slash else record)[metric] = value
        result.append(record)
    return result
