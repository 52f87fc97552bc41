"""Rows of text for `python -m mos_kernels finetune`: read, checked, split, tokenised, before any model is loaded.

A row is a dict from column name to value. Nothing is normalised: a label is the text that the file holds, and only
`rename` (an explicit option) merges two spellings of one. Every error is a `DataError`, and names the file, the line
and the remedy.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

SUFFIXES = (".tsv", ".csv", ".jsonl", ".json")


class DataError(ValueError):
    """The data cannot be used as asked: what is wrong, where, and what to do."""


# reading


def read_rows(path: str | Path, column_names: Sequence[str] | None = None) -> list[dict]:
    """The rows of a TSV (no quoting), CSV, JSONL or JSON file (a list of objects), as dicts by column.

    column_names: the columns of a TSV or CSV file without a header row; the first row is the header otherwise.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file{_look_alikes(path)}")
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path}: the ending {path.suffix!r} is not one of {SUFFIXES}: rename or convert the file")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{path}, line {line}: not UTF-8 ({error.reason}): convert the file to UTF-8") from None
    if path.suffix in (".jsonl", ".json"):
        if column_names:
            raise DataError(f"{path}: --column-names has no effect on JSON, where every row names its columns: drop it")
        rows = _json_lines(path, text) if path.suffix == ".jsonl" else _json(path, text)
    else:
        rows = _table(path, text, column_names)
    if not rows:
        raise DataError(f"{path}: there are no rows")
    return rows


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file, to tell whether a run is resumed on the data it was started on."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _look_alikes(path: Path) -> str:
    there = sorted(p.name for p in path.parent.glob("*") if p.suffix in SUFFIXES) if path.parent.is_dir() else []
    return f"; {path.parent} holds {', '.join(there)}" if there else ""


def _table(path: Path, text: str, column_names: Sequence[str] | None) -> list[dict]:
    if path.suffix == ".tsv":
        lines = enumerate(text.split("\n"), 1)  # not splitlines(), which breaks at characters a field may hold
        records = [(number, line.rstrip("\r").split("\t")) for number, line in lines if line.strip("\r")]
    else:
        csv.field_size_limit(2**31 - 1)
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        try:
            records = [(reader.line_num, fields) for fields in reader if fields]
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num}: not readable as CSV: {error}") from None
    if not records:
        return []
    names = list(column_names) if column_names else records.pop(0)[1]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(f"{path}: the columns {twice} are named more than once in {names}: give each its own name")
    for number, fields in records:
        if len(fields) != len(names):
            origin = "--column-names names" if column_names else "the header names"
            raise DataError(
                f"{path}, line {number}: {len(fields)} fields where {origin} {len(names)} ({', '.join(names)})"
            )
    return [dict(zip(names, fields, strict=True)) for _, fields in records]


def _json(path: Path, text: str) -> list[dict]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one object a line, under the ending .json
            return _json_lines(path, text)
        raise _bad_json(path, error.lineno, error) from None
    if not isinstance(rows, list):
        raise DataError(f"{path}: a list of objects is expected, and this is a single {type(rows).__name__}")
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{path}: item {index} is a {type(row).__name__}, not an object: {str(row)[:60]!r}")
    return rows


def _json_lines(path: Path, text: str) -> list[dict]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise _bad_json(path, number, error) from None
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: a {type(row).__name__}, not an object: {line[:60]!r}")
        rows.append(row)
    return rows


def _bad_json(path: Path, line: int, error: json.JSONDecodeError) -> DataError:
    return DataError(f"{path}, line {line}, column {error.colno}: not valid JSON: {error.msg}")


def read_hub(name: str, config: str | None, split: str) -> list[dict]:
    """The rows of one split of a dataset on the Hugging Face hub. Class labels become their names."""
    try:
        from datasets import ClassLabel, load_dataset
    except ImportError:
        raise DataError(f"{name!r} is not a file, and reading hub datasets needs `pip install datasets`") from None
    try:
        dataset = load_dataset(name, config, split=split)
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise DataError(
            f"dataset {name!r}, split {split!r}, cannot be had from the Hugging Face hub ({_first_line(error)}): check "
            "the name and the network, or give a local file with --train-file"
        ) from None
    rows = dataset.to_list()
    for column, feature in dataset.features.items():
        if isinstance(feature, ClassLabel):
            for row in rows:
                row[column] = feature.int2str(row[column]) if row[column] is not None and row[column] >= 0 else None
    if not rows:
        raise DataError(f"dataset {name!r}, split {split!r}: there are no rows")
    return rows


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


# checking


def texts(rows: Sequence[Mapping], columns: Sequence[str], source: str) -> list[tuple[str, ...]]:
    """The text columns of every row. A missing column, or a value that is not text, raises `DataError`."""
    require_columns(rows, columns, source)
    for index, row in enumerate(rows):
        for column in columns:
            if not isinstance(row[column], str):
                raise DataError(
                    f"{source}, row {index + 1}: column {column!r} holds {row[column]!r}, which is not text"
                )
    return [tuple(row[column] for column in columns) for row in rows]


def labels(rows: Sequence[Mapping], column: str, source: str, rename: Mapping[str, str] | None = None) -> list[str]:
    """The label of every row as text, renamed where `rename` says so. A missing or empty label raises `DataError`."""
    require_columns(rows, [column], source)
    result = []
    for index, row in enumerate(rows):
        value = row[column]
        if value is None or value == "" or isinstance(value, (list, dict, float)):
            raise DataError(f"{source}, row {index + 1}: column {column!r} holds {value!r}, which is no class label")
        result.append((rename or {}).get(str(value), str(value)))
    return result


