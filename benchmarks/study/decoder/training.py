"""Training and scoring of a decoder on word problems: the loss of the equation alone, greedy decoding."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices

from benchmarks.study.decoder.problems import Problem, solves
from benchmarks.study.hmora import PROMPT_MASK
from mos_kernels.huggingface import MoSCallback, last_complete_checkpoint, mos_param_groups
from mos_kernels.huggingface.modules import mos_adapters
from mos_kernels.run_report.log import write_text

IGNORED = -100
TIMES = "times.json"


def prompt_of(problem: Problem) -> str:
    return f"{problem.text}\nEquation:"


def encode(tokenizer, problem: Problem) -> dict[str, list[int]]:
    """Tokens of the prompt, and of the equation with the token that ends it."""
    equation = tokenizer(f" {problem.equation}", add_special_tokens=False).input_ids
    return {"prompt": tokenizer(prompt_of(problem)).input_ids, "equation": [*equation, tokenizer.eos_token_id]}


def collate(examples: Sequence[dict], pad: int) -> dict[str, Tensor]:
    """A batch whose sequences end together, so that its equations are the last tokens: the loss needs no other logits.

    labels (B, L): of the last L tokens alone, L the longest equation; IGNORED on the prompt.
    """
    width = max(len(e["prompt"]) + len(e["equation"]) for e in examples)
    answer = max(len(e["equation"]) for e in examples)
    ids, mask, labels = [], [], []
    for example in examples:
        tokens = example["prompt"] + example["equation"]
        ids.append([pad] * (width - len(tokens)) + tokens)
        mask.append([0] * (width - len(tokens)) + [1] * len(tokens))
        labels.append([IGNORED] * (answer - len(example["equation"])) + example["equation"])
    mask = torch.tensor(mask)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    batch = {"input_ids": torch.tensor(ids), "attention_mask": mask, "position_ids": positions}
    return batch | {"labels": torch.tensor(labels)}


def with_labels(examples: Sequence[dict], pad: int) -> dict[str, Tensor]:
    """The batch of `collate` with labels as wide as the tokens, as transformers' models take them."""
    batch = collate(examples, pad)
    width = batch["input_ids"].shape[1]
    prompt = torch.full((len(examples), width - batch["labels"].shape[1]), IGNORED)
    return batch | {"labels": torch.cat([prompt, batch["labels"]], 1)}


def equation_losses(model: nn.Module, batch: dict[str, Tensor], reduction: str) -> Tensor:
    """Cross entropy in nats: the mean over the equations' tokens, or with "none" (B, L), 0 on the prompt."""
    labels = batch["labels"]
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if hasattr(model, "task_encoder"):  # HMoRA's, which must not see the equation
        inputs[PROMPT_MASK] = inputs["attention_mask"].clone()
        inputs[PROMPT_MASK][:, inputs[PROMPT_MASK].shape[1] - labels.shape[1] :] *= labels == IGNORED
    width, length = inputs["input_ids"].shape[1], labels.shape[1]
    # by index, and not the last L + 1: of a slice the product with 49,152 words copies its weight for each sequence
    before = torch.arange(width - length - 1, width - 1)
    logits = model(**inputs, logits_to_keep=before).logits.flatten(0, 1).float()
    losses = cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, reduction=reduction)
    return losses.view_as(labels) if reduction == "none" else losses


class _Trainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = equation_losses(model, inputs, "mean")
        if hasattr(model, "auxiliary_loss"):
            loss = loss + model.auxiliary_loss()
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the training loss is {loss.item()} at step {self.state.global_step}")
        return (loss, None) if return_outputs else loss

    def _get_train_sampler(self, train_dataset=None):
        lengths = [len(e["prompt"]) + len(e["equation"]) for e in self.train_dataset]
        generator = torch.Generator().manual_seed(self.args.seed)  # the order is every method's
        return get_length_grouped_indices(lengths, self.args.train_batch_size, generator=generator)


