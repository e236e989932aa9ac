"""The summary as terminal tables, one per task."""

from __future__ import annotations

from rich.table import Table

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
