"""The page: one self-contained, interactive HTML file made from a results folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from setpoint.report import decisions
from setpoint.report.figures import (
    DARK,
    PARTS,
    Figure,
    curves,
    plotly_script,
    seconds_by_part,
    seconds_figure,
)
from setpoint.report.numbers import NOTHING, digits, duration, human, percent
from setpoint.report.results import Cell, Record, Results, read_results
from setpoint.report.summary import (
    DENSE,
    Row,
    difference_text,
    landed_text,
    metric_text,
    overhead_text,
    seconds_text,
    series,
    summary_rows,
)

MOST_RUNS = 12
"""How many runs of a task are shown decision by decision, so that the file stays small."""

NOTES = """
<dl class="notes">
<dt>FLOPs per step</dt><dd>Forward and backward pass of one optimizer step of the finished model.</dd>
<dt>Training FLOPs, training time</dt><dd>The whole run with everything Setpoint did in it; evaluation is left out.</dd>
<dt>Overhead</dt><dd>The part of the training time that was Setpoint's: attaching (tracing the model, trying cuts on a
copy), sensing, deciding, resizing.</dd>
<dt>Time saved / FLOPs saved</dt><dd>Both as shares of the dense run; 1 means that every FLOP saved was time saved.</dd>
<dt>Ahead from step</dt><dd>From this step on the run had taken less time than the dense run.</dd>
<dt>±</dt><dd>Sample standard deviation over seeds. Differences to dense are paired by seed.</dd>
</dl>
"""


@dataclass(frozen=True)
class Draft:
    """A piece of the page: HTML, and the figures it has places for, by id."""

    html: str
    figures: Mapping[str, Figure] = field(default_factory=dict)

    def __add__(self, other: Draft) -> Draft:
        return Draft(self.html + other.html, {**self.figures, **other.figures})


def write_page(results_dir: Path, out: Path | None = None) -> Path:
    """Write the report of a results folder.

    Args:
        results_dir: a folder as docs/results-format.md describes it.
        out: the file to write; `report.html` in the results folder by default.

    Returns:
        The file written. It needs no network and no other file.

    Raises:
        ReportError: if the folder holds no results, or of an unknown schema.
        ModuleNotFoundError: if plotly is not installed.
    """
    results = read_results(results_dir)
    target = results_dir / "report.html" if out is None else out
    return save(render(results, plotly_script()), target)


def save(page: str, target: Path) -> Path:
    """Write a page whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(target.name + ".tmp")
    unfinished.write_text(page, encoding="utf-8")
    unfinished.replace(target)
    return target


def render(results: Results, script: str) -> str:
    """The HTML of the report.

    Args:
        results: what to show.
        script: JavaScript that defines `Plotly`.
    """
    rows = summary_rows(results)
    body = Draft(header(results))
    for place, task in enumerate(results.tasks()):
        body += task_section(f"t{place}", task, results.of(task), [row for row in rows if row.task == task])
    body += Draft(remarks(results.remarks) + environment(results.cells))
    return document(", ".join(results.tasks()), body, script)


def document(title: str, body: Draft, script: str) -> str:
    """The HTML of a page.

    Args:
        title: what it is about.
        body: what it shows.
        script: JavaScript that defines `Plotly`.
    """
    specs = {
        name: {"data": figure.data, "layout": figure.layout, "abscissas": figure.abscissas}
        for name, figure in body.figures.items()
    }
    text = {name: (files("setpoint.report") / f"page.{name}").read_text(encoding="utf-8") for name in ("css", "js")}
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>Setpoint: {escape(title)}</title>\n<style>\n{text['css']}</style>\n</head>\n<body>\n"
        f"<main>\n{body.html}</main>\n"
        f'<script type="application/json" id="figures">{inert(specs)}</script>\n'
        f'<script type="application/json" id="dark">{inert(DARK)}</script>\n'
        f"<script>{script}</script>\n<script>\n{text['js']}</script>\n</body>\n</html>\n"
    )


