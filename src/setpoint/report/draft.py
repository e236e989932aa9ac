"""A draft: a piece of a page with the figures in it; pieces add up to one self-contained file."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

from setpoint.report.drawing import drawing, scheme
from setpoint.report.figures import DARK, Figure
from setpoint.report.numbers import NOTHING
from setpoint.report.values import finite


@dataclass(frozen=True)
class Draft:
    """A piece of the page: HTML, and its figures by the id of their place."""

    html: str
    figures: Mapping[str, Figure] = field(default_factory=dict)

    def __add__(self, other: Draft) -> Draft:
        return Draft(self.html + other.html, {**self.figures, **other.figures})


def document(title: str, body: Draft, script: str = "") -> str:
    """The HTML of a page; `script` is JavaScript that defines `Plotly`, for the figures that are not drawn already."""
    specs = {name: vars(figure) for name, figure in body.figures.items()}
    text = {name: (files("setpoint.report") / f"page.{name}").read_text(encoding="utf-8") for name in ("css", "js")}
    scripts = (
        f'<script type="application/json" id="figures">{inert(specs)}</script>\n'
        f'<script type="application/json" id="dark">{inert(DARK)}</script>\n'
        f"<script>{script}</script>\n<script>\n{text['js']}</script>\n"
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>Setpoint: {escape(title)}</title>\n<style>\n{scheme()}{text['css']}</style>\n</head>\n<body>\n"
        f"<main>\n{body.html}</main>\n"
        f"{scripts if script else ''}</body>\n</html>\n"
    )


def inert(value: Any) -> str:
    """JSON that is safe inside a script element, whatever names it holds; numbers that are not finite become null."""
    text = json.dumps(finite(value), allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def save(page: str, target: Path) -> Path:
    """Write a page completely or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(target.name + ".tmp")
    unfinished.write_text(page, encoding="utf-8")
    unfinished.replace(target)
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


def place_of(name: str, figure: Figure | None, title: str, caption: str) -> Draft:
    """A titled place for a figure; nothing if there is none."""
    if figure is None:
        return Draft("")
    height = int(figure.layout["height"])
    return Draft(
        f'<figure><h4>{escape(title)}</h4><div class="plot" id="{name}" style="min-height:{height}px"></div>'
        f"<figcaption>{caption}</figcaption></figure>\n",
        {name: figure},
    )


def drawn(figure: Figure | None, title: str, caption: str) -> Draft:
    """A titled figure that needs no script; nothing if there is none."""
    if figure is None:
        return Draft("")
    head = f"<figure><h4>{escape(title)}</h4>{drawing(figure, title)}"
    return Draft(f"{head}<figcaption>{caption}</figcaption></figure>\n")


def download(name: str, text: str, titles: Sequence[str], lines: Iterable[Sequence[Any]]) -> Draft:
    """A link that saves numbers, which the page holds, as a file of comma-separated values."""
    written = io.StringIO()
    csv.writer(written, lineterminator="\n").writerows([titles, *lines])
    address = f"data:text/csv;charset=utf-8,{quote(written.getvalue())}"
    return Draft(f'<a download="{escape(name)}" href="{address}">{escape(text)}</a>')
