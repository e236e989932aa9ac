"""Results as terminal tables: one per task, and one per suite of models."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from setpoint.report.numbers import digits, duration, human, percent
from setpoint_bench.coverage import Verdict
from setpoint_bench.report.columns import IN_THEORY, OF_DENSE, Column, columns, difference_columns, seeds_text
from setpoint_bench.report.results import Results
from setpoint_bench.report.summary import Row, summary_rows


def summary_tables(results: Results, width: int) -> tuple[Table, ...]:
    """Per task what each method reached and spent, and how far it lies from its rivals.

    Args:
        results: what to show.
        width: characters of the terminal; columns that do not fit are left out, the least telling first.
    """
    found, tables = summary_rows(results), []
    for task in results.tasks():
        rows = [row for row in found if row.task == task]
        counted = f"{seeds_text(rows)} a row"
        tables.append(_fitting(f"{task}: {counted}", columns(rows), rows, width))
        compared = [row for row in rows if row.differences]
        if compared:
            unit = "points" if rows[0].metric == "accuracy" else rows[0].unit or rows[0].metric
            title = f"{task}: paired differences ({unit})"
            tables.append(_fitting(title, difference_columns(rows), compared, width))
    return tuple(tables)


def _fitting(title: str, shown: Sequence[Column], rows: Sequence[Row], width: int) -> Table:
    """The table with as many of its columns as fit."""
    shown = list(shown)
    while _width(shown, rows) > width and (worst := max(shown, key=lambda column: column.rank)).rank:
        shown.remove(worst)
    table = Table(title=escape(title), title_justify="left")
    for column in shown:
        left = column is shown[0]
        table.add_column(escape(_heading(column)), justify="left" if left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(_styled(column, row) for column in shown))
        following = rows[rows.index(row) + 1 :][:1]
        if following and following[0].budget != row.budget:
            table.add_section()
    return table


def _width(shown: Sequence[Column], rows: Sequence[Row]) -> int:
    """Characters of the table, borders and padding included."""
    texts = ((*_heading(column).split("\n"), *(column.text(row) for row in rows)) for column in shown)
    return 1 + sum(3 + max(map(len, each)) for each in texts)


def _heading(column: Column) -> str:
    """The heading in two lines where it has two parts."""
    for part in (OF_DENSE, IN_THEORY, "(busy", "from step", "saved"):
        if part in column.heading:
            return column.heading.replace(f" {part}", f"\n{part}")
    return column.heading


def _styled(column: Column, row: Row) -> str:
    """A cell; differences whose interval excludes 0 are bold."""
    text = escape(column.text(row))
    found = row.differences.get(column.heading.removeprefix("to "))
    return f"[bold]{text}[/]" if found is not None and column.heading.startswith("to ") and found.clear else text


def suite_table(name: str, verdicts: Sequence[Verdict]) -> Table:
    """A line per model: whether it passed, its groups, what may be pruned, seconds of the discovery, the reason."""
    passed = sum(verdict.passed for verdict in verdicts)
    table = Table(title=f"{name}: {passed} of {len(verdicts)} passed", title_justify="left")
    for heading in ("model", "passed", "parameters", "groups", "units", "prunable", "seconds", "error", "reason"):
        table.add_column(heading, justify="left" if heading in ("model", "passed", "reason") else "right")
    for verdict in verdicts:
        table.add_row(
            escape(verdict.model),
            "yes" if verdict.passed else "[red]no[/]",
            human(verdict.params),
            f"{verdict.num_groups}",
            f"{verdict.num_units}",
            percent(verdict.prunable_params_share),
            duration(verdict.seconds),
            "" if math.isnan(verdict.error) else digits(verdict.error),
            escape(verdict.reason),
        )
    return table
