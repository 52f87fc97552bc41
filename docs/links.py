"""Hooks of mkdocs (see mkdocs.yml): files outside of docs/ that its pages link to become part of the site.

In the repository such a link is `../PATH`. The file is copied into the site as PATH, beside the pages.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
OUTSIDE = re.compile(r"\]\((?:\.\./)+([^)#\s]+)")
PICTURE = re.compile(r"!\[[^\]]*\]\(([^)#\s]+)")


def on_files(files, config):
    wanted = []
    for page in list(files.documentation_pages()):
        for target in OUTSIDE.findall(Path(page.abs_src_path).read_text(encoding="utf-8")):
            path = ROOT / target
            wanted.append(path)
            if path.suffix == ".md":
                wanted += [path.parent / picture for picture in PICTURE.findall(path.read_text(encoding="utf-8"))]
    for path in dict.fromkeys(wanted):
        name = path.relative_to(ROOT).as_posix()
        if path.is_file() and name not in files.src_uris:
            files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown, page, config, files):
    if not Path(page.file.abs_src_path).is_relative_to(ROOT / "docs"):
        return markdown
    return OUTSIDE.sub(lambda match: "](" + "../" * page.file.src_uri.count("/") + match[1], markdown)
