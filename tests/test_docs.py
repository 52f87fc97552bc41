"""Every test and test file that a page of docs/ names exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [*(ROOT / "tests").rglob("test_*.py"), *(ROOT / "tests").rglob("checks_*.py")]
NAMES = {name for path in SOURCES for name in re.findall(r"def (test_\w+)\(", path.read_text())}


@pytest.mark.parametrize("page", ["training.md", "peft.md", "scale.md"])
def test_the_tests_that_a_page_names_exist(page):
    text = (ROOT / "docs" / page).read_text()
    named = {name for name in re.findall(r"\btest_\w+\b(?!\.py|\w)", text)}
    files = set(re.findall(r"\btest_\w+\.py", text))
    assert named <= NAMES, named - NAMES
    assert files <= {path.name for path in SOURCES}
    assert len(named) >= 12
    for file, name in re.findall(r"\b(test_\w+\.py)::(test_\w+)", text):
        assert any(f"def {name}(" in path.read_text() for path in SOURCES if path.name == file), f"{file}::{name}"
