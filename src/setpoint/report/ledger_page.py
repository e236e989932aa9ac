"""The page and the tables of one ledger: decisions, spending and predictions of a user's own run."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path

from rich.markup import escape as plain
from rich.table import Table

from setpoint.errors import CheckpointError, ReportError
from setpoint.ledger import Ledger
from setpoint.report import resources
from setpoint.report.numbers import NOTHING, duration, human
from setpoint.report.page import document, save
from setpoint.report.record import Record, record_of
from setpoint.report.run import run


def read_ledger(file: Path) -> Record:
    """The record in a file that `loop.ledger.save(file)` wrote.

    Raises:
        ReportError: if it cannot be read, or is no ledger.
    """
    try:
        return record_of(Ledger.load(file))
    except FileNotFoundError as error:
        said = f"the ledger {file} cannot be read: there is no such file; "
        raise ReportError(f"{said}a run writes it by log_to(loop, {str(file)!r})") from error
    except (OSError, ValueError, TypeError, AttributeError, OverflowError) as error:  # hands may have written it
        then = "" if isinstance(error, CheckpointError) else ": loop.ledger.save(file) writes one"
        said = f"the ledger {file} cannot be read: {error}{then}"
        raise ReportError(said) from error


def page_of(file: Path, folder: Path | None = None) -> Path:
    """Where a ledger's page lies, by default beside it: `report.html` of a `run.jsonl`, else its name with `.html`."""
    name = "report.html" if file.name == "run.jsonl" else file.with_suffix(".html").name
    return (file.parent if folder is None else folder) / name


def write_ledger_page(file: Path, out: Path | None = None, first: str = "") -> Path:
    """Write the report of one ledger, by default to `page_of(file)`; `first` is HTML that stands above the run.

    Raises:
        ReportError: if the ledger cannot be read.
    """
    record = read_ledger(file)
    head = f"<header><h1>Setpoint <span>report</span></h1><p>{escape(file.name)}</p></header>\n<section>\n"
    body = head + first + run(file.stem, record) + "</section>\n"
    return save(document(file.stem, body), page_of(file) if out is None else out)


def ledger_tables(record: Record) -> Iterator[Table]:
    """For each resource its decisions: spent, reference, predicted, measured; then seconds by group."""
    for resource in resources.resources(record) or (None,):
        unit = plain(resources.UNITS.get(resource or "", resource or ""))
        read = any((resource or "") in entry.metered for entry in record.entries)
        titles = ["step", "spent", "reference", *(["predicted before", "measured before"] if read else []), "dropped"]
        name = plain(resources.NAMES.get(resource or "", resource or "decisions"))
        table = Table(title=f"{name} per {resources.PER.get(resource or '', 'step')}", title_justify="left")
        for title in titles:
            table.add_column(title, justify="right", no_wrap=True)
        table.add_column("reason")
        for entry in record.entries:
            each = (entry.spent, entry.reference, entry.predicted, entry.metered)[: 4 if read else 2]
            amounts = [human(values.get(resource or ""), unit) for values in each]
            lost = resources.dropped(entry)
            row = (f"{entry.step:,}", *amounts, f"{lost:,}" if lost else NOTHING, plain(resources.headline(entry)))
            table.add_row(*row)
        yield table
    groups = resources.seconds_by_group(record)
    if groups:
        table = Table("group", title="where the time of a dense step goes", title_justify="left")
        table.add_column("goes with the group, as predicted", justify="right")
        for name, seconds in groups:
            table.add_row(plain(name), duration(seconds))
        yield table