class _Times(TrainerCallback):
    """Seconds of the training, and of the processor on it, over all resumptions."""

    def __init__(self, folder: Path) -> None:
        self.path, self.before = folder / TIMES, [0.0, 0.0]

    def on_train_begin(self, args, state, control, **kwargs):
        self.before = json.loads(self.path.read_text())[str(state.global_step)] if state.global_step else [0.0, 0.0]
        self.start = time.perf_counter(), time.process_time()

    def so_far(self) -> list[float]:
        now = time.perf_counter(), time.process_time()
        return [before + b - a for before, a, b in zip(self.before, self.start, now, strict=True)]

    def on_save(self, args, state, control, **kwargs):
        write_text(self.path, json.dumps({state.global_step: self.so_far()}))


@dataclass
class Run:
    failure: str | None
    steps: int
    losses: list[float]
    grad_norms: list[float]
    seconds: float
    cpu: float


def train(
    model: nn.Module,
    examples: list[dict],
    output: Path,
    learning_rate: float,
    seed: int,
    pad: int,
    batch_size: int,
    callbacks: Sequence[TrainerCallback] = (),
    save_steps: int = 20,
    prints: bool = True,
) -> Run:
    """One epoch of AdamW, as the study's other runs: linear decay after a tenth of warm-up, under bfloat16 autocast.

    prints: what Trainer logs at each step.
    """
    times = _Times(output)
    trainer = _Trainer(
        model,
        TrainingArguments(
            output_dir=str(output), num_train_epochs=1, per_device_train_batch_size=batch_size, seed=seed,
            learning_rate=learning_rate, lr_scheduler_type="linear", warmup_steps=0.1, max_grad_norm=1.0,
            bf16=True, use_cpu=True, logging_steps=1, save_steps=save_steps, save_total_limit=1, report_to=[],
            remove_unused_columns=False, disable_tqdm=True,
        ),
        train_dataset=examples,
        data_collator=lambda batch: collate(batch, pad),
        optimizers=(torch.optim.AdamW(mos_param_groups(model, learning_rate)), None),
        callbacks=[times, *callbacks],
    )  # fmt: skip
    if not prints:
        trainer.remove_callback(PrinterCallback)
    if mos_adapters(model):
        MoSCallback.add_to(trainer)
    failure = None
    try:
        trainer.train(resume_from_checkpoint=last_complete_checkpoint(output))
    except FloatingPointError as error:  # a result, and not a mistake
        failure = str(error)
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    norms = [float(entry["grad_norm"]) for entry in log if "grad_norm" in entry]
    losses = [float(entry["loss"]) for entry in log]
    return Run(failure, trainer.state.global_step, losses, norms, *times.so_far())


@torch.no_grad()
def evaluate(model: nn.Module, tokenizer, problems: Sequence[Problem], new_tokens: int, batch_size: int = 32) -> dict:
    """solve_rate; solved: how many; answers: what was written; nll: nats of each true equation, with its tokens."""
    model.eval()
    examples = [encode(tokenizer, problem) for problem in problems]
    order = sorted(range(len(problems)), key=lambda i: len(examples[i]["prompt"]))
    answers, nll = [""] * len(problems), [math.nan] * len(problems)
    with torch.autocast("cpu", torch.bfloat16):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = collate([examples[i] for i in chosen], tokenizer.pad_token_id)
            losses = equation_losses(model, batch, "none").double().sum(-1)
            for i, value in zip(chosen, losses.tolist(), strict=True):
                nll[i] = value
            prompts = collate([{**examples[i], "equation": []} for i in chosen], tokenizer.pad_token_id)
            written = model.generate(
                input_ids=prompts["input_ids"], attention_mask=prompts["attention_mask"], do_sample=False,
                max_new_tokens=new_tokens, pad_token_id=tokenizer.pad_token_id,
            )[:, prompts["input_ids"].shape[1] :]  # fmt: skip
            for i, text in zip(chosen, tokenizer.batch_decode(written, skip_special_tokens=True), strict=True):
                answers[i] = text.strip()
    right = [solves(answer, problem.answer) for answer, problem in zip(answers, problems, strict=True)]
    tokens = sum(len(example["equation"]) for example in examples)
    return {
        "solve_rate": sum(right) / len(right), "solved": sum(right), "right": "".join(str(int(r)) for r in right),
        "nll_per_problem": sum(nll) / len(nll), "nll_per_token": sum(nll) / tokens,
        "nll": [round(value, 3) for value in nll], "answers": answers,
    }  # fmt: skip