def inert(value: Any) -> str:
    """JSON that can stand inside a script element, whatever names it holds."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def header(results: Results) -> str:
    """Title, and what the page is about."""
    dates = sorted(cell.date[:10] for cell in results.cells if cell.date)
    runs = f"{len(results.cells)} run{'s' if len(results.cells) != 1 else ''}"
    told = f"{runs} · {escape(dates[-1])}" if dates else runs
    return f"<header><h1>Setpoint <span>report</span></h1><p>{told}</p></header>\n"


def task_section(name: str, task: str, cells: Sequence[Cell], rows: Sequence[Row]) -> Draft:
    """Everything about one task."""
    groups = series(cells)
    draft = Draft(f'<section id="{name}">\n<h2>{escape(task)}</h2>\n{headline(rows)}{cards(rows)}{table(rows)}')
    draft += curve_section(name, groups)
    draft += run_section(name, groups)
    draft += seconds_section(name, groups)
    return draft + Draft("</section>\n")


def headline(rows: Sequence[Row]) -> str:
    """The result in words: what Setpoint reached, beside dense and small."""
    told = []
    for row in rows:
        if row.method != "setpoint":
            continue
        text = f"At {percent(row.final_flops_ratio)} of the dense FLOPs per step, <b>{escape(row.label)}</b> reaches "
        text += f"<b>{metric_text(row)}</b> {escape(row.metric)}"
        text += f", {difference_text(row)} to dense" if row.difference else ""
        told.append(text + (f", in {percent(row.seconds_ratio)} of its training time." if row.seconds_ratio else "."))
    for row in rows:
        if row.method == "small" and told:
            told.append(f"A <b>{escape(row.label)}</b> dense model from scratch reaches {metric_text(row)}.")
    return f'<p class="headline">{" ".join(told)}</p>\n' if told else ""


def cards(rows: Sequence[Row]) -> str:
    """The few numbers that matter, for the first Setpoint row."""
    row = next((row for row in rows if row.method == "setpoint"), None)
    if row is None:
        return ""
    dense = next((other for other in rows if other.method == DENSE), None)
    shown = (
        (f"{row.metric} on {row.split}", metric_text(row), "" if not dense else f"dense {metric_text(dense)}"),
        ("FLOPs per step", percent(row.final_flops_ratio), f"of dense, {human(row.final_flops, 'FLOP')}"),
        ("parameters", percent(row.final_params_ratio), f"of dense, {human(row.final_params)}"),
        ("training time", percent(row.seconds_ratio), f"of dense, {seconds_text(row)}"),
        ("overhead", overhead_text(row).partition(" (")[0], overhead_text(row).partition(" (")[2].rstrip(")")),
    )
    items = "".join(
        f"<li><span>{escape(title)}</span><strong>{escape(value)}</strong><small>{escape(note)}</small></li>"
        for title, value, note in shown
        if value != NOTHING
    )
    return f'<ul class="cards">{items}</ul>\n'


def table(rows: Sequence[Row]) -> str:
    """The summary table of a task."""
    first = rows[0]
    titles = (
        *("method", f"{first.metric} on {first.split}", "to dense", "FLOPs per step", "parameters", "training FLOPs"),
        *("training time", "overhead", "time saved / FLOPs saved", "ahead from step", "cuts", "in budget"),
    )
    lines = [[pair(text) if isinstance(text, str) else pair(*text) for text in texts(row)] for row in rows]
    seeds = sorted({row.num_seeds for row in rows})
    counted = f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else str(seeds[0])
    caption = f"Each row is over {counted} seed{'s' if seeds[-1] > 1 else ''}; small figures are shares of dense."
    return (
        f'<div class="scroll">{html_table(titles, lines, classes="summary")}</div>\n<p class="caption">{caption}</p>\n'
        f"<details><summary>What the columns mean</summary>{NOTES}</details>\n"
    )


def texts(row: Row) -> tuple[str | tuple[str, str], ...]:
    """A row's cells: a text, or a text with a smaller one below."""
    landed = NOTHING if row.num_landed is None else landed_text(row.num_landed, row.num_seeds)
    return (
        row.label,
        metric_text(row),
        difference_text(row),
        (human(row.final_flops, "FLOP"), percent(row.final_flops_ratio)),
        (human(row.final_params), percent(row.final_params_ratio)),
        (human(row.train_flops, "FLOP"), percent(row.train_flops_ratio)),
        (seconds_text(row), percent(row.seconds_ratio)),
        overhead_text(row),
        NOTHING if row.realised is None else digits(row.realised),
        NOTHING if row.break_even_step is None else f"{row.break_even_step:,.0f}",
        NOTHING if not row.resizes else digits(row.resizes),
        landed,
    )


