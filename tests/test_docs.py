"""Every test, parameter set and test file that a page of docs/ names exists, in the file that the page says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = {path.name: path for path in (ROOT / "tests").rglob("*.py") if path.name.startswith(("test_", "checks_"))}
PAGES = {"training.md": None, "peft.md": "test_peft_tuner.py", "scale.md": None}
"""Each page, and the file of names that stand alone in it; elsewhere that is the file named last."""
SHORT = {
    **{name: f"checks_{name}.py" for name in ("ddp", "fsdp", "accelerate", "deepspeed")},
    "tp": "checks_tensor_parallel.py",
    "bases": "test_bases.py",
    "loaded": "test_loaded_bases.py",
}
NAMED = re.compile(
    rf"\b(?P<short>{'|'.join(SHORT)}) (?=`test_)"
    r"|`(?:tests/(?:\w+/)*)?(?P<file>\w+\.py)?(?P<mark>::)?(?P<test>test_\w+(?!\.py|\w))?(?P<set>\[[^\]`]+\])?`"
)


def named_in(page: str) -> set[tuple[str, str | None, str | None]]:
    """(file, test, parameter set) of every test that the page names, the latter two None where it names none."""
    found, file, test = set(), None, None
    for match in NAMED.finditer((ROOT / "docs" / page).read_text(encoding="utf-8")):
        if match["short"]:
            file = SHORT[match["short"]]
            continue
        if match["file"]:
            if not match["file"].startswith(("test_", "checks_")):
                continue
            file, test = match["file"], None
        elif match["test"] and not match["mark"]:
            file = PAGES[page] or file
        test = match["test"] or test
        if match["file"] or match["test"] or (match["set"] and re.search(r"[a-z]", match["set"]) and test):
            found.add((file, test, match["set"]))
    return found


@pytest.mark.parametrize("page", PAGES)
def test_the_tests_that_a_page_names_exist(page):
    named = named_in(page)
    assert len({test for _, test, _ in named if test}) >= 12
    for file, test, _ in sorted(named, key=str):
        assert file in FILES, f"{page} names {file}"
        assert test is None or f"def {test}(" in FILES[file].read_text(encoding="utf-8"), f"{page}: {file}::{test}"


def test_the_parameter_sets_that_a_page_names_exist():
    named = {entry for page in PAGES for entry in named_in(page) if entry[2]}
    assert named
    files = sorted({str(FILES[file]) for file, _, _ in named})
    collected = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *files],
        cwd=ROOT, env={**os.environ, "PYTEST_ADDOPTS": ""}, text=True, stdout=subprocess.PIPE, timeout=300,
    ).stdout  # fmt: skip
    nodes = set(re.findall(r"(\w+\.py::\S.*)", collected))
    for file, test, parameters in sorted(named):
        assert f"{file}::{test}{parameters}" in nodes, (file, test, parameters)
