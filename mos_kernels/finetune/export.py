"""`python -m mos_kernels export-lora`: the plain LoRA nearest to a saved adapter, fitted on rows of a text file."""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
)

from mos_kernels.finetune.data import Rows, class_order, column_of, label_of, most_tokens, read_rows, text_of
from mos_kernels.finetune.options import FinetuneError
from mos_kernels.huggingface.base import is_classifier, load_base
from mos_kernels.huggingface.export_lora import IGNORED, ExportReport, check_arguments, export_lora
from mos_kernels.huggingface.files import load_adapter
from mos_kernels.huggingface.modules import mos_modules


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = argparse.ArgumentParser(
        prog="python -m mos_kernels export-lora",
        description="Write the plain LoRA that is nearest to a Mixture-of-Space adapter on rows of a text file, and "
        "report what it loses. The output is a LoRA folder of peft, which can be merged, and served anywhere.",
    )
    made.add_argument("--adapter", required=True, help="a folder written by finetune, save_adapter or peft")
    made.add_argument("--model", help="the base model, a folder or a hub id (default: the one that the adapter names)")
    made.add_argument("--output", required=True, type=Path, help="folder for the LoRA; it must not exist")
    made.add_argument("--rank", type=int, help="of the LoRA (default: that with as many parameters as the adapter)")
    source = made.add_argument_group(
        "calibration data", "TSV (no quoting), CSV, JSONL, JSON or Parquet, as for finetune"
    )
    source.add_argument("--data-file", nargs="+", required=True, help="rows like those of the task, to fit the LoRA on")
    source.add_argument("--eval-file", nargs="+", help="rows for the report (default: the calibration data)")
    source.add_argument("--rows", type=int, default=1024, help="the most rows to use, drawn at random (default 1024)")
    source.add_argument("--column-names", help="A,B,...: the columns of TSV and CSV files without a header row")
    source.add_argument(
        "--text-column", nargs="+", help="column of the text; two are a pair (default: messages, prompt or text)"
    )
    source.add_argument("--label-column", help="column of the class: the report then has the accuracy")
    source.add_argument(
        "--classes",
        nargs="+",
        help="the classes in the order of the model's logits (default: that of the metrics.json which finetune wrote "
        "beside the adapter; labels from 0 to n-1 are taken as they are)",
    )
    source.add_argument("--target-column", help="for a decoder: column of the completion after the text")
    source.add_argument("--separator", help="between text and completion (default: a newline)")
    source.add_argument("--max-length", type=int, default=512, help="of a row, in tokens (default 512)")
    source.add_argument("--batch-size", type=int, default=16, help="in rows (default 16)")
    running = made.add_argument_group("running")
    running.add_argument("--at-once", type=int, help="how many linears a pass over the data fits (default: a tenth)")
    running.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the base")
    running.add_argument("--device", help="cpu, cuda or mps (default: cuda if available, else cpu)")
    return made


def run(argv: Sequence[str]) -> int:
    """Run the command. Returns 0, or 2 after a mistake of the user, which is printed to stderr."""
    options = parser().parse_args(list(argv))
    try:
        report = _export(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report)
    print(f"\n{options.output}: load it with peft's PeftModel.from_pretrained, merge it with merge_and_unload()")
    return 0


