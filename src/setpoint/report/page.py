"""A page: one self-contained HTML file without scripts, made of pieces of HTML."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

from setpoint.ledger import replace_text
from setpoint.report.drawing import drawing, scheme
from setpoint.report.figures import Figure
from setpoint.report.numbers import NOTHING


def document(title: str, body: str) -> str:
    """The HTML of a page."""
    style = (files("setpoint.report") / "page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>Setpoint: {escape(title)}</title>\n<style>\n{scheme()}{style}</style>\n</head>\n<body>\n"
        f"<main>\n{body}</main>\n</body>\n</html>\n"
    )


def save(page: str, target: Path) -> Path:
    """Write a page completely or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    replace_text(target, page)
    return target


def pair(text: str, *below: str) -> str:
    """A table cell's content, with smaller lines below."""
    return escape(text) + "".join(f"<small>{escape(line)}</small>" for line in below if line and line != NOTHING)


def html_table(titles: Iterable[str], lines: Iterable[Sequence[str]], classes: str = "") -> str:
    """A table whose first column names the line; cells are HTML already."""
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in titles)
    rest = ((first, "".join(f"<td>{cell}</td>" for cell in cells)) for first, *cells in lines)
    body = "".join(f'<tr><th scope="row">{first}</th>{cells}</tr>\n' for first, cells in rest)
    return f'<table class="{classes}"><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>'


def width(full: float, kept: float) -> str:
    """A bar in a table: its outline is `full` of the column, and `kept` of it is filled."""
    return f'<i class="width" style="--full:{full:.4f};--kept:{kept:.4f}"></i>'


def drawn(figure: Figure | None, title: str, caption: str) -> str:
    """A titled figure; nothing if there is none."""
    if figure is None:
        return ""
    return f"<figure><h4>{escape(title)}</h4>{drawing(figure, title)}<figcaption>{caption}</figcaption></figure>\n"


def download(name: str, text: str, titles: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """A link that saves numbers, which the page holds, as a file of comma-separated values."""
    written = io.StringIO()
    csv.writer(written, lineterminator="\n").writerows([titles, *lines])
    address = f"data:text/csv;charset=utf-8,{quote(written.getvalue(), safe=',/:;')}"
    return f'<a download="{escape(name)}" href="{address}">{escape(text)}</a>'
