"""Hooks of mkdocs (see mkdocs.yml): files outside of docs/ that its pages link to become part of the site.

A page in docs/ links to them as `../PATH`. The file is copied into the site as PATH, beside the pages.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
UPWARD = re.compile(r"\]\((\.\./[^)#\s]+)")
PICTURE = re.compile(r"!\[[^\]]*\]\(([^)#\s]+)")


def outside(page: Path, link: str) -> Path | None:
    """The file that a page's link leads to, relative to the repository, where it is outside of docs/."""
    target = (page.parent / link).resolve()
    known = target.is_file() and target.is_relative_to(ROOT) and not target.is_relative_to(DOCS)
    return target.relative_to(ROOT) if known else None


def on_files(files, config):
    wanted = []
    for page in [Path(file.abs_src_path) for file in files.documentation_pages()]:
        for target in filter(None, (outside(page, link) for link in UPWARD.findall(page.read_text(encoding="utf-8")))):
            wanted.append(target)
            if target.suffix == ".md":
                pictures = PICTURE.findall((ROOT / target).read_text(encoding="utf-8"))
                wanted += filter(None, (outside(ROOT / target, picture) for picture in pictures))
    for target in dict.fromkeys(wanted):
        files.append(File(target.as_posix(), str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown, page, config, files):
    source, up = Path(page.file.abs_src_path), "../" * page.file.src_uri.count("/")

    def rewritten(match: re.Match) -> str:
        if source.is_relative_to(DOCS):
            target = outside(source, match[1])
        else:  # a file that was copied into the site: its links into docs/ lead to the site's pages
            target = (source.parent / match[1]).resolve()
            target = target.relative_to(DOCS) if target.is_relative_to(DOCS) else None
        return f"]({up}{target.as_posix()}" if target else match[0]

    return UPWARD.sub(rewritten, markdown)
