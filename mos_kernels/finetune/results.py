"""The output folder of a run: whether it may be written, where a resumed run continues, and the results."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import platform
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

try:
    import resource
except ImportError:  # Windows
    resource = None

from mos_kernels import run_report
from mos_kernels.config import MoSConfig
from mos_kernels.finetune.options import ALIASES, DEFAULTS, FinetuneError, Options
from mos_kernels.finetune.training import RunLog, evaluations
from mos_kernels.huggingface import activated_parameters
from mos_kernels.huggingface.modules import adapter_parameters
from mos_kernels.run_report import log as logs

OWN_FILES = (
    logs.FINETUNE_SETTINGS, logs.FINETUNE_LOG, "metrics.json", "predictions.jsonl", "README.md", *run_report.FILES,
)  # fmt: skip
"""The files that a run writes besides adapter/ and checkpoint-*/. --overwrite removes them."""

NOT_RESUMED = {
    "resume", "overwrite", "no_plots", "output_dir", "disable_tqdm", "use_cpu", "save_total_limit", "report_to",
    "run_name", "push_to_hub", "hub_model_id", "dataloader_num_workers",
}  # fmt: skip
"""Settings that may differ between a run and its resumption."""


def run_settings(options: Options, arguments, config, summary: Mapping) -> dict:
    """The settings of the run in JSON types: options, Trainer's arguments, adapter, data digests.

    Of the arguments, only those are kept that the command has a default for, or that differ from the Trainer's default.
    """
    named, values = {name for name, _ in ALIASES.values()} | DEFAULTS.keys(), arguments.to_dict()
    derived = {"hub_token", "do_eval", "label_names", "data_seed", "logging_dir", "accelerator_config"}
    derived |= {"ddp_find_unused_parameters"}
    changed = {f.name for f in dataclasses.fields(arguments) if f.init and values.get(f.name) not in (f.default, None)}
    kept = {name: values[name] for name in values if name in named | changed and name not in derived}
    adapter = config.to_dict() if isinstance(config, MoSConfig) else config
    settings = {**dataclasses.asdict(options), **kept, "adapter": adapter, "data_files": summary["files"]}
    return json.loads(json.dumps(settings, default=str))


def check_output(options: Options, arguments, settings: Mapping) -> Path | None:
    """The checkpoint to resume from, or None. Makes the folder, and changes nothing in it.

    `FinetuneError` if the folder cannot be written; if it is not empty, and neither --resume nor --overwrite is given;
    if it was not written by a run; or if --resume is given and the settings differ.
    """
    folder, named = Path(arguments.output_dir), arguments.resume_from_checkpoint
    if named and logs.checkpoint_state(Path(named)) is None:
        raise FinetuneError(f"--resume_from_checkpoint {named} is no complete checkpoint of a Trainer")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise FinetuneError(f"--output {folder} cannot be written ({error}): name another folder") from None
    if not any(folder.iterdir()):
        return Path(named) if named else None
    if not options.resume and not options.overwrite:
        raise FinetuneError(f"--output {folder} is not empty: name another folder, or add --resume or --overwrite")
    earlier = None
    with contextlib.suppress(OSError, ValueError, RecursionError):
        earlier = json.loads((folder / logs.FINETUNE_SETTINGS).read_text(encoding="utf-8"))
    if not isinstance(earlier, dict):
        raise FinetuneError(f"{folder} holds no run of this command ({logs.FINETUNE_SETTINGS}): name another folder")
    if options.resume and (differ := _differences(earlier, settings)):
        raise FinetuneError(f"--resume: the settings differ: {differ}. Give the earlier ones, or use --overwrite")
    checkpoint = Path(named) if named else logs.last_complete_checkpoint(folder) if options.resume else None
    if checkpoint is not None:
        _require_whole(checkpoint)
    return checkpoint


def _differences(earlier: Mapping, settings: Mapping) -> str:
    """Each setting that differs. Those of the adapter count one by one, unless the adapter is another method's."""
    if earlier.get("method") != settings["method"]:
        earlier = {**earlier, "adapter": settings["adapter"]}
    elif isinstance(earlier.get("adapter"), dict):
        earlier, settings = ({**found, **found["adapter"], "adapter": None} for found in (earlier, settings))
    names = sorted((earlier.keys() | settings) - NOT_RESUMED)
    changed = [name for name in names if earlier.get(name) != settings.get(name)]
    return "; ".join(f"{name} was {earlier.get(name)!r}, is {settings.get(name)!r}" for name in changed)


