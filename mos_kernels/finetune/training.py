"""The Trainers of `python -m mos_kernels finetune`: exact metrics, a log that survives, only finite numbers saved."""

from __future__ import annotations

import contextlib
import math
import re
import time
import types
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from scipy.special import log_softmax
from sklearn.metrics import accuracy_score, matthews_corrcoef
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import LengthGroupedSampler, get_length_grouped_indices

from mos_kernels.huggingface.callback import MoSCallback
from mos_kernels.huggingface.modules import mos_adapters
from mos_kernels.huggingface.routing_report import measured_routing
from mos_kernels.run_report.log import TIMINGS, append_line, complete_lines, write_lines


class FinetuneTrainer(Trainer):
    """A Trainer that keeps results of the latest evaluation.

    outputs: the logits of each row, or its sums (`CausalTrainer`). routing: the summary of each router.
    """

    outputs, routing = None, None

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        bad = [n for n, p in self.model.named_parameters() if p.requires_grad and not p.isfinite().all()]
        if bad:
            raise FloatingPointError(
                f"{len(bad)} of the trained parameters, such as {bad[0]}, are not finite at step "
                f"{self.state.global_step}, and are not saved: lower --learning-rate, or train with --dtype float32"
            )
        super()._save(output_dir, state_dict)

    def get_decay_parameter_names(self, model) -> list[str]:
        """Only matrices decay. The routers and the curvature of MoS adapters do not."""
        matrices = {name for name, parameter in model.named_parameters() if parameter.dim() > 1}
        names = [name for name in super().get_decay_parameter_names(model) if name in matrices]
        return [name for name in names if "mos_router" not in name and "mos_curvature" not in name]

    def _get_train_sampler(self, train_dataset=None):
        sampler = super()._get_train_sampler(train_dataset)
        if not isinstance(sampler, LengthGroupedSampler):
            return sampler
        return _LengthGrouped(sampler.batch_size, lengths=sampler.lengths, seed=self.args.data_seed)

    def _get_eval_sampler(self, eval_dataset):
        return SequentialSampler(eval_dataset)  # predictions.jsonl and the metrics of each file need the data's order

    def get_eval_dataloader(self, *args, **kwargs):
        before, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False  # only of the training data
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.args.dataloader_drop_last = before

    def evaluation_loop(self, *args, **kwargs):
        with measured_routing(self.model) if mos_adapters(self.model) else contextlib.nullcontext({}) as statistics:
            output = super().evaluation_loop(*args, **kwargs)
        self.outputs = output.predictions
        self.routing = {_plain_name(name): measured.summary() for name, measured in statistics.items()}
        output.metrics["eval_loss"] = output.metrics.pop("eval_exact_loss")  # the mean over rows or tokens, not batches
        return output


class ClassifierTrainer(FinetuneTrainer):
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        # classifiers accept num_items_in_batch and ignore it: Trainer must divide by the accumulation steps itself
        self.model_accepts_loss_kwargs = False


def causal_trainer() -> type[FinetuneTrainer]:
    """TRL's SFTTrainer, evaluating row by row. A function, since only causal language models need TRL."""
    from trl import SFTTrainer
    from trl.trainer import sft_trainer

    # TRL 1.15 and later. Its head never holds the logits of a whole batch; `_scored`, for earlier ones, does.
    is_fused = hasattr(sft_trainer, "add_fused_lm_head")

    class CausalTrainer(FinetuneTrainer, SFTTrainer):
        def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
            """The predictions are (rows, 3): the summed loss in nats, the tokens with a loss, 1 if all are top-1."""
            inputs = self._prepare_inputs(inputs)
            with torch.no_grad(), self.compute_loss_context_manager():
                found = model(**inputs, fused_lm_head=True) if is_fused else _scored(model, **inputs)
            kept = found.label_mask
            if "attention_mask" in inputs:
                row = torch.arange(len(kept), device=kept.device).unsqueeze(-1).expand_as(kept)
            else:  # several rows in one sequence; the positions of each begin at 0
                row = (inputs["position_ids"][:, 1:] == 0).cumsum(-1)
            values = torch.stack([-found.log_probs, kept, kept & ~found.is_top1.bool()], -1).float().flatten(0, 1)
            sums = values.new_zeros(int(row.max()) + 1, 3).index_add_(0, row.flatten(), values)
            sums[:, 2] = sums[:, 2] == 0
            return found.loss, sums, sums[:, :1]

    return CausalTrainer


