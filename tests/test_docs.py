"""Every test and test file that a page names exists, the test in the file that the page says."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = {path.name: path for path in (ROOT / "tests").rglob("*.py") if path.name.startswith(("test_", "checks_"))}
PAGES = {path.name: path for path in (*(ROOT / "docs").glob("*.md"), ROOT / "tests/README.md")}
DEFAULT = {"The peft method": "test_peft_model.py"}
"""For a section, the file of names that stand alone in it; elsewhere that is the file named last."""
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
    for section in re.split(r"^#+ +", PAGES[page].read_text(encoding="utf-8"), flags=re.MULTILINE):
        default = DEFAULT.get(section.partition("\n")[0].strip())
        for match in NAMED.finditer(section):
            if match["short"]:
                file = SHORT[match["short"]]
                continue
            if match["file"]:
                if not match["file"].startswith(("test_", "checks_")):
                    continue
                file = match["file"]
            elif match["test"] and not match["mark"]:
                file = default or file
            if match["file"] or match["test"]:
                found.add((file, match["test"]))
    return found


@pytest.mark.parametrize("page", sorted(PAGES))
def test_the_tests_that_a_page_names_exist(page):
    for file, test in sorted(named_in(page), key=str):
        assert file in FILES, f"{page} names {file}"
        assert test is None or f"def {test}(" in FILES[file].read_text(encoding="utf-8"), f"{page}: {file}::{test}"


def test_names_are_found():
    assert len({test for page in PAGES for _, test in named_in(page) if test}) >= 70
