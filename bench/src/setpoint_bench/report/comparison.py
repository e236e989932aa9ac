"""The comparison: how the methods of a task stand beside each other, as pieces of a page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from setpoint.report.drawing import mark
from setpoint.report.numbers import NOTHING, digits, human, percent
from setpoint.report.page import drawn, html_table, pair
from setpoint_bench.report.columns import (
    CLOCKS,
    break_even_text,
    budget_met_text,
    clock_note,
    difference_columns,
    interval_text,
    metric_text,
    overhead_text,
    realised_text,
    seconds_text,
    seeds_text,
    share_text,
)
from setpoint_bench.report.curves import spending
from setpoint_bench.report.looks import marks
from setpoint_bench.report.pareto import budgets_of, dots, expenses, pareto
from setpoint_bench.report.results import Cell
from setpoint_bench.report.summary import DENSE, SETPOINT, Row, series

MOST_BUDGETS = 3
"""How many budgets have a figure each; of more, the metric stands against the FLOPs of a step at the end."""
NOTES = """
<dl class="notes">
<dt>FLOPs per step</dt><dd>Forward and backward pass of one optimizer step of the finished model.</dd>
<dt>in theory</dt><dd>What a model whose single weights are masked would cost if zeros cost nothing, counted as the
literature on sparse training does. On this hardware it costs as much as a dense one.</dd>
<dt>Training FLOPs, training time</dt><dd>The whole run with everything the method did in it, an earlier dense training
included; evaluation is left out.</dd>
<dt>Overhead</dt><dd>The part of the training time that was the method's own: attaching (tracing the model, trying cuts
on a copy), sensing, deciding, resizing, masking.</dd>
<dt>Time saved / FLOPs saved</dt><dd>Both as shares of the dense run; 1 means that every FLOP saved was time saved.</dd>
<dt>Ahead from step</dt><dd>From this step on the run had taken less time than the dense run; in brackets how
many runs ever had, where not all had.</dd>
<dt>±</dt><dd>Sample standard deviation over seeds; of seconds that were timed, over the rounds of the measurement.</dd>
<dt>( to )</dt><dd>Least and largest of the rounds. In each round all runs were measured next to each other, so shares
of dense are computed round by round: the table shows the median and the range.</dd>
<dt>[ , ]</dt><dd>95 % interval of a mean difference over the seeds that both methods have (Student's t), from three
seeds on. Bold where it excludes 0.</dd>
</dl>
"""


def comparison(cells: Sequence[Cell], rows: Sequence[Row]) -> str:
    """Headline, the budget, the methods by budget and by cost, and numbers of one task."""
    about = "The first seed of dense, of small models, and of each method with a ledger."
    budget = drawn(spending(series(cells)), "How the budget was met: FLOPs per step", about)
    return (
        headline(rows) + cards(rows) + budget + by_budget(rows) + costs(rows) + table(cells, rows) + differences(rows)
    )


def headline(rows: Sequence[Row]) -> str:
    """The result in words: what Setpoint reached, beside dense and small."""
    sentences = []
    for row in rows:
        if row.method != SETPOINT:
            continue
        text = f"At {percent(row.final_flops_ratio)} of the dense FLOPs per step, <b>{escape(row.label)}</b> reaches "
        text += f"<b>{metric_text(row)}</b> {escape(row.metric)}"
        if row.difference:
            unit = " points" if row.metric == "accuracy" else ""
            text += f", {interval_text(row.difference, row.metric)}{unit} to dense"
        timed = row.seconds_ratio is not None
        sentences.append(text + (f", in {percent(row.seconds_ratio)} of its training time." if timed else "."))
    for row in rows:
        if row.method == "small" and sentences:
            sentences.append(f"A <b>{escape(row.label)}</b> dense model from scratch reaches {metric_text(row)}.")
    return f'<p class="headline">{" ".join(sentences)}</p>\n' if sentences else ""


def cards(rows: Sequence[Row]) -> str:
    """The few numbers that matter, for the first Setpoint row."""
    row = next((row for row in rows if row.method == SETPOINT), None)
    if row is None:
        return ""
    dense = next((other for other in rows if other.method == DENSE), None)
    shown = (
        (f"{row.metric} on {row.split}", metric_text(row), "" if not dense else f"dense {metric_text(dense)}"),
        ("FLOPs per step", percent(row.final_flops_ratio), f"of dense, {human(row.final_flops, 'FLOP')}"),
        ("parameters", percent(row.final_params_ratio), f"of dense, {human(row.final_params)}"),
        (CLOCKS[row.clock], percent(row.seconds_ratio), f"of dense, {seconds_text(row)}"),
        ("overhead", overhead_text(row).partition(" (")[0], overhead_text(row).partition(" (")[2].rstrip(")")),
    )
    items = "".join(
        f"<li><span>{escape(title)}</span><strong>{escape(value)}</strong><small>{escape(note)}</small></li>"
        for title, value, note in shown
        if value != NOTHING
    )
    return f'<ul class="cards">{items}</ul>\n'


def table(cells: Sequence[Cell], rows: Sequence[Row]) -> str:
    """The summary table of a task."""
    first = rows[0]
    titles = (
        *("method", f"{first.metric} on {first.split}", "FLOPs per step", "parameters", "training FLOPs"),
        *(CLOCKS[first.clock], "overhead", "time saved / FLOPs saved", "ahead from step", "cuts", "in budget"),
    )
    lines = [[pair(text) if isinstance(text, str) else pair(*text) for text in texts(row)] for row in rows]
    notes = "".join(f"<li><b>{escape(row.label)}</b>: {escape(note)}</li>" for row in rows for note in row.notes)
    caption = f"Each row is over {seeds_text(rows)}; small figures are shares of dense. "
    caption += clock_note(cells, first.clock)
    told = re.sub("`(.*?)`", r"<code>\1</code>", escape(caption))
    return (
        f'<h3>All numbers</h3>\n<div class="scroll">{html_table(titles, lines, classes="summary")}</div>\n'
        f'<p class="caption">{told}</p>\n'
        f"<details><summary>What the columns mean</summary>{NOTES}</details>\n"
        + (f"<details><summary>Notes on the methods</summary><ul>{notes}</ul></details>\n" if notes else "")
    )


def texts(row: Row) -> tuple[str | tuple[str, ...], ...]:
    """A row's cells: a text, or a text with smaller ones below."""
    return (
        row.label,
        metric_text(row),
        (human(row.final_flops, "FLOPs"), percent(row.final_flops_ratio), in_theory(row.theoretical_ratio)),
        (human(row.final_params), percent(row.final_params_ratio)),
        (human(row.train_flops, "FLOPs"), percent(row.train_flops_ratio), in_theory(row.theoretical_train_ratio)),
        (seconds_text(row), *in_lines(share_text(row.seconds_share))),
        *map(in_lines, (overhead_text(row), realised_text(row), break_even_text(row))),
        NOTHING if not row.resizes else digits(row.resizes),
        budget_met_text(row),
    )


def in_lines(text: str) -> tuple[str, ...]:
    """A text and what follows it in brackets, each a line.

    >>> in_lines("0.423 (0.397 to 0.467)")
    ('0.423', '0.397 to 0.467')
    """
    value, _, rest = text.partition(" (")
    return (value, rest.removesuffix(")")) if rest else (value,)


def in_theory(share: float | None) -> str:
    """A share of dense if zeros cost nothing."""
    return "" if share is None else f"in theory {percent(share)}"


def differences(rows: Sequence[Row]) -> str:
    """How far each method lies from its rivals."""
    compared = [row for row in rows if row.differences]
    if not compared:
        return ""
    shown = difference_columns(rows)
    lines = []
    for row in compared:
        cells = [escape(row.label)]
        for column in shown[1:]:
            found = row.differences.get(column.heading.removeprefix("to "))
            text = escape(column.text(row))
            cells.append(f"<b>{text}</b>" if found is not None and found.clear else text)
        lines.append(cells)
    loss = f"{rows[0].unit} of loss".removeprefix(" of ")
    unit = "points of accuracy: more is better" if rows[0].metric == "accuracy" else f"{loss}: less is better"
    return (
        f"<h3>Against its rivals</h3>\n"
        f'<div class="scroll">{html_table([column.heading for column in shown], lines, classes="summary")}</div>\n'
        f'<p class="caption">Differences at the same budget, seed by seed, in {unit}. '
        "Brackets: 95 % interval; bold where it excludes 0.</p>\n"
    )


def by_budget(rows: Sequence[Row]) -> str:
    """The methods at each budget, best first; nothing for one row or many budgets."""
    budgets = budgets_of(rows)
    if len(rows) < 2 or not 0 < len(budgets) <= MOST_BUDGETS:
        return ""
    caption = "Bars: 95 % interval of the mean over seeds, from three seeds on. Dashed: dense. "
    if any(row.theoretical_ratio is not None for row in rows):
        caption += "In italics: masked models, which cost as much as a dense one."
    metric = rows[0].metric.capitalize()
    made = "".join(drawn(dots(rows, each), f"{metric} at budget {each:g}, best first", caption) for each in budgets)
    return f'<h3>Method by method</h3>\n<div class="two dots">{made}</div>\n' if made else ""


def costs(rows: Sequence[Row]) -> str:
    """The metric against what it cost, a figure for each expense; without final FLOPs where `by_budget` has figures."""
    few = 0 < len(budgets_of(rows)) <= MOST_BUDGETS
    found = [each for each in expenses(rows) if each.name != "final" or not few]
    if not found or len(rows) < 2:
        return ""
    keys = "".join(
        f"<li>{mark(symbol, color)}{escape(method)}</li>"
        for method, (color, symbol) in marks(row.method for row in rows).items()
    )
    page = f'<h3>What it costs</h3>\n<ul class="legend">{keys}</ul>\n<div class="two">'
    for expense in found:
        theory = any(row.theoretical_ratio is not None for row in rows) and expense.unit == "FLOPs"
        note = "Masked models: in theory, and not on the line. " if theory else ""
        timed = expense.unit == "s" and rows[0].clock == "timed"
        bars = "± over seeds, of seconds over the rounds of their measurement" if timed else "± over seeds"
        caption = f"Full marks: the largest budget. Bars: {bars}. Line: the front. {note}"
        page += drawn(
            pareto(rows, expense),
            f"{rows[0].metric.capitalize()} against {expense.title}",
            caption.strip(),
        )
    return page + "</div>\n"
