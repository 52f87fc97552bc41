"""Every test and test file that a page names exists, the test in the file that the page says."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = {path.name: path for path in (ROOT / "tests").rglob("*.py") if path.name.startswith(("test_", "checks_"))}
PAGES = {"tests/README.md": None, "docs/peft.md": "test_peft_model.py"}
"""Each page, and the file of names that stand alone in it; elsewhere that is the file named last."""
SHORT = {
    **{name: f"checks_{name}.py" for name in ("ddp", "fsdp", "trainer_fsdp", "accelerate", "deepspeed")},
    "tp": "checks_tensor_parallel.py",
    "bases": "test_bases.py",
    "loaded": "test_loaded_bases.py",
}
NAMED = re.compile(
    rf"\b(?P<short>{'|'.join(SHORT)}) (?=`test_)"
    r"|`(?:tests/(?:\w+/)*)?(?P<file>\w+\.py)?(?P<mark>::)?(?P<test>test_\w+(?!\.py|\w))?`"
)


def named_in(page: str) -> set[tuple[str, str | None]]:
    """(file, test) of every test that the page names; the test None where it names a file alone."""
    found, file = set(), None
    for match in NAMED.finditer((ROOT / page).read_text(encoding="utf-8")):
        if match["short"]:
            file = SHORT[match["short"]]
            continue
        if match["file"]:
            if not match["file"].startswith(("test_", "checks_")):
                continue
            file = match["file"]
        elif match["test"] and not match["mark"]:
            file = PAGES[page] or file
        if match["file"] or match["test"]:
            found.add((file, match["test"]))
    return found


@pytest.mark.parametrize("page", PAGES)
def test_the_tests_that_a_page_names_exist(page):
    named = named_in(page)
    assert len({test for _, test in named if test}) >= 12
    for file, test in sorted(named, key=str):
        assert file in FILES, f"{page} names {file}"
        assert test is None or f"def {test}(" in FILES[file].read_text(encoding="utf-8"), f"{page}: {file}::{test}"