def _require_whole(checkpoint: Path) -> None:
    """FinetuneError for weights that are cut off, or without the optimizer's state, which Trainer goes on without."""
    state = logs.checkpoint_state(checkpoint)
    try:
        for path in checkpoint.glob("*.safetensors"):
            safe_open(path, framework="pt").__exit__(None, None, None)
    except (SafetensorError, OSError) as error:
        why = f"{path.name}: {error}"
    else:
        if state["global_step"] >= state.get("max_steps", 0) or any(
            path
            for name in ("optimizer*", "global_step*")
            for path in checkpoint.glob(name)  # the latter: DeepSpeed
        ):
            return
        why = "it has no optimizer's state, as with --save_only_model"
    raise FinetuneError(f"--resume: {checkpoint} is no checkpoint to go on from ({why}): remove it, or use --overwrite")


def open_output(options: Options, arguments, settings: Mapping, checkpoint: Path | None) -> None:
    """Make the folder ready: remove an earlier run (--overwrite), or the checkpoints after the one to resume from."""
    folder, last = Path(arguments.output_dir), logs.checkpoint_step(checkpoint) if checkpoint else 0
    for path in folder.iterdir() if arguments.should_save else ():
        step = logs.checkpoint_step(path)
        if path.name in OWN_FILES and not options.resume:
            path.unlink()
        elif step is not None and step > (last or 0) or path.name == "adapter" and not options.resume:
            shutil.rmtree(path)
    if arguments.should_save:
        logs.write_text(folder / logs.FINETUNE_SETTINGS, json.dumps(settings, indent=2) + "\n")


def print_data(summary: Mapping) -> None:
    rows = ", ".join(f"{name} {count:,}" for name, count in summary["eval_rows"].items())
    print(f"data: {summary['train_rows']:,} rows to train on; to evaluate on: {rows}")
    if "classes" in summary:
        counts = list(summary["train_rows_of_class"].items())
        print("classes: " + ", ".join(f"{name} ({count:,})" for name, count in counts[:50]))
    if summary["eval_rows_also_in_train"]:
        print(f"note: {summary['eval_rows_also_in_train']} evaluation rows are also in the training data")


def parameter_counts(model: nn.Module, head: Sequence[str]) -> dict[str, int]:
    """Numbers of parameters: adapter, head, trained (their sum), and total.

    total includes the base, but not the copy that peft keeps of a head. For MoS there is also activated, the parameters
    of the adapter that a token uses.
    """
    own = {name: p for name, p in model.named_parameters() if ".original_module." not in name}
    trained = sum(p.numel() for p in own.values() if p.requires_grad)
    of_head = [p for name, p in own.items() if any(f".{part}." in f".{name}" for part in head)]
    in_head = sum(p.numel() for p in of_head if p.requires_grad)
    counts = {"adapter": trained - in_head, "head": in_head, "trained": trained}
    counts["total"] = sum(p.numel() for p in own.values())
    return counts | ({"activated": activated_parameters(model).activated} if adapter_parameters(model) else {})


