"""Results as terminal tables: one per task, and one per suite of models."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from setpoint.report.numbers import digits, duration, human, percent
from setpoint_bench.coverage import Verdict
from setpoint_bench.report.columns import (
    Column,
    columns,
    difference_columns,
    outcome_and_training,
    seeds_text,
    texts,
)
from setpoint_bench.report.results import Results
from setpoint_bench.report.summary import Row, summary_rows


def summary_tables(results: Results) -> tuple[Table, ...]:
    """Per task what each method reached, what its training took, and how far it lies from its rivals."""
    found, tables = summary_rows(results), []
    for task in results.tasks():
        rows = [row for row in found if row.task == task]
        outcome, training = outcome_and_training(columns(rows))
        tables.append(_table(f"{task}: {seeds_text(rows)} a row", outcome, rows))
        tables.append(_table(f"{task}: what training took", training, rows))
        compared = [row for row in rows if row.differences]
        if compared:
            unit = "points" if rows[0].metric == "accuracy" else rows[0].unit or rows[0].metric
            tables.append(_table(f"{task}: paired differences ({unit})", difference_columns(rows), compared))
    return tuple(tables)


def _table(title: str, shown: Sequence[Column], rows: Sequence[Row]) -> Table:
    """A line a row; differences whose interval excludes 0 are bold."""
    table = Table(title=escape(title), title_justify="left")
    for column in shown:
        table.add_column(escape(column.heading), justify="left" if column is shown[0] else "right")
    for row in rows:
        table.add_row(*texts(shown, row, escape, "[bold]{}[/]".format))
    return table


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
