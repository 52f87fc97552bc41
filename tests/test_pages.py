"""The code of README.md and of the pages in docs/ runs; the configuration page is MoSConfig's; no page is lost.

A page's blocks of Python run one after the other in one namespace, in a folder that has what they name (pages.py). A
comment `<!-- not run: why -->` before a block leaves it out.
"""

from __future__ import annotations

import dataclasses
import pkgutil
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from datasets import load_dataset
from finetune_setup import save_bert
from pages import DATA, prepare
from transformers import AutoModelForCausalLM, AutoTokenizer

import mos_kernels
from mos_kernels import MoSConfig
from mos_kernels.huggingface import apply_mos, save_adapter

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(<!-- not run: .+ -->\n\n?)?```python\n(.*?)```", re.DOTALL)
ROW = re.compile(r"^\| `(\w+)` \| `([^`]*)` \|", re.MULTILINE)
LINK = re.compile(r"\]\(((?!https?:)[^)#\s]*)(?:#([^)]*))?\)")
HEADING = re.compile(r"^#+ +(.+)$", re.MULTILINE)
ELSEWHERE = {"peft.md": "tests/huggingface/test_peft_docs.py"}
"""Pages whose code another file runs."""
APART = ("scale.md",)
"""Pages whose blocks are alternatives: each starts from a model of its own."""


def blocks(page: Path) -> list[str]:
    return [code for skipped, code in BLOCK.findall(page.read_text(encoding="utf-8")) if not skipped]


@pytest.fixture(autouse=True)
def a_process_of_one(request, tmp_path):
    """What torchrun sets up, for the page about several processes."""
    if "scale.md" not in request.node.name:
        yield
        return
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


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
        if page.name in APART:
            scope = setting(page.name)
        exec(compile(code, page.name, "exec"), scope)


def setting(page: str) -> dict:
    """The names that a page takes for given."""
    names = {"__name__": page}
    if page == "training.md":
        rows = [{"input_ids": [2, 5, 6, 7], "labels": [2, 5, 6, 7]}] * 8
        batches = [{"input_ids": torch.tensor([[2, 5, 6, 7]]), "labels": torch.tensor([[2, 5, 6, 7]])}] * 4
        conversations = load_dataset(DATA, split="train")
        return {**names, "model": base(), "data": rows, "batches": batches, "conversations": conversations}
    if page == "scale.md":
        model = base()
        apply_mos(model, MoSConfig(r=4))
        return {**names, "model": model, "loaded": base(), "folder": "peft"}
    if page == "command-line.md":
        save_bert(Path("MODEL"))
        lines = [
            "label\tsentence",
            *(f"{label}\tthe {word} sat" for label, word in [("yes", "cat"), ("no", "tree")] * 4),
        ]
        for file in ("train.tsv", "test.tsv"):
            Path(file).write_text("\n".join(lines) + "\n")
    if page == "serving.md":
        shutil.rmtree("lora")
        model, tokenizer = base(), AutoTokenizer.from_pretrained("base", padding_side="left")
        apply_mos(model, MoSConfig(r=4, init_lora_weights=False))
        save_adapter(model, "adapter")
        batch = {
            "input_ids": torch.tensor([[4, 5, 6, 7], [6, 5, 4, 8]]),
            "labels": torch.tensor([[4, 5, 6, 7], [6, 5, 4, 8]]),
        }
        return {**names, "model": model, "base": base(), "batches": [batch] * 2, "batch": batch, "tokenizer": tokenizer,
                "prompts": ["the cat", "a dog sat"]}  # fmt: skip
    return names


def base():
    return AutoModelForCausalLM.from_pretrained("base")


def test_the_configuration_page_has_every_field_and_its_default():
    text = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    own, _, under_peft = text.partition("## Under peft")
    told = dict(ROW.findall(own))
    defaults = {f.name: repr(getattr(MoSConfig(), f.name)) for f in dataclasses.fields(MoSConfig)}
    assert told == defaults

    from mos_kernels.huggingface import MoSPeftConfig

    for name, default in ROW.findall(under_peft):
        assert repr(getattr(MoSPeftConfig(), name)) == default


@pytest.mark.parametrize(
    "page",
    [*PAGES, *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "tests/README.md"))],
    ids=lambda page: page.relative_to(ROOT).as_posix(),
)
def test_links_lead_somewhere(page):
    for target, heading in LINK.findall(page.read_text(encoding="utf-8")):
        file = page.parent / target if target else page
        assert file.exists(), f"{page.name} links to {target}"
        if heading:
            anchors = {anchor(found) for found in HEADING.findall(file.read_text(encoding="utf-8"))}
            assert heading in anchors, f"{page.name} links to {target}#{heading}, and there is {sorted(anchors)}"


def anchor(heading: str) -> str:
    """The name of a heading in a link, as GitHub and mkdocs make it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_every_page_is_in_the_sites_navigation():
    named = set(re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE))
    assert {path.name for path in (ROOT / "docs").glob("*.md")} == {name for name in named if "/" not in name}


def test_the_api_page_names_what_exists_and_leaves_out_nothing_public():
    named = set()
    for block in re.split(r"^::: ", (ROOT / "docs/api.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        path, _, options = block.partition("\n")
        owner = pkgutil.resolve_name(path)
        listed = re.search(r"members:(?: \[(.*)\]|((?:\n +- \w+)+))", options)
        members = re.findall(r"\w+", " ".join(filter(None, listed.groups()))) if listed else []
        assert [name for name in members if not getattr(getattr(owner, name), "__doc__", None)] == []
        named |= {*members, path.rpartition(".")[2]}
    public = {*mos_kernels.__all__, *mos_kernels.huggingface.__all__} - {"__version__", "Idle", "MoSPeftModel"}
    assert public <= named


def test_the_readme_fits_a_page():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120
