"""`python -m mos_kernels export-lora`: the plain LoRA nearest to a saved adapter, fitted on rows of a text file."""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

import torch
from transformers import DataCollatorWithPadding

from mos_kernels.finetune import data
from mos_kernels.finetune import model as models
from mos_kernels.huggingface import files
from mos_kernels.huggingface.export_lora import ExportReport, check_arguments, export_lora
from mos_kernels.huggingface.files import load_adapter

HEADS = ("score.weight", "classifier.weight", "classifier.out_proj.weight")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to `parser`."""
    parser.description = (
        "Write the plain LoRA nearest to a Mixture-of-Space adapter on rows of a text file, as a peft LoRA folder that "
        "merges and serves anywhere, and say what it loses."
    )
    parser.add_argument("--model", required=True, help="the base model: a local folder, or a model id on the hub")
    parser.add_argument("--adapter", required=True, type=Path, help="folder of save_adapter, finetune or peft")
    parser.add_argument("--output", required=True, type=Path, help="folder for the LoRA, not there yet")
    parser.add_argument("--rank", type=int, help="default: with as many parameters as the adapter")
    source = parser.add_argument_group("calibration data", "TSV (no quoting), CSV, JSONL or JSON, as for finetune")
    source.add_argument("--data-file", nargs="+", required=True, type=Path, help="rows like those of the task")
    source.add_argument("--eval-file", nargs="+", type=Path, help="rows for the report (default: the calibration's)")
    source.add_argument("--rows", type=int, default=1024, help="of each, drawn at random where it has more (1024)")
    source.add_argument("--column-names", type=lambda names: names.split(","), help="of files without a header row")
    source.add_argument("--text-column", nargs="+", required=True, help="two are read as a pair by a classifier")
    source.add_argument("--text-join", choices=("pair", "space"), help="several text columns (default pair for two)")
    source.add_argument("--label-column", help="of a classifier: the report then has the accuracy")
    source.add_argument("--rename-label", nargs="+", default=[], metavar="OLD=NEW", help="count the label OLD as NEW")
    source.add_argument("--target-column", help="of a decoder: the completion after the text")
    source.add_argument("--separator", default="\n", help="between text and completion (default a newline)")
    source.add_argument("--max-length", type=int, help="in tokens (default: the model's, at most 512)")
    source.add_argument("--batch-size", type=int, default=16, help="default 16")
    running = parser.add_argument_group("running")
    running.add_argument("--at-once", type=int, help="linears fitted in a pass over the data (default: a tenth)")
    running.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the base")
    running.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")


def run(args: argparse.Namespace) -> int:
    """The command. Returns 0, or 2 after an error of the user's (said on stderr)."""
    try:
        report = _export(args)
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report)
    print(f"\n{args.output}: load it with peft's PeftModel.from_pretrained, merge it with merge_and_unload()")
    return 0


def _export(args: argparse.Namespace) -> ExportReport:
    check_arguments(args.output, args.rank, args.at_once)
    for name in ("rows", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    is_classifier, classes = _task(args.adapter)
    if args.label_column and not is_classifier:
        raise ValueError("--label-column is a classifier's, and the adapter is a decoder's: name --target-column")
    if args.target_column and is_classifier:
        raise ValueError("--target-column is a decoder's, and the adapter is a classifier's: name --label-column")
    calibration = _rows(args, args.data_file)
    evaluation = _rows(args, args.eval_file) if args.eval_file else None
    names = None
    if args.label_column:
        names = data.class_names(calibration["targets"], {"--eval-file": evaluation["targets"]} if evaluation else {})
        if classes is not None and classes != len(names):
            raise ValueError(f"the adapter's head has {classes} classes, and column {args.label_column!r} {names}")

    models.check_model_source(args.model)
    tokenizer, config = models.load_tokenizer(args.model)
    length = args.max_length or min(512, models.longest_input(tokenizer, config))
    heads = (names or [str(i) for i in range(classes or config.num_labels)]) if is_classifier else None
    model, _ = models.load_model(args.model, heads, tokenizer, getattr(torch, args.dtype), seed=0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device if args.device == "auto" else args.device).eval()
    load_adapter(model, args.adapter)

    def batches(part: dict) -> list[dict]:
        return _batches(args, part, tokenizer, length, is_classifier, names)

    return export_lora(
        model, batches(calibration), args.output, args.rank, at_once=args.at_once,
        evaluation_batches=None if evaluation is None else batches(evaluation),
    )  # fmt: skip


def _task(folder: Path) -> tuple[bool, int | None]:
    """Whether the adapter is a classifier's, and the number of its classes where the head was saved with it."""
    files.refuse_damaged(folder)
    config = json.loads((folder / files.CONFIG_NAME).read_text(encoding="utf-8"))
    kind = (config.get("auto_mapping") or {}).get("base_model_class") or ""
    tensors = files.read_tensors(folder / files.WEIGHTS_NAME)
    head = next((tensor for name, tensor in tensors.items() if f".{name}".endswith(HEADS)), None)
    is_classifier = config.get("task_type") == "SEQ_CLS" or kind.endswith("ForSequenceClassification")
    return is_classifier, head.shape[0] if is_classifier and head is not None else None


def _rows(args: argparse.Namespace, paths: list[Path]) -> dict:
    """{"texts", "targets"} of the files' rows, `--rows` of them."""
    rows = [row for path in paths for row in data.read_rows(path, args.column_names)]
    if len(rows) > args.rows:
        rows = [rows[i] for i in sorted(random.Random(0).sample(range(len(rows)), args.rows))]
    source = ", ".join(map(str, paths))
    targets = None
    if args.label_column:
        renames = dict(_rename(option) for option in args.rename_label)
        targets = data.labels(rows, args.label_column, source, renames)
    elif args.target_column:
        targets = [target for (target,) in data.texts(rows, [args.target_column], source)]
    return {"texts": data.texts(rows, args.text_column, source), "targets": targets}


def _rename(option: str) -> tuple[str, str]:
    old, _, new = option.partition("=")
    if not old or not new:
        raise ValueError(f"--rename-label {option!r} is not OLD=NEW")
    return old, new


def _batches(args, part: dict, tokenizer, length: int, is_classifier: bool, names: list[str] | None) -> list[dict]:
    texts, targets = part["texts"], part["targets"]
    if is_classifier:
        index = [0] * len(texts) if targets is None else [names.index(target) for target in targets]
        pair = len(args.text_column) == 2 and args.text_join != "space"
        examples, _ = data.encode_classification(tokenizer, texts, index, length, pair)
        collate = DataCollatorWithPadding(tokenizer)
        if targets is None:
            for example in examples:
                del example["labels"]
    else:
        prompts = [" ".join(text) for text in texts]
        examples, _ = data.encode_causal(tokenizer, prompts, targets, length, args.separator)
        collate = data.CausalCollator(tokenizer.pad_token_id)
    examples.sort(key=lambda example: len(example["input_ids"]))
    return [collate(examples[i : i + args.batch_size]) for i in range(0, len(examples), args.batch_size)]
