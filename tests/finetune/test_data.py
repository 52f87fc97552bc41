"""Reading, checking and splitting."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter

import pytest
from finetune_setup import strings
from hypothesis import assume, given
from hypothesis import strategies as st

from mos_kernels.finetune import FinetuneError, data
from mos_kernels.finetune.options import parse

FIELD = st.text("aé\"', \x0b\x1c\x85\u2028\ufeff", max_size=6)  # what str.splitlines and csv treat in a special way
ANY_FIELD = st.text("aé\"',\t\n \x85\u2028", max_size=6)


def tables(field):
    rows = st.integers(1, 4).flatmap(
        lambda n: st.lists(st.lists(field, min_size=n, max_size=n), min_size=1, max_size=6)
    )
    return rows.filter(lambda rows: all(any(row) for row in rows))


def rows_of(path, names=None):
    return [row for _, row in data.read_rows(str(path), names and ",".join(names))]


def options(*arguments):
    return parse(strings("--model", "m", "--output", "o", "--eval-size", 1, *arguments), {})[0]


def numbered(rows):
    return [(f"file, row {i}", row) for i, row in enumerate(rows, 1)]


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
    assert rows_of(path, names) == expected
    path.write_bytes(("\t".join(names) + "\r\n" + "\r\n".join("\t".join(row) for row in rows)).encode())
    assert rows_of(path) == expected


@given(rows=tables(ANY_FIELD))
def test_csv_round_trip(folder, rows):
    path, names = folder / "t.csv", names_for(rows)
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerows([names, *rows])
    path.write_bytes(buffer.getvalue().encode())
    assert rows_of(path) == [dict(zip(names, row, strict=True)) for row in rows]


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
    assert rows_of(folder / "t.jsonl") == rows_of(folder / "t.json") == rows_of(folder / "lines.json") == rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", b"x\ty\n1\t2\n3\n", "line 3: 1 fields, and the columns are x, y"),
        ("a.csv", b"x,y\n1,2,3\n", "line 2: 3 fields, and the columns are x, y"),
        ("a.tsv", b"x\tx\n1\t2\n", "named more than once: x, x"),
        ("a.tsv", b"x\ty\n", "no rows"),
        ("a.tsv", b"", "no rows"),
        ("a.tsv", "x\ny\n\xe9".encode("latin-1"), "line 3: not UTF-8"),
        ("a.csv", b'x,y\n1,"2\n', "not readable as CSV"),
        ("a.csv", b'x,y\n"a"b,2\n', "line 2: not readable as CSV"),
        ("a.jsonl", b'{"x": 1}\n{"x": \n', "line 2: not readable as JSON: Expecting value"),
        ("a.jsonl", b'{"x": 1}\n[1]\n', "line 2: [1] where an object"),
        ("a.jsonl", b'{"x": 1}\n\n{"x": [{"y": "g\\ud83d"}]}\n', "line 3: not text"),
        ("a.json", b'[{"x": "a\\udc00"}]', "item 1: not text"),
        ("a.jsonl", b'{"x": ' + b"1" * 5000 + b"}", "line 1: not readable as JSON: Exceeds the limit"),
        ("a.jsonl", b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "line 1: not readable as JSON: maximum rec"),
        ("a.json", b'[{"x": 1},\n {"x" 2}]', "line 2: not readable as JSON"),
        ("a.json", b'[{"x": 1}, 3]', "item 2: 3 where an object"),
        ("a.json", b"[]", "no rows"),
        ("a.xlsx", b"", "'.xlsx' is not one of"),
        ("a.parquet", b"PAR1", "cannot be read"),
    ],
)
def test_unreadable_files_say_where(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FinetuneError) as error:
        rows_of(tmp_path / name)
    assert message in str(error.value) and name in str(error.value)
    assert len(str(error.value)) < 400


def test_a_missing_file_names_its_neighbours(tmp_path):
    (tmp_path / "train.tsv").write_text("x\n1\n")
    with pytest.raises(FinetuneError, match="no such file; .* holds train.tsv"):
        rows_of(tmp_path / "trian.tsv")


def test_column_names_do_not_apply_to_json(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"x": 1}\n')
    with pytest.raises(FinetuneError, match="--column-names is for TSV and CSV"):
        rows_of(tmp_path / "a.jsonl", ["x"])


def test_columns_without_a_name_are_no_fault(tmp_path):
    (tmp_path / "spam.csv").write_text('v1,v2,,,\nham,"hello, you",,,\nspam,win,,,\n')
    assert [(row["v1"], row["v2"]) for row in rows_of(tmp_path / "spam.csv")] == [
        ("ham", "hello, you"),
        ("spam", "win"),
    ]


def test_parquet_and_folders_are_read_by_datasets(tmp_path):
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "y": datasets.ClassLabel(names=["no", "yes"])})
    rows = {"text": ["a", "b", "c", "d"], "y": [0, 1, 1, 0]}
    (tmp_path / "folder").mkdir()
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "folder" / "train.parquet")
    (tmp_path / "test.csv").write_text("text,y\nx,yes\n")
    chosen = ("--text-column", "text", "--label-column", "y", "--eval-size", 2)
    for source in (("--train-file", tmp_path / "folder" / "train.parquet"), ("--dataset", tmp_path / "folder")):
        train, evaluation, summary = data.read_data(options(*source, *chosen))
        assert summary["classes"] == ["no", "yes"] and summary["eval_rows"] == {"held_out": 2}
        assert sorted([*train["text"], *evaluation["held_out"]["text"]]) == ["a", "b", "c", "d"]
    with pytest.raises(FinetuneError, match="split test cannot be read"):
        data.read_data(options("--dataset", tmp_path / "folder", "--train-split", "test", *chosen))
    with pytest.raises(FinetuneError, match="--column-names has no effect here: it is for TSV and CSV files"):
        data.read_data(options("--dataset", tmp_path / "folder", "--column-names", "text,y", *chosen))
    for flag in ("--train-split", "--dataset-config"):
        with pytest.raises(FinetuneError, match=f"{flag} has no effect here: --dataset .*test.csv is a file"):
            data.read_data(options("--dataset", tmp_path / "test.csv", flag, "test", *chosen))


# examples

CLASSES = ("--train-file", "f", "--text-column", "a", "--label-column", "y")


def labelled(rows, *more, evaluation=None):
    made = data._labelled(options(*CLASSES, *more), numbered(rows), numbered(evaluation or ()))
    return made(numbered(rows if evaluation is None else evaluation))


GOOD = [{"a": "x", "y": "1"}, {"a": "z", "y": "2"}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"b": "x", "y": "1"}, "file, row 3: there is no column 'a'; the columns are: b, y"),
        ({"a": 3, "y": "1"}, "row 3: column 'a' holds 3, which is not text"),
        ({"a": [{"role": "user", "content": "long " * 99}], "y": "1"}, "… (list), which is not text; chat data is for"),
        *(({"a": "x", "y": value}, "row 3: column 'y' holds") for value in (None, "", [1], 0.5)),
    ],
)
def test_a_row_that_cannot_be_used_is_named(row, message):
    with pytest.raises(FinetuneError, match="no class label" if row.get("y") != "1" else None) as error:
        labelled([*GOOD, row])
    assert message in str(error.value) and len(str(error.value)) < 300


def test_labels_are_text_and_only_renamed_when_asked():
    rows = [{"a": "x", "y": y} for y in ("Divison", "Division", 3)]
    assert labelled(rows).features["labels"].names == ["3", "Division", "Divison"]
    renamed = labelled(rows, "--rename-label", "Divison=Division")
    assert renamed.features["labels"].names == ["3", "Division"] and renamed["labels"] == [1, 1, 0]
    for wrong in ("nope=no", "Divison", "Divison="):
        with pytest.raises(FinetuneError, match=f"--rename-label {wrong}.*OLD one of 3, Division, Divison"):
            labelled(rows, "--rename-label", wrong)


def test_a_spelling_that_only_the_evaluation_has_is_renamed():
    evaluation = [{"a": "x", "y": "Divison"}, {"a": "x", "y": "Division"}]
    rows = [{"a": "x", "y": y} for y in ("Division", "Sum")]
    with pytest.raises(FinetuneError, match="'Divison' does not occur .* --rename-label OLD=NEW"):
        labelled(rows, evaluation=evaluation)
    renamed = labelled(rows, "--rename-label", "Divison=Division", evaluation=evaluation)
    assert renamed["labels"] == [0, 0] and renamed.features["labels"].names == ["Division", "Sum"]


def test_the_order_of_classes_and_labels_that_only_the_evaluation_has():
    names = labelled([{"a": "x", "y": y} for y in ("b", "10", 2, "-3")]).features["labels"].names
    assert names == ["-3", "2", "10", "b"]
    rows = [{"a": "x", "y": f"sentence {i} " * 50} for i in range(500)]
    with pytest.raises(FinetuneError, match=r"file, row 1: the label .* does not occur .* and 488 more") as refused:
        labelled(rows, evaluation=[{"a": "x", "y": "c"}])
    assert len(str(refused.value)) < 1000
    with pytest.raises(FinetuneError, match="every training row has the label 'a'"):
        labelled([{"a": "x", "y": "a"}] * 2)


def test_two_text_columns_are_a_pair_and_more_are_joined():
    rows = [{"a": "x", "b": "u", "c": "v", "y": y} for y in "12"]
    assert labelled(rows, "--text-column", "a", "b")["text"] == [["x", "u"]] * 2
    assert labelled(rows, "--text-column", "a", "b", "c")["text"] == ["x u v"] * 2


LM = ("--task", "causal-lm", "--train-file", "f")
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


@pytest.mark.parametrize(
    ("row", "more", "expected"),
    [
        ({"messages": TURNS, "id": 1}, (), {"messages": TURNS}),
        ({"chat": TURNS}, ("--text-column", "chat"), {"messages": TURNS}),
        ({"prompt": "p", "completion": "c"}, (), {"prompt": "p", "completion": "c"}),
        ({"prompt": TURNS[:1], "completion": TURNS[1:]}, (), {"prompt": TURNS[:1], "completion": TURNS[1:]}),
        ({"text": "t", "id": 1}, (), {"text": "t"}),
        ({"q": "p", "r": "c"}, ("--text-column", "q", "--target-column", "r"), {"prompt": "p\n", "completion": "c"}),
        ({"a": "t", "text": "u"}, ("--text-column", "a"), {"text": "t"}),
    ],
)
def test_the_forms_of_data_for_a_language_model(row, more, expected):
    made = data._examples(options(*LM, *more), numbered([row]))(numbered([row, row]))
    assert made.to_list() == [expected, expected]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "hi"}, "row 2: column 'messages' holds 'hi', and no list of messages"),
        ({"messages": []}, "row 2: column 'messages' holds []"),
        ({"messages": [{"content": "long " * 99}]}, "… (list), and no list of messages with roles"),
        ({"text": "hi"}, "row 2: there is no column 'messages'"),
    ],
)
def test_chat_that_cannot_be_used_is_named(row, message):
    rows = numbered([{"messages": TURNS}, row])
    with pytest.raises(FinetuneError) as error:
        data._examples(options(*LM), rows)(rows)
    assert message in str(error.value) and len(str(error.value)) < 300
    with pytest.raises(FinetuneError, match="no column messages, prompt and completion, or text, but x: name the text"):
        data._examples(options(*LM), numbered([{"x": "y"}]))


# splitting


@given(
    strata=st.lists(st.sampled_from("ab"), min_size=8, max_size=60),
    part=st.floats(0.2, 0.8),
    seed=st.integers(0, 9),
)
def test_the_split_is_stratified_and_depends_on_its_seed_alone(strata, part, seed):
    assume(min(Counter(strata).values()) > 1 and len(set(strata)) == 2)
    train = labelled([{"a": str(i), "y": y} for i, y in enumerate(strata)])
    chosen = options(*CLASSES, "--eval-size", part, "--split-seed", seed)
    kept, held_out = data._split(train, chosen)
    assert sorted(map(int, [*kept["text"], *held_out["text"]])) == list(range(len(strata)))
    shares = [Counter(side["labels"])[0] / len(side) for side in (kept, held_out)]
    assert abs(shares[0] - shares[1]) <= 1 / len(kept) + 1 / len(held_out)
    assert data._split(train, chosen)[1]["text"] == held_out["text"]


def test_a_split_that_cannot_be_says_why():
    rows = [{"a": "x", "y": y} for y in "1112"]
    for size, message in (
        (2, r"The least populated class .* .a single row has 2.; merge rare classes"),
        (4, "--eval-size 4 of 4 rows"),
    ):
        with pytest.raises(FinetuneError, match=message):
            data._split(labelled(rows), options(*CLASSES, "--eval-size", size))
