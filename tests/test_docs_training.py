"""Every test that docs/training.md names exists."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_tests_that_the_page_names_exist():
    page, sources = (ROOT / "docs/training.md").read_text(), {}
    for line in page.splitlines():
        for file in re.findall(r"`?((?:tests/[\w/]*)?test_\w+\.py)", line):
            path = ROOT / file if file.startswith("tests/") else ROOT / "tests/huggingface" / file
            sources[file] = path.read_text()
    for name in re.findall(r"::(test_\w+)", page):
        assert any(f"def {name}(" in source for source in sources.values()), name
    assert len(sources) >= 6 and len(re.findall(r"::test_\w+", page)) > 30