def require_columns(rows: Sequence[Mapping], columns: Sequence[str], source: str) -> None:
    """Raise `DataError`, listing the columns there are, unless every row has every one of `columns`."""
    for index, row in enumerate(rows):
        for column in columns:
            if column not in row:
                where = f", row {index + 1}" if column in rows[0] else ""
                raise DataError(
                    f"{source}{where}: there is no column {column!r}; the columns are: {', '.join(map(str, row))}. For "
                    "a file without a header row, name them with --column-names"
                )


def class_names(train: Sequence[str], evaluations: Mapping[str, Sequence[str]]) -> list[str]:
    """The classes of the training labels, in order (numeric where they are numbers). Labels only in eval raise."""
    names = sorted(set(train), key=lambda name: (0, int(name), name) if _is_int(name) else (1, 0, name))
    if len(names) < 2:
        raise DataError(f"every training row has the label {names[0]!r}: a classification needs at least two")
    for source, found in evaluations.items():
        unseen = sorted(set(found) - set(names))
        if unseen:
            raise DataError(
                f"{source}: the labels {_some(unseen)} do not occur in the training data, which has {_some(names)}: if "
                "they are other spellings of these, merge them with --rename-label OLD=NEW"
            )
    return names


def _some(names: Sequence[str]) -> str:
    """A list that fits into an error, however wrong the column is."""
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"{[name[:40] for name in names[:8]]}{more}"


def _is_int(name: str) -> bool:
    return name.lstrip("-").isdecimal() and name.isascii() and name.count("-") <= 1


# splitting


def stratified_split(strata: Sequence[str], eval_size: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices (train, eval), each in the file's order, with every class in the same proportion on both sides.

    eval_size: a share in (0, 1), or a number of rows. The eval side has exactly that many rows (by largest remainder),
    and never all rows of a class: a class with a single row is trained on. Depends on `seed` and on nothing else.
    """
    total = len(strata)
    wanted = round(eval_size * total) if eval_size < 1 else int(eval_size)
    counts = Counter(strata)
    room = {name: count - 1 for name, count in counts.items()}
    if not 0 < wanted <= sum(room.values()):
        raise DataError(
            f"--eval-size {eval_size:g} asks for {wanted} of {total} rows in {len(counts)} classes: at least one row, "
            f"and at most {sum(room.values())} (one of each class stays in training), can be set aside"
        )
    names = sorted(counts)
    share = {name: min(wanted * counts[name] // total, room[name]) for name in names}
    by_remainder = sorted(names, key=lambda name: (-(wanted * counts[name] % total), name))
    while (missing := wanted - sum(share.values())) > 0:
        for name in [name for name in by_remainder if share[name] < room[name]][:missing]:
            share[name] += 1
    order = np.random.default_rng(seed).permutation(total)
    evaluation = []
    for name in names:
        evaluation += [int(i) for i in order if strata[i] == name][: share[name]]
    chosen = set(evaluation)
    return [i for i in range(total) if i not in chosen], sorted(evaluation)


# tokenising


def encode_classification(
    tokenizer, rows: Sequence[tuple[str, ...]], targets: Sequence[int], max_length: int, pair: bool
):
    """Examples for a sequence classifier, and how many were cut at `max_length`.

    pair: two text columns go to the tokenizer as a pair; several are joined by a space otherwise.
    """
    inputs = [list(column) for column in zip(*rows, strict=True)] if pair else [[" ".join(row) for row in rows]]
    encoded = tokenizer(*inputs, truncation=False, verbose=False)
    cut = sum(len(ids) > max_length for ids in encoded["input_ids"])
    if cut:
        encoded = tokenizer(*inputs, truncation=True, max_length=max_length)
    examples = [{key: encoded[key][i] for key in encoded} for i in range(len(rows))]
    for example, target in zip(examples, targets, strict=True):
        example["labels"] = target
    return examples, cut


def encode_causal(
    tokenizer, prompts: Sequence[str], completions: Sequence[str] | None, max_length: int, separator: str
):
    """Examples for a causal language model, and how many were cut at `max_length`.

    With completions the loss is on the completion and the end-of-sequence token alone, and what is too long loses the
    beginning of its prompt; without, the loss is on all the text.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    heads = tokenizer(list(prompts) if completions is None else [p + separator for p in prompts], verbose=False)[
        "input_ids"
    ]
    heads = [ids[:-1] if end and ids[-1:] == end else ids for ids in heads]
    tails = [[]] * len(heads)
    if completions is not None:
        tails = tokenizer(list(completions), add_special_tokens=False, verbose=False)["input_ids"]
    examples, cut = [], 0
    for head, tail in zip(heads, tails, strict=True):
        tail = tail + end
        if len(head) + len(tail) > max_length:
            cut += 1
            tail = tail[:max_length]
            keep = max_length - len(tail)
            head = head[:keep] if completions is None else head[len(head) - keep :]
        if not tail and (completions is not None or not head):
            raise DataError(
                f"row {len(examples) + 1} has no token to learn from: its text is empty, and no token ends one"
            )
        masked = head if completions is None else [-100] * len(head)
        examples.append({"input_ids": head + tail, "attention_mask": [1] * len(head + tail), "labels": masked + tail})
    return examples, cut


class CausalCollator:
    """Pads on the right; padded positions are masked, and carry no loss."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad = {"input_ids": pad_token_id, "attention_mask": 0, "labels": -100}

    def __call__(self, examples: Sequence[Mapping]) -> dict:
        import torch

        width = max(len(example["input_ids"]) for example in examples)
        return {
            key: torch.tensor([list(example[key]) + [fill] * (width - len(example[key])) for example in examples])
            for key, fill in self.pad.items()
        }
