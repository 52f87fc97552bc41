"""The demo's dataset: what is in the repository is what its generator makes, and the split is honest."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[2] / "demo"
_spec = importlib.util.spec_from_file_location("demo_make_dataset", DEMO / "make_dataset.py")
make_dataset = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make_dataset)


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_files_are_what_the_generator_makes(split):
    path = DEMO / f"{split}.tsv"
    assert path.read_text() == make_dataset.as_tsv(make_dataset.make(split))
    assert path.stat().st_size < 150_000


@pytest.mark.parametrize("split", ["train", "test"])
def test_classes_are_balanced_and_sentences_distinct(split):
    rows = make_dataset.make(split)
    assert Counter(label for label, _ in rows) == dict.fromkeys(
        make_dataset.CLASSES, make_dataset.ROWS_PER_CLASS[split]
    )
    assert len({sentence for _, sentence in rows}) == len(rows)


def test_training_and_test_share_neither_pair_nor_frame_nor_member():
    train, test = make_dataset.related_pairs("train"), make_dataset.related_pairs("test")

    def pairs(split):
        return {frozenset(pair) for found in split.values() for pair in found}

    def members(split):
        tree = make_dataset.taxonomy(split)
        return {member for found in tree.values() for member in found if member not in tree}

    assert not {frozenset(pair) for pair in train["cycle"]} & {frozenset(pair) for pair in test["cycle"]}
    assert not {frozenset(pair) for pair in train["siblings"] + train["hierarchy"]} & pairs(test)
    assert not members("train") & members("test")
    assert not set(make_dataset.FRAMES["train"]) & set(make_dataset.FRAMES["test"])


@pytest.mark.parametrize("split", ["train", "test"])
def test_no_pair_has_two_classes(split):
    found = make_dataset.related_pairs(split)
    classes = Counter(frozenset(pair) for pairs in found.values() for pair in {frozenset(pair) for pair in pairs})
    assert max(classes.values()) == 1
