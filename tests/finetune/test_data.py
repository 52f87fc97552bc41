"""Reading, checking, splitting and tokenising."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from mos_kernels.finetune import data
from mos_kernels.finetune.data import DataError

FIELD = st.text("aé\"', \x0b\x1c\x85\u2028\ufeff", max_size=6)  # what str.splitlines and csv treat in a special way
ANY_FIELD = st.text("aé\"',\t\n \x85\u2028", max_size=6)


def tables(field):
    rows = st.integers(1, 4).flatmap(
        lambda n: st.lists(st.lists(field, min_size=n, max_size=n), min_size=1, max_size=6)
    )
    return rows.filter(lambda rows: all(any(row) for row in rows))


def names_for(rows):
    return [f"column{i}" for i in range(len(rows[0]))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@given(rows=tables(FIELD))
def test_tsv_holds_any_text_unquoted(folder, rows):
    assume(all(row != [""] for row in rows))
    path, names = folder / "t.tsv", names_for(rows)
    path.write_bytes("".join("\t".join(row) + "\n" for row in rows).encode())
    assume(not path.read_bytes().startswith("\ufeff".encode()))  # a byte order mark is not text
    expected = [dict(zip(names, row, strict=True)) for row in rows]
    assert data.read_rows(path, names) == expected
    path.write_bytes(("\t".join(names) + "\r\n" + "\r\n".join("\t".join(row) for row in rows)).encode())
    assert data.read_rows(path) == expected


@given(rows=tables(ANY_FIELD))
def test_csv_round_trip(folder, rows):
    path, names = folder / "t.csv", names_for(rows)
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerows([names, *rows])
    path.write_bytes(buffer.getvalue().encode())
    assert data.read_rows(path) == [dict(zip(names, row, strict=True)) for row in rows]


@given(
    rows=st.lists(
        st.dictionaries(ANY_FIELD, st.none() | st.booleans() | st.integers() | ANY_FIELD), min_size=1, max_size=5
    )
)
def test_json_and_json_lines_are_the_same_rows(folder, rows):
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / "t.jsonl").write_text(lines + "\n")
    (folder / "t.json").write_text(json.dumps(rows))
    (folder / "lines.json").write_text(lines)
    assert data.read_rows(folder / "t.jsonl") == data.read_rows(folder / "t.json") == rows
    if len(rows) > 1:
        assert data.read_rows(folder / "lines.json") == rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", b"x\ty\n1\t2\n3\n", "line 3: 1 fields where the header names 2 (x, y)"),
        ("a.tsv", b"x\tx\n1\t2\n", "named more than once"),
        ("a.tsv", b"x\ty\n", "no rows"),
        ("a.tsv", b"", "no rows"),
        ("a.tsv", "x\ny\n\xe9".encode("latin-1"), "line 3: not UTF-8"),
        ("a.csv", b'x,y\n1,"2\n', "not readable as CSV"),
        ("a.csv", b'x,y\n"a"b,2\n', "line 2: not readable as CSV"),
        ("a.jsonl", b'{"x": 1}\n{"x": \n', "line 2, column 7: not valid JSON"),
        ("a.jsonl", b'{"x": 1}\n[1]\n', "line 2: a list, not an object"),
        ("a.json", b'[{"x": 1},\n {"x" 2}]', "line 2, column 7: not valid JSON"),
        ("a.json", b'{"x": 1}', "a single dict"),
        ("a.json", b'[{"x": 1}, 3]', "item 1 is a int"),
        ("a.json", b"[]", "no rows"),
        ("a.parquet", b"", "'.parquet' is not one of"),
    ],
)
def test_unreadable_files_say_where(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        data.read_rows(tmp_path / name)
    assert message in str(error.value) and name in str(error.value)


def test_a_missing_file_names_its_neighbours(tmp_path):
    (tmp_path / "train.tsv").write_text("x\n1\n")
    with pytest.raises(DataError, match="no such file; .* holds train.tsv"):
        data.read_rows(tmp_path / "trian.tsv")


def test_column_names_do_not_apply_to_json(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"x": 1}\n')
    with pytest.raises(DataError, match="--column-names has no effect on JSON"):
        data.read_rows(tmp_path / "a.jsonl", ["x"])


def test_a_missing_column_lists_those_there_are():
    with pytest.raises(DataError, match="no column 'text'; the columns are: label, sentence"):
        data.texts([{"label": "1", "sentence": "a"}], ["text"], "file")
    with pytest.raises(DataError, match="file, row 2: there is no column 'a'"):
        data.texts([{"a": "x"}, {"b": "x"}], ["a"], "file")
    with pytest.raises(DataError, match="row 2: column 'a' holds 3, which is not text"):
        data.texts([{"a": "x"}, {"a": 3}], ["a"], "file")


@pytest.mark.parametrize("value", [None, "", [1], 0.5])
def test_what_is_no_label_is_refused(value):
    with pytest.raises(DataError, match="row 1: column 'y' holds .* no class label"):
        data.labels([{"y": value}], "y", "file")


def test_labels_are_text_and_only_renamed_when_asked():
    rows = [{"y": "Common-Divison"}, {"y": "Common-Division"}, {"y": 3}]
    assert data.labels(rows, "y", "f") == ["Common-Divison", "Common-Division", "3"]
    assert data.labels(rows, "y", "f", {"Common-Divison": "Common-Division"})[:2] == ["Common-Division"] * 2


def test_class_names():
    assert data.class_names(["10", "2", "2"], {}) == ["2", "10"]
    assert data.class_names(["b", "a", "10"], {"e": ["a"]}) == ["10", "a", "b"]
    with pytest.raises(DataError, match="and 492 more") as refused:
        data.class_names(["a", "b"], {"e": [f"sentence {i} " * 50 for i in range(500)]})
    assert len(str(refused.value)) < 1000
    with pytest.raises(DataError, match=r"e: the labels \['c'\] do not occur in the training data"):
        data.class_names(["a", "b"], {"e": ["a", "c"]})
    with pytest.raises(DataError, match="every training row has the label 'a'"):
        data.class_names(["a", "a"], {})


@given(
    strata=st.lists(st.sampled_from("abcd"), min_size=2, max_size=60),
    part=st.floats(0.05, 0.95),
    seed=st.integers(0, 9),
)
def test_stratified_split(strata, part, seed):
    counts, wanted = Counter(strata), round(part * len(strata))
    if not 0 < wanted <= len(strata) - len(counts):
        with pytest.raises(DataError, match="--eval-size"):
            data.stratified_split(strata, part, seed)
        return
    train, evaluation = data.stratified_split(strata, part, seed)
    assert sorted(train + evaluation) == list(range(len(strata)))
    assert train == sorted(train) and evaluation == sorted(evaluation)
    assert len(evaluation) == wanted
    held_out = Counter(strata[i] for i in evaluation)
    assert all(held_out[name] < count for name, count in counts.items())
    exact = {name: wanted * count / len(strata) for name, count in counts.items()}
    if all(value <= counts[name] - 1 for name, value in exact.items()):
        assert all(abs(held_out[name] - value) < 1 for name, value in exact.items())
    assert data.stratified_split(strata, wanted, seed) == (train, evaluation) or wanted < 1


def test_split_depends_on_its_seed_alone():
    strata = list("ab" * 50)
    torch.manual_seed(1)
    first = data.stratified_split(strata, 0.3, 7)
    torch.manual_seed(2)
    assert data.stratified_split(strata, 0.3, 7) == first != data.stratified_split(strata, 0.3, 8)


class WordTokenizer:
    """Numbers for words, with 1 in front, as a tokenizer that adds its special tokens."""

    eos_token_id = 2

    def __call__(self, texts, add_special_tokens=True, verbose=False):
        return {"input_ids": [[1] * add_special_tokens + [10 + int(word) for word in text.split()] for text in texts]}


@given(
    prompt=st.lists(st.integers(0, 9), max_size=8),
    answer=st.lists(st.integers(0, 9), max_size=8),
    max_length=st.integers(2, 20),
)
def test_the_loss_is_on_the_completion(prompt, answer, max_length):
    texts = [" ".join(map(str, words)) for words in (prompt, answer)]
    (example,), cut = data.encode_causal(WordTokenizer(), texts[:1], texts[1:], max_length, " ")
    tail = [10 + w for w in answer] + [2]
    whole = [1, *(10 + w for w in prompt), *tail]
    assert cut == (len(whole) > max_length)
    assert len(example["input_ids"]) == min(len(whole), max_length) == len(example["attention_mask"])
    learned = [label for label in example["labels"] if label != -100]
    assert learned == tail[:max_length]  # never lost to a long prompt
    if not cut:
        assert example["input_ids"] == whole
    assert all(i == label for i, label in zip(example["input_ids"], example["labels"], strict=True) if label != -100)


def test_without_completions_the_loss_is_on_all_the_text():
    (example,), cut = data.encode_causal(WordTokenizer(), ["3 4 5"], None, 64, "")
    assert example["labels"] == example["input_ids"] == [1, 13, 14, 15, 2] and cut == 0
    (example,), cut = data.encode_causal(WordTokenizer(), ["3 4 5"], None, 3, "")
    assert example["labels"] == [1, 13, 2] and cut == 1


def test_causal_collator_masks_its_padding():
    examples = [{"input_ids": [5, 6], "attention_mask": [1, 1], "labels": [-100, 6]}]
    examples.append({"input_ids": [7], "attention_mask": [1], "labels": [7]})
    batch = data.CausalCollator(0)(examples)
    assert batch["input_ids"].tolist() == [[5, 6], [7, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch["labels"].tolist() == [[-100, 6], [7, -100]]