def _scored(model, labels: torch.Tensor, **inputs) -> types.SimpleNamespace:
    """As TRL's fused head: of each label, (B, T - 1), the log-probability and whether it is top-1; and the loss."""
    logits, labels = model(**inputs).logits[:, :-1], labels[:, 1:]
    kept = labels != -100
    log_probs = torch.zeros(labels.shape, dtype=torch.float32, device=labels.device)
    for row, mask in enumerate(kept):  # row by row, since float32 logits of a large vocabulary take much memory
        chosen = logits[row, mask].float().log_softmax(-1)
        log_probs[row, mask] = chosen.gather(-1, labels[row, mask].unsqueeze(-1)).squeeze(-1)
    is_top1 = (logits.argmax(-1) == labels) & kept
    loss = -log_probs.sum() / kept.sum().clamp(min=1)
    return types.SimpleNamespace(loss=loss, label_mask=kept, log_probs=log_probs, is_top1=is_top1)


class _LengthGrouped(LengthGroupedSampler):
    """transformers' sampler, whose order depends only on seed and epoch, and not on the global generator."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths)
        self._seed, self._epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __iter__(self):
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))


# metrics


def classification_scores(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """logits (N, C), labels (N,) -> exact_loss (mean cross entropy in nats), accuracy, matthews_correlation."""
    predicted = logits.argmax(-1)
    losses = -log_softmax(logits.astype(np.float64), axis=-1)[np.arange(len(labels)), labels]
    scores = {
        "accuracy": accuracy_score(labels, predicted),
        "matthews_correlation": matthews_corrcoef(labels, predicted),
    }
    return {"exact_loss": float(losses.mean()), **{name: float(value) for name, value in scores.items()}}


def causal_scores(sums: np.ndarray, labels=None) -> dict[str, float]:
    """sums (N, 3) of `CausalTrainer` -> exact_loss (nats a token), perplexity, exact_match (share of the rows)."""
    loss = float(sums[:, 0].sum(dtype=np.float64) / sums[:, 1].sum(dtype=np.float64))
    return {"exact_loss": loss, "perplexity": math.exp(min(loss, 700.0)), "exact_match": float(sums[:, 2].mean())}


SCORES = {
    "classification": ("loss", "accuracy", "matthews_correlation"),
    "causal-lm": ("loss", "perplexity", "exact_match"),
}
"""The metrics of an evaluation, as a Trainer names them."""


def scorer(score, files: list[str]):
    """compute_metrics for Trainer: `score` over all rows, and over the rows of each file as "name/metric"."""

    def compute(prediction) -> dict[str, float]:
        outputs, labels, of_row = np.asarray(prediction.predictions), np.asarray(prediction.label_ids), np.array(files)
        metrics = score(outputs, labels)
        for name in dict.fromkeys(files) if len(set(files)) > 1 else ():
            part = score(outputs[of_row == name], labels[of_row == name])
            metrics |= {f"{name}/{key.removeprefix('exact_')}": value for key, value in part.items()}
        return metrics

    return compute


def evaluations(entries: list[dict]) -> list[dict]:
    """The evaluations in a log: step, epoch, the metrics over all rows, and under "files" those of each file."""
    result = []
    for entry in entries:
        if "eval_loss" not in entry:
            continue
        record: dict = {"step": entry["step"], "epoch": entry.get("epoch"), "seconds": entry["seconds"]}
        for key, value in entry.items():
            name, slash, metric = key.removeprefix("eval_").rpartition("/")
            if key.startswith("eval_") and metric not in TIMINGS:
                (record.setdefault("files", {}).setdefault(name, {}) if slash else record)[metric] = value
        result.append(record)
    return result


# log


def _plain_name(name: str) -> str:
    """The name of a linear or router in the base model, without the parts that peft adds."""
    return re.sub(r"^base_model\.model\.|\.mos_adapter\.default$|(?<=\.mos_router)\.default$", "", name)


class RunLog(TrainerCallback):
    """Writes log.jsonl: an entry for every log and evaluation.

    Each entry has the seconds of training so far, summed over interrupted parts of the run. With `mos`, a callback that
    must come before this one, it also has the curvature and share of each expert. A loss that is not finite ends the
    run. Evaluations are printed, and about ten losses if there is no progress bar.
    """

    def __init__(self, path: Path | None, first: Mapping, mos: MoSCallback | None, resume_step: int | None) -> None:
        """path: None in a process that does not write. resume_step: continue after it; later entries are dropped."""
        self.path, self.mos, self.entries, self._shown = path, mos, [], 0
        if resume_step is not None and path and path.is_file():
            self.entries = [entry for entry in complete_lines(path) if entry["step"] <= resume_step]
        self._started = time.perf_counter() - (self.entries[-1]["seconds"] if self.entries else 0.0)
        if path:
            write_lines(path, self.entries)
        if not self.entries:
            self._write({"step": 0, **first})

    @property
    def seconds(self) -> float:
        """Seconds of the run so far, without the time between an interruption and its resumption."""
        return time.perf_counter() - self._started

    def on_train_begin(self, args, state, control, **kwargs):
        """Drop the entries of an attempt that ran out of memory (auto_find_batch_size)."""
        kept = [entry for entry in self.entries if entry["step"] <= state.global_step]
        if len(kept) < len(self.entries):
            self.entries, self._shown = kept, 0
            if self.path:
                write_lines(self.path, kept)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "train_runtime" in logs:  # Trainer's summary knows nothing of the parts before an interruption
            return
        entry = {"step": state.global_step, **{k: v.item() if hasattr(v, "item") else v for k, v in logs.items()}}
        for name, what in (("loss", "training"), ("eval_loss", "evaluation")):
            if not math.isfinite(entry.get(name, 0.0)):
                raise FloatingPointError(
                    f"the {what} loss is {entry[name]} at step {state.global_step}: lower --learning-rate, or train "
                    "with --dtype float32"
                )
        if "loss" in entry and self.mos is not None:
            for key in ("curvature", "share", "entropy"):
                entry[key] = {_plain_name(name): value for name, value in self.mos.history[-1][key].items()}
        last = self.entries[-1]
        is_second = "eval_loss" in entry and "eval_loss" in last and last["step"] == entry["step"]
        if is_second:  # it replaces an earlier evaluation at the same step
            self.entries.pop()
        self._write(entry, anew=is_second)
        if "eval_loss" in entry or (args.disable_tqdm and state.global_step - self._shown >= state.max_steps / 10):
            self._shown = state.global_step
            names = [k for k in entry if k == "loss" or k.startswith("eval_") and "/" not in k and k[5:] not in TIMINGS]
            values = "  ".join(f"{k.removeprefix('eval_').replace('_', ' ')} {entry[k]:.4f}" for k in names)
            what = "evaluation" if "eval_loss" in entry else "training"
            print(
                f"step {entry['step']}/{state.max_steps} (epoch {state.epoch or 0:.2f}), {what}:  {values}", flush=True
            )

    def _write(self, entry: Mapping, anew: bool = False) -> None:
        self.entries.append({**entry, "seconds": round(self.seconds, 3)})
        if self.path and anew:
            write_lines(self.path, self.entries)
        elif self.path:
            append_line(self.path, self.entries[-1])
