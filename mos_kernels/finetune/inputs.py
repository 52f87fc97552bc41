"""What the finetune command trains and evaluates on: rows read as the options say, checked, split, tokenised."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from transformers import DataCollatorWithPadding

from mos_kernels.finetune import data
from mos_kernels.finetune.data import DataError


def read_data(args: argparse.Namespace) -> tuple[dict, dict[str, dict], dict]:
    """Read, check and split: (train, evaluation by file name, summary for metrics.json). Loads no model.

    train and each evaluation: {"texts": [tuple, ...], "targets": [str, ...] or None}.
    """
    files: list[Path] = []

    def read(paths) -> list[dict]:
        files.extend(paths)
        return [row for path in paths for row in data.read_rows(path, args.column_names)]

    if args.train_file or is_file_name(args.dataset):
        train_rows = read(args.train_file or [Path(args.dataset)])
    else:
        train_rows = data.read_hub(args.dataset, args.dataset_config, args.train_split or "train")
    several = len(args.train_file or ()) > 1
    train_name = "the training data" if several else str(args.train_file[0] if args.train_file else args.dataset)
    evaluation_rows = {}
    if args.eval_file:
        for path, name in zip(args.eval_file, _distinct_names(args.eval_file), strict=True):
            evaluation_rows[name] = read([path])
    elif args.eval_split:
        evaluation_rows[args.eval_split] = data.read_hub(args.dataset, args.dataset_config, args.eval_split)

    rename = _renames(args.rename_label, train_rows, args.label_column)
    train = _examples(args, train_rows, train_name, rename)
    evaluation = {name: _examples(args, rows, name, rename) for name, rows in evaluation_rows.items()}
    if args.eval_size is not None:
        strata = train["targets"] if args.task == "classification" else ["all"] * len(train_rows)
        kept, held_out = data.stratified_split(strata, args.eval_size, args.split_seed or 0)
        evaluation = {"held_out": _subset(train, held_out)}
        train = _subset(train, kept)

    summary: dict = {"files": {str(path): data.file_digest(path) for path in files}}
    summary["train_rows"] = len(train["texts"])
    summary["eval_rows"] = {name: len(part["texts"]) for name, part in evaluation.items()}
    if args.task == "classification":
        summary["classes"] = data.class_names(
            train["targets"], {name: part["targets"] for name, part in evaluation.items()}
        )
        summary["train_rows_of_class"] = dict(sorted(Counter(train["targets"]).items()))
        summary["eval_rows_of_class"] = dict(
            sorted(Counter(t for part in evaluation.values() for t in part["targets"]).items())
        )
    seen = set(train["texts"])
    summary["eval_rows_also_in_train"] = sum(text in seen for part in evaluation.values() for text in part["texts"])
    return train, evaluation, summary


def _examples(args: argparse.Namespace, rows: list[dict], source: str, rename: dict[str, str]) -> dict:
    texts = data.texts(rows, args.text_column, source)
    if args.task == "classification":
        return {"texts": texts, "targets": data.labels(rows, args.label_column, source, rename)}
    targets = [t for (t,) in data.texts(rows, [args.target_column], source)] if args.target_column else None
    return {"texts": texts, "targets": targets}


def _subset(part: dict, indices: list[int]) -> dict:
    return {key: None if values is None else [values[i] for i in indices] for key, values in part.items()}


def _renames(options: list[str] | None, rows: list[dict], column: str) -> dict[str, str]:
    renames = {}
    for option in options or ():
        old, sign, new = option.partition("=")
        if not sign or not old or not new:
            raise DataError(f"--rename-label {option!r} is not OLD=NEW")
        if all(str(row.get(column)) != old for row in rows):
            found = sorted({str(row.get(column)) for row in rows})
            raise DataError(
                f"--rename-label {option!r}: no training row has the label {old!r}; the labels are {found[:20]}"
            )
        renames[old] = new
    return renames


def _distinct_names(paths: list[Path]) -> list[str]:
    stems = [path.stem for path in paths]
    names = stems if len(set(stems)) == len(stems) else [str(path.with_suffix("")) for path in paths]
    if len(set(names)) < len(names):
        raise DataError(f"--eval-file names the same file twice: {', '.join(map(str, paths))}")
    return [name.replace("/", "_") for name in names]


def is_file_name(name: str | None) -> bool:
    return bool(name) and (Path(name).suffix in data.SUFFIXES or Path(name).is_file() or name.startswith((".", "/")))


def print_data(summary: dict) -> None:
    rows = ", ".join(f"{name} {count:,}" for name, count in summary["eval_rows"].items())
    print(f"data: {summary['train_rows']:,} rows to train on; to evaluate on: {rows}")
    if "classes" in summary:
        counts = summary["train_rows_of_class"]
        print("classes: " + ", ".join(f"{name} ({counts[name]:,})" for name in summary["classes"]))
        rare = [name for name, count in counts.items() if count < 5]
        if rare:
            print(f"note: fewer than 5 training rows of {rare}; other spellings are merged with --rename-label OLD=NEW")
    if summary["eval_rows_also_in_train"]:
        print(
            f"note: {summary['eval_rows_also_in_train']} evaluation rows have a text that is also in the training data"
        )


def encode(args, train, evaluation, summary, tokenizer, longest: int):
    """Tokenise: {"train": examples, "evaluation": {file: examples}}, and the collator.

    Into `summary` go the length in tokens that was used, and the number of rows that were cut at it.
    """
    if args.max_length is not None and args.max_length > longest:
        raise DataError(f"--max-length {args.max_length} exceeds the {longest} tokens that {args.model} takes")
    max_length = args.max_length or min(512, longest)
    truncated = 0

    def examples_of(part: dict) -> list[dict]:
        nonlocal truncated
        if args.task == "classification":
            index = {name: i for i, name in enumerate(summary["classes"])}
            pair = len(args.text_column) == 2 and args.text_join != "space"
            targets = [index[target] for target in part["targets"]]
            examples, cut = data.encode_classification(tokenizer, part["texts"], targets, max_length, pair)
        else:
            prompts = [" ".join(text) for text in part["texts"]]
            separator = "\n" if args.separator is None else args.separator
            examples, cut = data.encode_causal(tokenizer, prompts, part["targets"], max_length, separator)
        truncated += cut
        return examples

    encoded = {
        "train": examples_of(train),
        "evaluation": {name: examples_of(part) for name, part in evaluation.items()},
    }
    summary |= {"max_length": max_length, "rows_cut_at_max_length": truncated}
    if truncated:
        print(f"note: {truncated:,} rows are longer than {max_length} tokens (--max-length) and were cut")
    collator = (
        DataCollatorWithPadding(tokenizer)
        if args.task == "classification"
        else data.CausalCollator(tokenizer.pad_token_id)
    )
    return encoded, collator
