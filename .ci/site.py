"""Hooks of mkdocs: what the site needs of pages that are written for the repository."""

from __future__ import annotations

import re
from pathlib import Path
from textwrap import indent
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CODE = re.compile(r"^```python\n.*?^```$", re.DOTALL | re.MULTILINE)
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
OUTSIDE = re.compile(r"\]\((?:\.\./)+(?P<path>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Fold the code in comments, take out other comments, and let links out of docs/ lead to the repository.

    Comments hold what a page's code needs to run, such as a model and data.

    Raises:
        FileNotFoundError: a link leads to no file.
    """
    folder = Path(config.docs_dir, page.file.src_uri).parent

    def absolute(match: re.Match[str]) -> str:
        up = match[0][2:].partition(match["path"])[0]
        target = (folder / up / match["path"]).resolve()
        if target.is_relative_to(config.docs_dir):
            return match[0]
        if not target.exists():
            raise FileNotFoundError(f"{page.file.src_uri} links to {target}, which is not there")
        kind = "tree" if target.is_dir() else "blob"
        return f"]({config.repo_url}/{kind}/main/{target.relative_to(ROOT)}{match['anchor'] or ''})"

    return OUTSIDE.sub(absolute, COMMENT.sub(folded, markdown))


def folded(comment: re.Match[str]) -> str:
    """The code of a comment as a box that opens; nothing for a comment without code."""
    code = CODE.search(comment[0])
    return '??? example "Code that this page also needs"\n' + indent(code[0], "    ") + "\n" if code else ""
