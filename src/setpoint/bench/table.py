"""Results as terminal tables: one per task, and one per suite of models."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from setpoint.bench.coverage import Verdict
from setpoint.report.numbers import digits, duration, human, percent
from setpoint.report.results import Results
from setpoint.report.summary import HEADINGS, row_texts, summary_rows


def summary_tables(results: Results) -> tuple[Table, ...]:
    """One table per task: metric, final FLOPs and parameters, training FLOPs and seconds, overhead."""
    rows = summary_rows(results)
    tables = []
    for task in results.tasks():
        table = Table(title=task, title_justify="left")
        for heading in HEADINGS:
            table.add_column(heading, justify="left" if heading == "method" else "right")
        for row in rows:
            if row.task == task:
                table.add_row(*row_texts(row))
        tables.append(table)
    return tuple(tables)


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
