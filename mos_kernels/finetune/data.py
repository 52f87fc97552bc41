"""Rows for `python -m mos_kernels finetune`: read, checked and split before a model is loaded.

`datasets` reads Parquet files, folders and the hub. Text files are read here, because every error has to name its line:
the readers of `datasets` fill up short CSV rows, and end the process on JSON that is nested too deep.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import datasets

from mos_kernels.finetune.options import FinetuneError, Options

SUFFIXES = (".tsv", ".csv", ".jsonl", ".json", ".parquet")
FORMS = (("messages",), ("conversations",), ("prompt", "completion"), ("text",))
"""The column names that TRL recognises. All but the last may hold chat."""

Rows = list[tuple[str, dict]]
"""Each row, after its file and line for error messages."""


def read_data(options: Options) -> tuple[datasets.Dataset, dict[str, datasets.Dataset], dict]:
    """(training data, evaluation data by name, summary for metrics.json).

    For classification the columns are "text" (a string, or a list of two for a pair) and "labels", a ClassLabel; for
    causal-lm those of one of `FORMS`.
    """
    is_file = _is_file(options.dataset)
    for name in ("dataset_config", "train_split", "eval_split") if is_file else ():
        if getattr(options, name) is not None:
            raise FinetuneError(f"--{name.replace('_', '-')} has no effect here: --dataset {options.dataset} is a file")
    train_files = options.train_file or [options.dataset] * is_file
    if options.column_names and not (train_files or options.eval_file):
        raise FinetuneError("--column-names has no effect here: it is for TSV and CSV files")
    rows = [row for path in train_files for row in read_rows(path, options.column_names)]
    rows = rows or _read_dataset(options, options.train_split or "train")
    parts = {name: read_rows(path, options.column_names) for name, path in _names(options.eval_file or ()).items()}
    if options.eval_split:
        parts[options.eval_split] = _read_dataset(options, options.eval_split)
    if options.task == "classification":
        examples = _labelled(options, rows, [row for part in parts.values() for row in part])
    else:
        examples = _examples(options, rows)
    train, evaluation = examples(rows), {name: examples(part) for name, part in parts.items()}
    if options.eval_size is not None:
        train, evaluation["held_out"] = _split(train, options)
    digests = {path: hashlib.sha256(Path(path).read_bytes()) for path in (*train_files, *(options.eval_file or ()))}
    summary = {"files": {path: digest.hexdigest() for path, digest in digests.items()}, "train_rows": len(train)}
    summary["eval_rows"] = {name: len(part) for name, part in evaluation.items()}
    if options.task == "classification":
        summary["classes"] = names = train.features["labels"].names
        for key, parts in (("train_rows_of_class", [train]), ("eval_rows_of_class", evaluation.values())):
            counts = Counter(label for part in parts for label in part["labels"])
            summary[key] = {name: counts[i] for i, name in enumerate(names) if counts[i]}
    seen = {str(text) for text in train[train.column_names[0]]}
    same = sum(str(text) in seen for part in evaluation.values() for text in part[part.column_names[0]])
    return train, evaluation, summary | {"eval_rows_also_in_train": same}


# reading


def read_rows(path: str, column_names: str | None = None) -> Rows:
    """The rows of a file. column_names: for a TSV or CSV file without a header row, separated by commas."""
    file = Path(path)
    if not file.is_file():
        there = ", ".join(sorted(p.name for p in file.parent.glob("*") if p.suffix in SUFFIXES))
        raise FinetuneError(f"{path}: no such file" + (f"; {file.parent} holds {there}" if there else ""))
    if file.suffix not in SUFFIXES:
        raise FinetuneError(f"{path}: the ending {file.suffix!r} is not one of {', '.join(SUFFIXES)}: convert the file")
    if column_names and file.suffix not in (".tsv", ".csv"):
        raise FinetuneError(f"{path}: --column-names is for TSV and CSV files: drop it")
    if file.suffix == ".parquet":
        return _rows_of(path, lambda: datasets.load_dataset("parquet", data_files=str(file), split="train"))
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise FinetuneError(f"{path}, line {line}: not UTF-8 ({error.reason}): convert the file to UTF-8") from None
    rows = list(_json_rows(path, text) if file.suffix.startswith(".json") else _table_rows(path, text, column_names))
    if not rows:
        raise FinetuneError(f"{path}: there are no rows")
    return rows


def _table_rows(path: str, text: str, column_names: str | None) -> Iterator[tuple[str, dict]]:
    quoting = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.endswith(".tsv") else {"strict": True}
    csv.field_size_limit(2**31 - 1)
    # lines end only at \n: str.splitlines also splits at characters that may be in a field
    lines = (line + "\n" for line in text.replace("\r\n", "\n").split("\n"))
    reader = csv.DictReader(lines, column_names and [name.strip() for name in column_names.split(",")], **quoting)
    try:
        names = _some(reader.fieldnames or ())
        if any(name and count > 1 for name, count in Counter(reader.fieldnames or ()).items()):
            raise FinetuneError(f"{path}: a column is named more than once: {names}: rename one")
        for row in reader:
            if None in row or None in row.values():
                count = sum(value is not None for value in row.values()) - (None in row) + len(row.get(None, ()))
                raise FinetuneError(f"{path}, line {reader.line_num}: {count} fields, and the columns are {names}")
            yield f"{path}, line {reader.line_num}", row
    except csv.Error as error:
        reason = "a carriage return that ends no line" if "new-line character" in str(error) else error
        raise FinetuneError(f"{path}, line {reader.reader.line_num}: not readable as CSV: {reason}") from None


def _json_rows(path: str, text: str) -> Iterator[tuple[str, dict]]:
    is_list = path.endswith(".json") and text.lstrip().startswith("[")  # otherwise one object a line
    parts = [(1, text)] if is_list else [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    for line, part in parts:
        try:
            found = json.loads(part)
        except (ValueError, RecursionError) as error:  # also for numbers of thousands of digits and deep nesting
            line, reason = line + getattr(error, "lineno", 1) - 1, getattr(error, "msg", error)
            raise FinetuneError(f"{path}, line {line}: not readable as JSON: {reason}") from None
        for number, row in enumerate(found if is_list else [found], 1):
            where = f"{path}, item {number}" if is_list else f"{path}, line {line}"
            if not isinstance(row, dict):
                raise FinetuneError(f"{where}: {_short(row)} where an object is expected")
            try:
                json.dumps(row, ensure_ascii=False).encode()
            except UnicodeEncodeError as error:  # half a character, left when a text was cut
                raise FinetuneError(f"{where}: not text: {error.reason}, {ascii(row)[:60]}…: mend it") from None
            yield where, row


def _read_dataset(options: Options, split: str) -> Rows:
    name = f"--dataset {options.dataset}, split {split}"
    return _rows_of(name, lambda: datasets.load_dataset(options.dataset, options.dataset_config, split=split))


def _rows_of(name: str, load: Callable[[], datasets.Dataset]) -> Rows:
    try:
        dataset = load()
    except Exception as error:  # the readers and the hub's client raise many unrelated types
        reason = _short(str(error.__cause__ or error), 200)
        raise FinetuneError(f"{name} cannot be read ({reason}): check name and network, or give --train-file") from None
    labels = {name: f for name, f in dataset.features.items() if isinstance(f, datasets.ClassLabel)}
    rows = dataset.to_list()
    for row in rows:
        row |= {n: f.int2str(row[n]) for n, f in labels.items() if row[n] is not None and row[n] >= 0}
    return [(f"{name}, row {i}", row) for i, row in enumerate(rows, 1)]


def _is_file(name: str | None) -> bool:
    return bool(name) and not Path(name).is_dir() and (Path(name).suffix in SUFFIXES or Path(name).is_file())


def _names(paths: Sequence[str]) -> dict[str, str]:
    """A name for each evaluation file: its stem, or its whole path if two stems are equal."""
    stems = [Path(path).stem for path in paths]
    names = stems if len(set(stems)) == len(stems) else [str(Path(path).with_suffix("")) for path in paths]
    if len(set(names)) < len(names):
        raise FinetuneError(f"--eval-file names the same file twice: {', '.join(paths)}")
    return {name.replace("/", "_"): path for name, path in zip(names, paths, strict=True)}


# examples


def _labelled(options: Options, train: Rows, evaluation: Rows) -> Callable[[Rows], datasets.Dataset]:
    """A function that turns rows into texts with class numbers. The classes are those of the training rows."""
    column, given = options.label_column, [text.partition("=")[::2] for text in options.rename_label or ()]
    renames = dict(given)
    if twice := [old for old, count in Counter(old for old, _ in given).items() if count > 1]:
        raise FinetuneError(f"--rename-label names {twice[0]} more than once: give each label one new name")
    found = sorted({str(column_of(*row, column)) for row in (*train, *evaluation)})
    for old, new in renames.items():
        if old not in found or not new:
            raise FinetuneError(f"--rename-label {old}={new} is not OLD=NEW with OLD one of {_some(found)}")

    def label(where: str, row: dict) -> str:
        value = label_of(where, row, column)
        return renames.get(value, value)

    names = sorted({label(*row) for row in train}, key=class_order)
    if len(names) < 2:
        raise FinetuneError(f"every training row has the label {names[0]!r}: a classification needs at least two")
    is_pair = len(options.text_column) == 2
    kind = datasets.List(datasets.Value("string")) if is_pair else datasets.Value("string")
    features = datasets.Features({"text": kind, "labels": datasets.ClassLabel(names=names)})
    numbers = {name: i for i, name in enumerate(names)}

    def examples(rows: Rows) -> datasets.Dataset:
        found = {"text": [], "labels": []}
        for where, row in rows:
            if (name := label(where, row)) not in numbers:
                raise FinetuneError(
                    f"{where}: the label {_short(name)} does not occur in the training data, which has {_some(names)}: "
                    "merge another spelling with --rename-label OLD=NEW"
                )
            texts = [text_of(where, row, name) for name in options.text_column]
            found["text"].append(texts if is_pair else " ".join(texts))
            found["labels"].append(numbers[name])
        return datasets.Dataset.from_dict(found, features)

    return examples


def class_order(name: str) -> tuple:
    number = name.removeprefix("-")
    return (0, int(name), name) if number.isdecimal() and number.isascii() and len(number) < 19 else (1, 0, name)


def _examples(options: Options, train: Rows) -> Callable[[Rows], datasets.Dataset]:
    """A function that turns rows into data for TRL, depending on the options or on the columns of the first row."""
    (where, first), columns = train[0], options.text_column
    form = next((names for names in FORMS if set(names) <= set(first)), None)
    if columns and len(columns) == 1 and isinstance(first.get(columns[0]), list):
        form = ("messages",)
    elif columns:
        form = None
    elif form is None:
        raise FinetuneError(
            f"{where}: there is no column messages, prompt and completion, or text, but {_some(first)}: name the text "
            "with --text-column (and --target-column)"
        )

    def example(where: str, row: dict) -> dict:
        if form:
            names = zip(form, columns or form, strict=True)
            kept = {key: (_chat if isinstance(first[name], list) else text_of)(where, row, name) for key, name in names}
        else:
            kept = {"text": " ".join(text_of(where, row, name) for name in columns)}
        if options.target_column:
            separator = "\n" if options.separator is None else options.separator
            kept = {"prompt": kept["text"] + separator, "completion": text_of(where, row, options.target_column)}
        if not any(kept.values()):
            raise FinetuneError(f"{where}: the text is empty")
        return kept | {name: row[name] for name in ("tools", "chat_template_kwargs") if row.get(name) is not None}

    def examples(rows: Rows) -> datasets.Dataset:
        made = [example(*row) for row in rows]
        try:
            return datasets.Dataset.from_list(made)
        except Exception as error:
            raise FinetuneError(f"{rows[0][0]} and after it: messages of several forms: {_short(error, 200)}") from None

    return examples


def _chat(where: str, row: dict, column: str) -> list[dict]:
    messages = column_of(where, row, column)
    if (
        not isinstance(messages, list)
        or not messages
        or not all(isinstance(m, dict) and isinstance(m.get("role", m.get("from")), str) for m in messages)
    ):
        raise FinetuneError(f"{where}: column {column!r} holds {_short(messages)}, and no list of messages with roles")
    return messages


def column_of(where: str, row: Mapping, column: str):
    if column not in row:
        hint = "for a file without a header row, name them with --column-names"
        raise FinetuneError(f"{where}: there is no column {column!r}; the columns are: {_some(row)}; {hint}")
    return row[column]


def label_of(where: str, row: Mapping, column: str) -> str:
    value = column_of(where, row, column)
    if value is None or value == "" or isinstance(value, (list, dict, float)):
        raise FinetuneError(f"{where}: column {column!r} holds {_short(value)}, which is no class label")
    return str(value)


def most_tokens(config, tokenizer) -> int:
    """The length of the longest row that a model takes."""
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 2**30
    if config.model_type in ("roberta", "xlm-roberta", "camembert"):  # their positions start after the padding index
        positions -= (config.pad_token_id or 0) + 1
    return min(positions, tokenizer.model_max_length)


def text_of(where: str, row: Mapping, column: str) -> str:
    value = column_of(where, row, column)
    if not isinstance(value, str):
        hint = "; chat data is for --task causal-lm" if isinstance(value, list) else ""
        raise FinetuneError(f"{where}: column {column!r} holds {_short(value)}, which is not text{hint}")
    return value


def _split(train: datasets.Dataset, options: Options) -> tuple[datasets.Dataset, datasets.Dataset]:
    size = options.eval_size if options.eval_size < 1 else int(options.eval_size)
    by = {"stratify_by_column": "labels"} if options.task == "classification" else {}
    try:
        parts = train.train_test_split(size, seed=options.split_seed or 0, keep_in_memory=True, **by)
    except ValueError as error:
        names = [train.features["labels"].names[label] for label in train["labels"]] if by else []
        single = [name for name, count in Counter(names).items() if count == 1]
        rare = f" (a single row has {_some(single)})" if single else ""
        hint = f"{'merge rare classes with --rename-label OLD=NEW, or ' if by else ''}give --eval-file"
        raise FinetuneError(f"--eval-size {options.eval_size:g} of {len(train)} rows: {error}{rare}; {hint}") from None
    return parts["train"], parts["test"]


def _short(value, length: int = 60) -> str:
    text = ascii(value) if isinstance(value, str) else " ".join(str(value).split())
    return text if len(text) <= length else f"{text[:length]}… ({type(value).__name__})"


def _some(names) -> str:
    """A list of names that is short enough for an error message."""
    names = [str(name)[:40] for name in names]
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
