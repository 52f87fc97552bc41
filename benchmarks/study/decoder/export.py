"""What export_lora loses: the adapters that runs left, exported on training problems, scored on the test's."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.study import rows
from benchmarks.study.decoder.plan import Cell
from benchmarks.study.decoder.runner import NEW_TOKENS, RESULTS, Place, about, versions

EXPORTS = RESULTS.with_name("decoder_export.jsonl")
MATCHED = 41
"""The rank at which a LoRA has as many parameters as the mixture on SmolLM2."""


@dataclass(frozen=True)
class Settings:
    """problems: how many of the training's are drawn to fit on. draw: the seed of that. steps: of distillation."""

    rank: int = MATCHED
    problems: int = 512
    draw: int = 0
    steps: int = 0
    learning_rate: float = 1e-4

    def __str__(self) -> str:
        text = f"exported at rank {self.rank} on {self.problems} problems"
        text += f", draw {self.draw}" if self.draw else ""
        return text + (f", distilled {self.steps} steps at {self.learning_rate:g}" if self.steps else "")


def key_of(cell: Cell, settings: Settings) -> str:
    from benchmarks.study.decoder.model import ATTENTION

    return f"{cell.key} {settings}, {ATTENTION} attention"


def export(cell: Cell, place: Place, settings: Settings, mixture: dict | None = None, batch_size: int = 16) -> dict:
    """Export the adapter of a finished run; its row: KL and agreement on the true equations, and what it solves.

    mixture: its scores by this code, where they are known. Those of the run may be another attention's, whose roundings
    alone change the answers to some of the problems.
    """
    import torch
    from peft import PeftModel

    from benchmarks.study.decoder.model import load
    from benchmarks.study.decoder.problems import DATASETS
    from benchmarks.study.decoder.training import encode, evaluate, with_labels
    from mos_kernels.huggingface import export_lora

    data = DATASETS[cell.dataset](place.data)
    model, tokenizer = load(place.model)
    model = PeftModel.from_pretrained(model, place.outputs / cell.folder)

    def batches(chosen: Sequence) -> list[dict]:
        examples = sorted((encode(tokenizer, p) for p in chosen), key=lambda e: len(e["prompt"]))
        parts = [examples[i : i + batch_size] for i in range(0, len(examples), batch_size)]
        return [with_labels(part, tokenizer.pad_token_id) for part in parts]

    if mixture is None:
        found = evaluate(model, tokenizer, data.test, NEW_TOKENS)
        mixture = {name: found[name] for name in ("solved", "right", "nll_per_token", "nll", "answers")}
    drawn = random.Random(settings.draw).sample(data.train, settings.problems)
    folder = place.outputs / f"{cell.folder} {settings}".replace(" ", "-").replace(",", "")
    start = time.process_time()
    report = export_lora(
        model, batches(drawn), folder, settings.rank, evaluation_batches=batches(data.test),
        distill_steps=settings.steps, learning_rate=settings.learning_rate,
    )  # fmt: skip
    seconds = time.process_time() - start
    del model
    gc.collect()
    lora = PeftModel.from_pretrained(load(place.model)[0], folder)
    scores = evaluate(lora, tokenizer, data.test, NEW_TOKENS)
    errors = sorted(error for error in report.linears.values() if error is not None)
    return {
        "key": key_of(cell, settings), "of": cell.key, **asdict(settings), "mixture": mixture,
        "distilled_kl": report.distilled_kl,
        "tokens": report.tokens, "passes": report.passes, "parameters": report.parameters[1],
        "error": report.error, "error_quartiles": [round(errors[len(errors) * q // 4], 4) for q in (1, 2, 3)],
        "largest_error": errors[-1], "kl": report.kl, "agreement": report.agreement, "positions": report.positions,
        "loss": report.loss, "accuracy": report.accuracy, "cpu_seconds": round(seconds, 1), **scores,
        "eval_rows": len(data.test), "commit": place.commit, "date": time.strftime("%Y-%m-%d"),
        "machine": about(torch), "versions": versions(),
    }  # fmt: skip


def run_all(planned: Sequence[Cell], place: Place, path: Path, exports: Path, settings: Settings) -> int:
    """Export the mixtures among the cells that have a row and an adapter, those that have no export yet."""
    finished = {row["key"]: row for row in rows.read(path) if row["failure"] is None}
    exported = rows.read(exports)
    for cell in planned:
        adapter = place.outputs / cell.folder / "adapter_model.safetensors"
        if not cell.entry.method.startswith("MoS") or cell.key not in finished or not adapter.is_file():
            continue
        if any(row["key"] == key_of(cell, settings) for row in exported):
            continue
        scored = (row["mixture"] for row in exported if row["of"] == cell.key and row["commit"] == place.commit)
        row = export(cell, place, settings, next(scored, None))
        exported.append(row)
        with rows.only_writer(exports):
            rows.append(exports, row)
        print(
            f"{row['key']}: the mixture solves {row['mixture']['solved']} of {row['eval_rows']}, the LoRA "
            f"{row['solved']}; KL {row['kl']:.4g}, agreement {row['agreement']:.3f}, error {row['error']:.3g}",
            flush=True,
        )
    return 0