@torch.no_grad()
def generated(trainer, tokenizer, max_new_tokens: int) -> list[str | None]:
    """The answer to each evaluation row's prompt by greedy decoding; None for a row that has no prompt."""
    rows, size = trainer.eval_dataset, trainer.args.per_device_eval_batch_size
    answers: list[str | None] = [None] * len(rows)
    if max_new_tokens == 0 or trainer.args.world_size > 1:
        return answers
    prompts = [_prompt(row, tokenizer) for row in rows]
    asked = sorted((i for i, prompt in enumerate(prompts) if prompt), key=lambda i: len(prompts[i]))
    trainer.model.eval()
    for some in (asked[start : start + size] for start in range(0, len(asked), size)):
        batch = tokenizer.pad({"input_ids": [prompts[i] for i in some]}, padding_side="left", return_tensors="pt")
        with trainer.autocast_smart_context_manager():
            tokens = trainer.model.generate(
                **batch.to(trainer.args.device), max_new_tokens=max_new_tokens, do_sample=False,
                pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
        texts = tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, text in zip(some, texts, strict=True):
            answers[i] = text
    return answers


def _prompt(row: Mapping, tokenizer) -> list[int] | None:
    if "completion" in row:
        learned = row.get("completion_mask") or [label != -100 for label in row["labels"]]  # TRL 1.2 has the mask
        return row["input_ids"][: learned.index(True)]
    if "messages" in row and row["messages"][-1]["role"] == "assistant":
        turns = {"add_generation_prompt": True, "return_dict": True, "tools": row.get("tools")}
        return tokenizer.apply_chat_template(row["messages"][:-1], **turns)["input_ids"]
    return None


def _predictions(trainer, tokenizer, classes: Sequence[str] | None, answers: Sequence[str | None]) -> str:
    """A JSON line for each evaluation row, in order: its data and the model's prediction."""
    lines = []
    for row, output, answer in zip(trainer.eval_dataset, trainer.outputs, answers, strict=True):
        line = {key: row[key] for key in ("file", "text", "prompt", "completion", "messages") if key in row}
        line = {k: v.removesuffix(tokenizer.eos_token or "") if isinstance(v, str) else v for k, v in line.items()}
        if classes is not None:
            line |= {"target": classes[row["labels"]], "predicted": classes[output.argmax()], "logits": output.tolist()}
        else:
            loss = float(output[0] / output[1]) if output[1] else None  # TRL 1.2 keeps rows without a loss
            line |= {"loss": loss, "tokens": int(output[1]), "exact_match": bool(output[2])}
            line |= {} if answer is None else {"generated": answer}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return "".join(lines)


def write_results(options: Options, trainer, config, names, head, settings, summary, log: RunLog) -> None:
    """Write adapter/, predictions.jsonl, metrics.json (which marks a complete run) and the report, each atomically."""
    folder, device = Path(trainer.args.output_dir), trainer.args.device
    half, classes = folder / ".adapter", summary.get("classes")
    if trainer.args.should_save:
        shutil.rmtree(half, ignore_errors=True)
    trainer.save_model(str(half), _internal_call=True)
    answers = generated(trainer, trainer.processing_class, options.max_new_tokens if classes is None else 0)
    if not trainer.args.should_save:
        return
    (half / "training_args.bin").unlink(missing_ok=True)  # a pickle that loading an adapter does not need
    shutil.rmtree(folder / "adapter", ignore_errors=True)
    half.rename(folder / "adapter")
    logs.write_text(folder / "predictions.jsonl", _predictions(trainer, trainer.processing_class, classes, answers))
    memory = {}
    if resource is not None:
        unit = 2**20 if sys.platform == "darwin" else 2**10
        memory["peak_rss_mib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)
    if device.type == "cuda":
        memory["peak_cuda_mib"] = round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    versions = {"python": platform.python_version()}
    for package in ("mos_kernels", "torch", "transformers", "peft", "accelerate", "datasets", "trl", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    if trainer.args.auto_find_batch_size:
        settings = {**settings, "per_device_train_batch_size": trainer.state.train_batch_size}
    found, evaluating = evaluations(log.entries), sum(entry.get("eval_runtime", 0.0) for entry in log.entries)
    metrics = {
        "final": found[-1], "evaluations": found, "data": summary, "parameters": parameter_counts(trainer.model, head),
        "settings": {**settings, "adapter": config.to_dict() if isinstance(config, MoSConfig) else config},
        "linears": names, "steps": trainer.state.global_step, "memory": memory, "routing": trainer.routing,
        "seconds": {"total": round(log.seconds, 3), "evaluation": round(evaluating, 3)}, "versions": versions,
        "machine": {"device": str(device), "threads": torch.get_num_threads(), "platform": platform.platform()},
    }  # fmt: skip
    logs.write_text(folder / "metrics.json", json.dumps(metrics, indent=2, default=str) + "\n")
    print(f"{metrics['steps']} steps in {log.seconds:.0f} s, of which evaluation took {evaluating:.0f} s")
    print(f"written: {folder / 'adapter'}, and beside it metrics.json, predictions.jsonl and log.jsonl")
    if not options.no_plots:
        run_report.run(folder)
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