def _export(options: argparse.Namespace) -> ExportReport:
    check_arguments(options.output, options.rank, options.at_once)
    for name in ("rows", "batch_size", "max_length"):
        if getattr(options, name) < 1:
            raise FinetuneError(f"--{name.replace('_', '-')} {getattr(options, name)} must be at least 1")
    if options.classes is not None and not options.label_column:
        raise FinetuneError("--classes has no effect here: give --label-column")
    if options.separator is not None and not options.target_column:
        raise FinetuneError("--separator has no effect here: give --target-column")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise FinetuneError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from None
    calibration = _rows(options, options.data_file)
    evaluation = _rows(options, options.eval_file) if options.eval_file else None
    transformers.utils.logging.disable_progress_bar()
    model = load_base(options.adapter, options.model, dtype=getattr(torch, options.dtype)).eval()
    if model.main_input_name != "input_ids":
        raise FinetuneError(
            f"a {type(model).__name__} reads {model.main_input_name}, and the rows are text: call "
            "mos_kernels.huggingface.export_lora(model, batches, folder) with batches of its own"
        )
    if not mos_modules(model):
        load_adapter(model, options.adapter)
    model.to(device)
    source = options.model or model.config._name_or_path
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    if is_classifier(model):
        model.config.pad_token_id = tokenizer.pad_token_id  # as in training: it decides which token is the last
    options.max_length = min(options.max_length, most_tokens(AutoConfig.from_pretrained(source), tokenizer))
    encode, collate, asked = _encoding(model, tokenizer)
    for other in {"label", "target"} - {asked}:
        if getattr(options, f"{other}_column"):
            instead = f"name --{asked}-column" if asked else "drop it"
            raise FinetuneError(f"--{other}-column does not go with a {type(model).__name__}: {instead}")
    classes = _classes(options, model.config.num_labels, calibration) if options.label_column else []
    if classes:
        print(f"classes, in the order of the model's logits: {', '.join(classes)}")

    special = set(tokenizer.all_special_ids)

    def batches(rows: Rows) -> list[dict]:
        examples = sorted((encode(options, tokenizer, row, classes) for row in rows), key=lambda e: len(e["input_ids"]))
        if all(special.issuperset(example["input_ids"]) for example in examples):
            raise FinetuneError(f"{rows[0][0]} and all other rows hold special tokens alone: is --text-column right?")
        parts = [examples[i : i + options.batch_size] for i in range(0, len(examples), options.batch_size)]
        return [dict(collate(part)) for part in parts]

    return export_lora(
        model, batches(calibration), options.output, options.rank, at_once=options.at_once,
        evaluation_batches=None if evaluation is None else batches(evaluation),
    )  # fmt: skip


def _classes(options: argparse.Namespace, count: int, rows: Rows) -> list[str]:
    """The classes in the order of the model's logits. The adapter's own files do not say it."""
    labels = sorted({label_of(*row, options.label_column) for row in rows}, key=class_order)
    numbers = [str(number) for number in range(count)]
    metrics = Path(options.adapter).absolute().parent / "metrics.json"
    found = options.classes
    if found is None and metrics.is_file():
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found = json.loads(metrics.read_text(encoding="utf-8"))["data"]["classes"]
    if found is None and set(labels) <= set(numbers):
        found = numbers
    if found is None or len(found) != count or len(set(found)) != count:
        known = "" if found is None else f", and {len(found)} are known ({', '.join(found[:8])})"
        raise FinetuneError(
            f"the adapter is for {count} classes{known}. For the accuracy, name them in the order of the model's "
            f"logits: --classes A B …, where the labels are {shlex.join(labels[:8])}; or drop --label-column"
        )
    return found


def _encoding(model, tokenizer) -> tuple[Callable, Callable, str | None]:
    """(what encodes a row for the model, what makes a batch of rows, which column it can be given: label or target)."""
    kind = type(model).__name__
    if is_classifier(model):
        return _classified, DataCollatorWithPadding(tokenizer), "label"
    if model.config.is_encoder_decoder and model.can_generate():
        return _translated, DataCollatorForSeq2Seq(tokenizer, model), "target"
    if kind.endswith(("ForCausalLM", "LMHeadModel", "ForMaskedLM")):
        return _continued, DataCollatorForTokenClassification(tokenizer), "target"
    return _classified, DataCollatorWithPadding(tokenizer), None  # its labels, if it has any, are none of a row's


def _rows(options: argparse.Namespace, paths: Sequence[str]) -> Rows:
    rows = [row for path in paths for row in read_rows(path, options.column_names)]
    return rows if len(rows) <= options.rows else random.Random(0).sample(rows, options.rows)


