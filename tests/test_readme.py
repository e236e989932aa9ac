"""Every Python block of the README and of the docs runs as printed, each page in one namespace.

What a page's blocks need but readers don't, goes into a Python block inside an HTML comment: it runs too.
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if page.exists()]
BLOCK = re.compile(r"^(?P<indent>[ \t]*)```python[^\n]*\n(?P<code>.*?)^(?P=indent)```[ \t]*$", re.DOTALL | re.MULTILINE)


def run_blocks(page: Path) -> int:
    """Run the Python blocks of `page` in order, with line numbers that point into the page; return how many."""
    text, namespace = page.read_text(encoding="utf-8"), {"__name__": f"page_{page.stem}"}
    blocks = list(BLOCK.finditer(text))
    for block in blocks:
        lines_above = text.count("\n", 0, block.start("code"))
        code = "\n" * lines_above + textwrap.dedent(block["code"])
        exec(compile(code, str(page), "exec", dont_inherit=True), namespace)
    return len(blocks)


# A budget in milliseconds is read from the clock of a machine that may be busy.
@pytest.mark.filterwarnings("ignore:the budget of .* looks out of reach")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each page's Python blocks run in the order of the page, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    run_blocks(page)


def test_sentences_of_the_readme_are_short() -> None:
    """Claim: no sentence of the README has more than 25 words, in prose, lists and tables that people have written."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"<!--.*?-->|```.*?```", "\n\n", text, flags=re.DOTALL)
    text = re.sub(r"^(?: {4}|#).*$", "\n\n", text, flags=re.MULTILINE)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    paragraphs = re.split(r"\n\s*\n|^\* |\||·", text, flags=re.MULTILINE)
    sentences = [each for part in paragraphs for each in re.split(r"(?<=[.?!:])\s", " ".join(part.split()))]
    assert len(sentences) > 30
    assert not [each for each in sentences if len(each.split()) > 25]


RESULTS = (
    "README.md",
    "docs/results.md",
    "docs/results-by-task.md",
    "docs/results-choices.md",
    "docs/results-costs.md",
    "docs/when-it-pays.md",
    "docs/results-law.md",
)
MEASURED = re.compile(
    r"\d[\d.,]* (?:points|nats)\b|\bby \d[\d.,]*|\d[\d.]* (?:to|and) \d[\d.]* %(?! (?:of the steps|intervals?))"
)


@pytest.mark.parametrize("page", RESULTS)
def test_sentences_state_no_measured_number(page: str) -> None:
    """Claim: on the pages of results a difference, a share or a percentage stands in generated parts only."""
    text = (ROOT / page).read_text(encoding="utf-8")
    written = re.sub(r"<!-- results:.*?<!-- end -->|<!--.*?-->|```.*?```", "", text, flags=re.DOTALL)
    assert MEASURED.findall(" ".join(written.split())) == []