def pair(text: str, below: str = "") -> str:
    """A table cell's content, with a smaller line below."""
    return escape(text) + (f"<small>{escape(below)}</small>" if below and below != NOTHING else "")


def html_table(titles: Iterable[str], lines: Iterable[Sequence[str]], classes: str = "") -> str:
    """A table whose first column names the line; cells are HTML already."""
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in titles)
    body = "".join(
        f'<tr><th scope="row">{cells[0]}</th>{"".join(f"<td>{cell}</td>" for cell in cells[1:])}</tr>\n'
        for cells in lines
    )
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


def curve_section(name: str, groups: Mapping[str, Sequence[Cell]]) -> Draft:
    """Loss and accuracy over the run, against steps, seconds or FLOPs."""
    figures = {quantity: curves(groups, quantity) for quantity in ("loss", "accuracy")}
    if not any(figures.values()):
        return Draft("")
    names = (("step", "steps"), ("seconds", "seconds"), ("flops", "training FLOPs"))
    buttons = "".join(
        f'<button type="button" data-axis="{axis}" aria-pressed="{str(axis == "step").lower()}">{text}</button>'
        for axis, text in names
    )
    draft = Draft(
        f'<h3>How training went</h3>\n<div class="choice" role="group" aria-label="against" data-task="{name}">'
        f'<span>against</span>{buttons}</div>\n<div class="two">'
    )
    draft += place_of(
        f"{name}-loss",
        figures["loss"],
        "Loss",
        "Thin: training, averaged over stretches of steps. Marked: validation and test.",
    )
    draft += place_of(f"{name}-accuracy", figures["accuracy"], "Accuracy", "Click a name to hide its curves.")
    return draft + Draft("</div>\n")


def run_section(name: str, groups: Mapping[str, Sequence[Cell]]) -> Draft:
    """How the budget was met, for each run with a ledger; one run is shown at a time."""
    runs = [
        (f"{label}, seed {cell.seed}" if cell.seed is not None else label, cell.record)
        for label, cells in groups.items()
        for cell in cells
        if cell.record is not None
    ]
    if not runs:
        return Draft("")
    shown = runs[:MOST_RUNS]
    options = "".join(f'<option value="{name}-r{i}">{escape(label)}</option>' for i, (label, _) in enumerate(shown))
    picker = f'<label class="choice"><span>run</span><select data-runs="{name}">{options}</select></label>\n'
    draft = Draft("<h3>How the budget was met</h3>\n" + (picker if len(shown) > 1 else ""))
    for place, (label, record) in enumerate(shown):
        draft += run(f"{name}-r{place}", label, record, hidden=place > 0)
    left = len(runs) - len(shown)
    return draft + Draft(f'<p class="caption">{left} more runs are not shown one by one.</p>\n' if left else "")


def run(name: str, label: str, record: Record, *, hidden: bool) -> Draft:
    """The decisions of one run."""
    told = f'<p class="caption"><b>{escape(label)}</b>: {escape(decisions.ledger_line(record))}</p>\n'
    draft = Draft(f'<div class="run" id="{name}"{" hidden" if hidden else ""}>\n{told}')
    main = decisions.resources(record)
    for resource in main:
        draft += place_of(
            f"{name}-spent-{len(draft.figures)}",
            decisions.spending(record, resource),
            f"Spent against reference: {decisions.NAMES.get(resource, resource)} per step",
            "The reference leads from the dense cost to the budget; a triangle is a cut, and its text tells why.",
        )
        draft += place_of(
            f"{name}-price-{len(draft.figures)}",
            decisions.price(record, resource),
            f"Price of {decisions.NAMES.get(resource, resource)}",
            "Loss per unit of resource: a unit stays while its worth is at least the price.",
        )
    draft += place_of(
        f"{name}-widths",
        decisions.widths(record),
        "Width of each group",
        "Active units / units of the dense model, by group, over steps.",
    )
    draft += place_of(
        f"{name}-units",
        decisions.timeline(record, main[0] if main else None),
        "What was dropped when, and why",
        "Each line is a unit; a marker ends it, and tells its worth, saliency, the price and the reason. "
        "Blue: worth next to nothing. Orange: a close call.",
    )
    told = "".join(entries_table(record, resource) for resource in main or (None,))
    return draft + Draft(f"{group_seconds_table(record)}{told}</div>\n")