def _texts(options: argparse.Namespace, where: str, row: dict) -> list[str]:
    columns = options.text_column or next(([name] for name in ("prompt", "text") if name in row), None)
    if columns is None:
        raise FinetuneError(f"{where}: no column is called messages, prompt or text: name --text-column")
    return [text_of(where, row, column) for column in columns]


def _classified(options: argparse.Namespace, tokenizer, row: tuple[str, dict], classes: list[str]) -> dict:
    texts = _texts(options, *row)
    texts = texts if len(texts) == 2 else [" ".join(texts)]
    found = dict(tokenizer(*texts, truncation=True, max_length=options.max_length))
    if classes:
        label = label_of(*row, options.label_column)
        if label not in classes:
            raise FinetuneError(f"{row[0]}: the label {label!r} is none of the adapter's: {', '.join(classes)}")
        found["labels"] = classes.index(label)
    return found


def _translated(options: argparse.Namespace, tokenizer, row: tuple[str, dict], classes: list[str]) -> dict:
    """Token ids of a row for an encoder and a decoder, as they are trained: without the separator between them."""
    where, values = row
    target = options.target_column or ("completion" if "completion" in values else None)
    if target is None:
        raise FinetuneError(f"{where}: an encoder-decoder writes a completion: name --target-column")
    if options.separator is not None:
        raise FinetuneError("--separator does not go with an encoder-decoder: drop it")
    text, target = " ".join(_texts(options, *row)), text_of(where, values, target)
    found = tokenizer(text, text_target=target, truncation=True, max_length=options.max_length)
    return {name: found[name] for name in ("input_ids", "attention_mask", "labels")}


def _continued(options: argparse.Namespace, tokenizer, row: tuple[str, dict], classes: list[str]) -> dict:
    """Token ids of a row. The labels are on its completion; without one, on the whole text or chat."""
    where, values = row
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    columns = options.text_column or next(([n] for n in ("messages", "prompt", "text") if n in values), [])
    column = options.target_column or ("completion" if not options.text_column and "completion" in values else None)
    chat = len(columns) == 1 and column_of(where, values, columns[0])
    if columns == ["messages"] and not options.text_column and not (isinstance(chat, list) and chat):
        raise FinetuneError(f"{where}: column 'messages' holds no list of messages: name --text-column")
    if isinstance(chat, list):
        head, tail = _chat(where, values, columns[0], column, tokenizer)
    else:
        text = " ".join(_texts(options, where, values))
        separator = "\n" if options.separator is None else options.separator
        target = None if column is None else text_of(where, values, column)
        head = tokenizer(text if target is None else text + separator).input_ids
        head = head[:-1] if end and head[-1:] == end else head
        tail = None if target is None else tokenizer(target, add_special_tokens=False).input_ids
        head, tail = (head + end, None) if tail is None else (head, tail + end)
    ids, masked = (head, []) if tail is None else (head + tail, [IGNORED] * len(head))
    labels = masked + ids[len(masked) :]
    # if it is too long, the beginning of the prompt is cut
    start = 0 if tail is None else max(len(ids) - options.max_length, 0)
    ids, labels = (part[start : start + options.max_length] for part in (ids, labels))
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def _chat(where: str, values: dict, column: str, answer: str | None, tokenizer) -> tuple[list[int], list[int] | None]:
    """Token ids of the messages in a column, and of those in the column `answer`, which follow them."""
    messages, more = values[column], [] if answer is None else column_of(where, values, answer)
    if not isinstance(more, list):
        raise FinetuneError(f"{where}: column {column!r} holds messages, and {answer!r} does not: make both the same")
    try:
        parts = [
            tokenizer.apply_chat_template(part, tokenize=True, return_dict=False, add_generation_prompt=asks)
            for part, asks in ((messages, bool(more)), (messages + more, False))
        ]
    except Exception as error:  # of many types: the template is a program of its own
        raise FinetuneError(f"{where}: the messages do not go through the chat template: {error}") from error
    start, whole = parts
    if not more:
        return whole, None
    if whole[: len(start)] != start:
        raise FinetuneError(f"{where}: with the chat template, {column!r} is not the beginning of both columns")
    return start, whole[len(start) :]
