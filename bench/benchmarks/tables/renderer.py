"""The renderer: a block is declared by rows of texts under headings, and becomes Markdown in one place."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from setpoint.report.numbers import NOTHING
from setpoint_bench.report.columns import interval_text
from setpoint_bench.report.statistics import Difference

ROOT = Path(__file__).resolve().parents[3]
RESULTS = ROOT / "results"

Record = dict[str, Any]


def table(rows: Iterable[Mapping[str, str]], note: str = "", left: int = 1) -> str:
    """A Markdown table.

    Args:
        rows: for each line its cells by heading; the headings are those of all rows, in the order of appearance, and
            a cell that a row lacks is a dash.
        note: what the numbers were measured on, and what else stands below the table; "" for none.
        left: number of columns, from the first, that hold words and not numbers.
    """
    lines = list(rows)
    headings = list(dict.fromkeys(heading for line in lines for heading in line))
    cells = [[line.get(heading, NOTHING) for heading in headings] for line in lines]
    alignment = ["---"] * left + ["---:"] * (len(headings) - left)
    body = [f"| {' | '.join(line)} |" for line in (headings, *cells)]
    body.insert(1, f"|{'|'.join(alignment)}|")
    return "\n".join([*body, *(["", note] if note else [])])


Spec = Callable[[], str]
SPECS: dict[str, Spec] = {}
"""By the name in a page's marker, what makes the text between the markers."""


def block(name: str) -> Callable[[Spec], Spec]:
    """Decorate a function that makes the text of the block of this name."""

    def register(make: Spec) -> Spec:
        SPECS[name] = make
        return make

    return register


def record_block(name: str, file: str) -> Callable[[Callable[[Record], str]], Callable[[Record], str]]:
    """Decorate a function that makes a block from one JSON file of results/; without the file the block says so."""

    def register(make: Callable[[Record], str]) -> Callable[[Record], str]:
        def from_file() -> str:
            path = RESULTS / file
            if not path.is_file():
                return f"Not measured yet: `results/{file}` does not exist."
            return make(json.loads(path.read_text(encoding="utf-8")))

        SPECS[name] = from_file
        return make

    return register


# Words that several tables share.


def svg(parts: Sequence[str], width: int, height: int, label: str) -> str:
    """A picture of these parts, on a ground that follows the reader's light or dark theme."""
    style = (
        "text { font: 12px system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif; fill: #1c2430; } "
        ".axis { stroke: #c4cad3; } .ground { fill: #ffffff; } @media (prefers-color-scheme: dark) "
        "{ text { fill: #e6eaf0; } .axis { stroke: #3a4350; } .ground { fill: #12181f; } }"
    )
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{label}">'
    ground = '<rect class="ground" width="100%" height="100%"/>'
    return "\n".join([head, f"<style>{style}</style>", ground, *parts, "</svg>\n"])


def threads_text(environment: Mapping[str, object]) -> str:
    return f"{environment['threads']} thread{'s' * (str(environment['threads']) != '1')}"


def made_on(record: Record) -> str:
    """Machine, version of PyTorch and date of one record."""
    about = record["environment"]
    return f"{about['cpu']}, {threads_text(about)}, torch {about['torch']}, {record['date'][:10]}."


def rows_made_on(rows: Sequence[Mapping[str, Any]]) -> str:
    """The same from rows that each name machine and date; dates of one machine are listed once."""
    dates: dict[str, set[str]] = {}
    for row in rows:
        machine = f"{row['cpu']}, {threads_text(row)}, torch {row['torch']}"
        dates.setdefault(machine, set()).add(row["date"][:10])
    return "; ".join(f"{machine}, {' and '.join(sorted(of_machine))}" for machine, of_machine in dates.items()) + "."


def marked(found: Difference | None, metric: str) -> str:
    """A difference with its interval, bold where that excludes 0."""
    if found is None:
        return NOTHING
    text = interval_text(found, metric)
    return f"**{text}**" if found.clear else text
