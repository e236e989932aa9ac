"""The page holds every section, stands alone, and survives names and folders of any kind."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from setpoint_bench.report.folder import read_results
from setpoint_bench.report.page import render, write_page

ROOT = Path(__file__).resolve().parents[3]

SECTIONS = (
    "What it costs",
    "All numbers",
    "Against its rivals",
    "How training went",
    "How the budget was met",
    "Decision by decision",
    "Spent against reference",
    "Price of FLOPs",
    "Units of each group: what was dropped when, and why",
    "Environment",
)


class Elements(HTMLParser):
    """Collects the elements of a page, with their attributes, and the visible text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1][0] not in ("script", "style"):
            self.text += data


def page_of(folder: Path) -> str:
    return render(read_results(folder))


def test_the_page_has_every_section(make_results: Any) -> None:
    """A folder with everything in it gives a page with every section and figure, the budget first."""
    page = page_of(make_results())
    seen = Elements(page)
    assert [section for section in SECTIONS if section not in seen.text] == []
    drawn = [attrs["aria-label"] for tag, attrs in seen.elements if tag == "svg" and attrs.get("role") == "img"]
    assert drawn[0] == "How the budget was met: FLOPs per step" and "Accuracy against training FLOPs" in drawn


def test_the_page_stands_alone(make_results: Any, tmp_path: Path) -> None:
    """The page refers to no other file or address, and runs no script."""
    target = write_page(make_results(), tmp_path / "deep" / "report.html")
    page = target.read_text(encoding="utf-8")
    seen = Elements(page)
    assert [tag for tag, attrs in seen.elements if {"src", "action", "srcset"} & attrs.keys()] == []
    assert [attrs["href"] for _, attrs in seen.elements if "href" in attrs] == []
    assert [tag for tag, _ in seen.elements if tag in ("link", "iframe", "base", "object", "embed", "script")] == []
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style and "@import" not in style


def test_hostile_names_stay_text(make_results: Any) -> None:
    """Names with markup appear as text: no element, no end of a script element, no template placeholder."""
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>%{y}"
    folder = make_results(task=evil, environment={evil: evil}, date=evil)
    for ledger in folder.glob("*/ledger.jsonl"):
        evil_json = json.dumps(evil)[1:-1]
        text = ledger.read_text()
        for name in ("stem.conv", "worth below the price", "channel", '"flops"'):
            text = text.replace(name, evil_json if name != '"flops"' else f'"{evil_json}"')
        ledger.write_text(text)
    page = page_of(folder)
    seen = Elements(page)
    assert [tag for tag, _ in seen.elements if tag in ("img", "script")] == []
    assert evil in seen.text and f"of 16 {evil}s" in seen.text  # the latter in a figure


def test_a_page_with_a_run_that_diverged(make_results: Any) -> None:
    """A metric that is not a number, or missing, stands there as unknown; the page is drawn."""
    folder = make_results(seeds=(0,))
    path = folder / "results.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line, value in zip(lines, (float("nan"), None), strict=False):
        line["value"] = value
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = page_of(folder)
    assert "not a number" in page and not re.search(r'd="[^"]*nan|:nan%', page)