def group_seconds_table(record: Record) -> str:
    """Where the time of a step goes, folded away; nothing where seconds were not predicted."""
    found = decisions.seconds_by_group(record)
    if not found:
        return ""
    dense = record.dense.get("latency")
    lines = [[escape(name), duration(s), percent(s / dense) if dense else NOTHING] for name, s in found]
    listing = html_table(("group", "predicted seconds that go with it", "of a dense step"), lines)
    return f"<details><summary>Where the time of a step goes</summary>{listing}</details>\n"


def entries_table(record: Record, resource: str | None) -> str:
    """All decisions as a table, folded away."""
    if not record.entries:
        return ""
    unit = decisions.UNITS.get(resource or "", resource or "")
    read = any(entry.metered for entry in record.entries)
    lines = []
    for entry in record.entries:
        lost = ", ".join(f"{name}: {len(origins)}" for name, origins in entry.dropped.items() if origins)
        back = ", ".join(f"{name}: {len(origins)}" for name, origins in entry.grown.items() if origins)
        each = (entry.spent, entry.reference, entry.predicted, entry.metered)
        amounts = [human(values.get(resource or ""), unit) for values in each[: 4 if read else 2]]
        cells = (f"{entry.step:,}", *amounts, lost or NOTHING, back or NOTHING)
        lines.append([escape(cell) for cell in (*cells, entry.reason)])
    meters = ("predicted before", "measured before") if read else ()
    titles = ("step", "spent", "reference", *meters, "dropped", "brought back", "reason")
    listing = html_table(titles, lines, classes="entries")
    return f'<details><summary>All decisions</summary><div class="scroll">{listing}</div></details>\n'


def seconds_section(name: str, groups: Mapping[str, Sequence[Cell]]) -> Draft:
    """Where the seconds went."""
    figure = seconds_figure(groups)
    if figure is None:
        return Draft("")
    lines = []
    for label, cells in groups.items():
        parts = seconds_by_part(cells)
        if parts is None:
            continue
        whole = sum(parts.values())
        shares = [
            pair(duration(seconds), percent(seconds / whole)) if seconds else NOTHING for seconds in parts.values()
        ]
        lines.append([escape(label), *shares, escape(duration(whole))])
    draft = Draft("<h3>Where the seconds went</h3>\n")
    draft += place_of(f"{name}-seconds", figure, "Training and overhead", "Means over seeds.")
    return draft + Draft(f'<div class="scroll">{html_table(("method", *PARTS, "total"), lines)}</div>\n')


def remarks(found: Sequence[str]) -> str:
    """What could not be read."""
    if not found:
        return ""
    items = "".join(f"<li>{escape(remark)}</li>" for remark in found)
    return f'<section class="remarks"><h2>Left out</h2><ul>{items}</ul></section>\n'


def environment(cells: Sequence[Cell]) -> str:
    """What the runs ran on; where runs differ, every value is told."""
    values: dict[str, list[str]] = {}
    for cell in cells:
        for key, value in cell.environment.items():
            known = values.setdefault(key, [])
            known += [value] if value not in known else []
    if not values:
        return ""
    lines = [[escape(key), "<br>".join(map(escape, found))] for key, found in values.items()]
    return f'<section><h2>Environment</h2><div class="scroll">{html_table(("what", "value"), lines)}</div></section>\n'
