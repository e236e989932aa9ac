"""The page: one self-contained HTML file made from a results folder."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from setpoint.messages import counted
from setpoint.report.markup import document, drawn, html_table, save
from setpoint.report.numbers import percent
from setpoint.report.page import run
from setpoint_bench.report.columns import (
    Column,
    clock_note,
    columns,
    difference_columns,
    interval_text,
    metric_text,
    seeds_text,
    texts,
)
from setpoint_bench.report.figures import curves, pareto, spending, training_flops, training_seconds
from setpoint_bench.report.folder import read_results
from setpoint_bench.report.results import Cell, Results
from setpoint_bench.report.summary import SETPOINT, Row, series, summary_rows

ROOM = 500_000
"""Characters of the runs that are shown decision by decision, so that the page stays under a megabyte."""
NOTES = """
<dl class="notes">
<dt>FLOPs / step</dt><dd>Forward and backward pass of one optimizer step of the finished model.</dd>
<dt>in theory</dt><dd>What a model whose single weights are masked would cost if zeros cost nothing, counted as the
literature on sparse training does. On this hardware it costs as much as a dense one.</dd>
<dt>training FLOPs, training time</dt><dd>The whole run with everything the method did in it, an earlier dense training
included; evaluation is left out.</dd>
<dt>overhead</dt><dd>The part of the training time that was the method's own: sensing, deciding, resizing.</dd>
<dt>±</dt><dd>Sample standard deviation over seeds; of seconds that were timed, over the rounds of the measurement.</dd>
<dt>( to )</dt><dd>Least and largest of the rounds, in each of which all runs were measured next to each other.</dd>
</dl>
"""


def write_page(results_dir: Path, out: Path | None = None) -> Path:
    """Write the report of a results folder (docs/results-format.md) to one file, by default `report.html` in it.

    The file needs no network and no other file.

    Raises:
        ReportError: if the folder holds no results, or of an unknown schema.
    """
    return save(render(read_results(results_dir)), results_dir / "report.html" if out is None else out)


def render(results: Results) -> str:
    """The HTML of the report."""
    rows, tasks = summary_rows(results), results.tasks()
    dates = sorted(cell.date[:10] for cell in results.cells if cell.date)
    about = " · ".join([counted(len(results.cells), "run"), *map(escape, dates[-1:])])
    page = f"<header><h1>Setpoint <span>report</span></h1><p>{about}</p></header>\n"
    for place, task in enumerate(tasks):
        of_task = [row for row in rows if row.task == task]
        page += _task_section(f"t{place}", task, results.of(task), of_task, ROOM // len(tasks))
    if results.remarks:
        items = "".join(f"<li>{escape(remark)}</li>" for remark in results.remarks)
        page += f'<section class="remarks"><h2>Left out</h2><ul>{items}</ul></section>\n'
    return document(", ".join(tasks), page + _environment(results.cells))


def _task_section(name: str, task: str, cells: Sequence[Cell], rows: Sequence[Row], room: int) -> str:
    """Everything about one task; `room` is the number of characters that its runs may take."""
    groups = series(cells)
    about = "The first seed of each method with a ledger, of dense and of small models."
    budget = drawn(spending(groups), "How the budget was met: FLOPs per step", about)
    parts = (_headline(rows), budget, _costs(rows), _tables(cells, rows), _learning(groups), _runs(name, groups, room))
    return f"<section>\n<h2>{escape(task)}</h2>\n{''.join(parts)}</section>\n"


def _headline(rows: Sequence[Row]) -> str:
    """The result in words: what Setpoint reached, beside dense."""
    sentences = []
    for row in (row for row in rows if row.method == SETPOINT):
        text = f"At {percent(row.final_flops_ratio)} of the dense FLOPs per step, <b>{escape(row.label)}</b> reaches "
        text += f"<b>{metric_text(row)}</b> {escape(row.metric)}"
        if row.difference:
            unit = " points" if row.metric == "accuracy" else ""
            text += f", {interval_text(row.difference, row.metric)}{unit} to dense"
        timed = row.seconds_ratio is not None
        sentences.append(text + (f", in {percent(row.seconds_ratio)} of its training time." if timed else "."))
    return f'<p class="headline">{" ".join(sentences)}</p>\n' if sentences else ""


def _costs(rows: Sequence[Row]) -> str:
    """The metric against what it cost."""
    metric = rows[0].metric.capitalize()
    caption = "Large dots: the largest budget. Bars: ± over seeds. Line: the front. Masked models are left out."
    flops = pareto(rows, training_flops, "training FLOPs", "FLOPs")
    made = drawn(flops, f"{metric} against training FLOPs", caption)
    made += drawn(pareto(rows, training_seconds, "training time", "s"), f"{metric} against training time", caption)
    return f'<h3>What it costs</h3>\n<div class="two">{made}</div>\n' if made else ""


def _tables(cells: Sequence[Cell], rows: Sequence[Row]) -> str:
    """All numbers, and the differences to the rivals."""
    shown = columns(rows)
    lines = [texts(shown, row, escape, str) for row in rows]
    told = re.sub("`(.*?)`", r"<code>\1</code>", escape(clock_note(cells, rows[0].clock)))
    notes = "".join(f"<li><b>{escape(row.label)}</b>: {escape(note)}</li>" for row in rows for note in row.notes)
    page = (
        f'<h3>All numbers</h3>\n<div class="scroll">{_summary(shown, lines)}</div>\n'
        f'<p class="caption">Each row is over {seeds_text(rows)}. {told}</p>\n'
        f"<details><summary>What the columns mean</summary>{NOTES}</details>\n"
    )
    page += f"<details><summary>Notes on the methods</summary><ul>{notes}</ul></details>\n" if notes else ""
    compared = [row for row in rows if row.differences]
    if not compared:
        return page
    rivals = difference_columns(rows)
    clear = [texts(rivals, row, escape, "<b>{}</b>".format) for row in compared]
    unit = "points of accuracy: more is better" if rows[0].metric == "accuracy" else "loss: less is better"
    return (
        f'{page}<h3>Against its rivals</h3>\n<div class="scroll">{_summary(rivals, clear)}</div>\n'
        f'<p class="caption">Differences at the same budget, seed by seed, in {unit}. '
        "Brackets: 95 % interval; bold where it excludes 0.</p>\n"
    )


def _summary(shown: Sequence[Column], lines: Sequence[Sequence[str]]) -> str:
    return html_table([column.heading for column in shown], lines, classes="summary")


def _learning(groups: Mapping[str, Sequence[Cell]]) -> str:
    """Loss and accuracy over the training FLOPs spent."""
    about = "Thin: training, averaged over stretches of steps. With points: validation and test. The first seed."
    made = "".join(drawn(curves(groups, what), what.capitalize(), about) for what in ("loss", "accuracy"))
    return f'<h3>How training went</h3>\n<div class="two">{made}</div>\n' if made else ""


def _runs(name: str, groups: Mapping[str, Sequence[Cell]], room: int) -> str:
    """Each run with a ledger, decision by decision; one is open at a time."""
    runs = [
        (f"{label}, seed {cell.seed}" if cell.seed is not None else label, cell.record)
        for label, cells in sorted(groups.items(), key=lambda item: item[1][0].method != SETPOINT)
        for cell in cells
        if cell.record is not None
    ]
    if not runs:
        return ""
    page, left = "<h3>Decision by decision</h3>\n", len(runs)
    for label, record in runs:
        made = run(record)
        if len(page) + len(made) > room and left < len(runs):
            break
        opened = " open" if left == len(runs) else ""
        page += f'<details class="run" name="{name}-run"{opened}><summary>{escape(label)}</summary>\n{made}</details>\n'
        left -= 1
    return page + (f'<p class="caption">{left} more runs are not shown one by one.</p>\n' if left else "")


def _environment(cells: Sequence[Cell]) -> str:
    """Environment of the runs and of their timing; every value where runs differ."""
    values: dict[str, dict[str, None]] = {}
    for cell in cells:
        timed = {} if cell.timing is None else {f"{key}, timed": v for key, v in cell.timing.environment.items()}
        for key, value in {**cell.environment, **timed}.items():
            values.setdefault(key, {})[value] = None
    if not values:
        return ""
    lines = [[escape(key), "<br>".join(map(escape, found))] for key, found in values.items()]
    return f'<section><h2>Environment</h2><div class="scroll">{html_table(("what", "value"), lines)}</div></section>\n'
