"""The code of README.md and of the pages in docs/ runs; the configuration page is MoSConfig's; no page is lost.

A page's blocks of Python run one after the other in one namespace, in a folder that has what they name (pages.py). A
comment `<!-- not run: why -->` before a block leaves it out.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from pages import prepare

from mos_kernels import MoSConfig

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(<!-- not run: .+ -->\n\n?)?```python\n(.*?)```", re.DOTALL)
ROW = re.compile(r"^\| `(\w+)` \| `([^`]*)` \|", re.MULTILINE)
LINK = re.compile(r"\]\(((?!https?:)[^)#\s]+)(?:#[^)]*)?\)")
ELSEWHERE = {"peft.md": "tests/huggingface/test_peft_docs.py"}
"""Pages whose code another file runs."""


def blocks(page: Path) -> list[str]:
    return [code for skipped, code in BLOCK.findall(page.read_text(encoding="utf-8")) if not skipped]


@pytest.mark.budget(12)
@pytest.mark.parametrize(
    "page", [p for p in PAGES if p.name not in ELSEWHERE and blocks(p)], ids=lambda page: page.name
)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path)
    torch.manual_seed(0)
    scope = setting(page.name)
    for code in blocks(page):
        exec(compile(code, page.name, "exec"), scope)


def setting(page: str) -> dict:
    """The names that a page takes for given."""
    return {"__name__": page}


def test_the_configuration_page_has_every_field_and_its_default():
    text = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    own, _, under_peft = text.partition("## Under peft")
    told = dict(ROW.findall(own))
    defaults = {f.name: repr(getattr(MoSConfig(), f.name)) for f in dataclasses.fields(MoSConfig)}
    assert told == defaults

    from mos_kernels.huggingface import MoSPeftConfig

    for name, default in ROW.findall(under_peft):
        assert repr(getattr(MoSPeftConfig(), name)) == default


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_page_is_in_the_sites_navigation():
    named = set(re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE))
    assert {path.name for path in (ROOT / "docs").glob("*.md")} == {name for name in named if "/" not in name}


def test_the_readme_fits_a_page():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120
