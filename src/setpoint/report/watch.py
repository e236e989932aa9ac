"""Watch: a ledger's file as a picture in the terminal, drawn anew as it grows."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from setpoint.errors import ReportError
from setpoint.messages import counted
from setpoint.report import resources
from setpoint.report.ledger_page import read_ledger
from setpoint.report.numbers import NOTHING, digits, duration, human, percent
from setpoint.report.record import Record

_BAR = 24
_SILENT_S = 300.0
"""Seconds without a new line after which a run may have been stopped."""
_OTHER_LINES = 8
"""Lines of a view besides those of resources and groups."""


def view(record: Record, title: str, lines: int | None = None) -> RenderableType:
    """The present state of a run: cost against reference and price, and the width of each group.

    Args:
        title: what the run is called.
        lines: that the terminal has; where groups are more, those that have lost the largest share are shown.
    """
    last = record.entries[-1] if record.entries else None
    made = [resources.dropped(entry) for entry in record.entries]
    step = f"step {last.step:,}" if last else "no decision yet"
    head = [
        step + (f" of {record.total_steps:,}" if last and record.total_steps else ""),
        *([duration(last.seconds)] if last else []),
        *([f"loss {digits(last.loss)}"] if last and last.loss is not None else []),
    ]
    if record.end:
        head = [f"ended at step {record.end_step or 0:,} of {record.total_steps or 0:,}", record.end]
    tallies = {"decision": len(made), "cut": sum(map(bool, made)), "unit": sum(made)}
    counts = ", ".join(counted(number, what) for what, number in tallies.items()) + " dropped"
    spending = Table.grid(padding=(0, 2))
    held = resources.resources(record) or (("flops",) if "flops" in record.dense else ())
    for resource in held:
        for row in _spending(record, resource):
            spending.add_row(*row)
    widths = dict(record.units) | (dict(last.widths) if last else {})
    shares = {name: width / (record.units.get(name) or width or 1) for name, width in widths.items()}
    room = len(widths) if lines is None else max(1, lines - 2 * len(held) - _OTHER_LINES)
    shown = set(widths) if len(widths) <= room else set(sorted(widths, key=lambda name: shares[name])[:room])
    groups = Table.grid(padding=(0, 2))
    for name, width in widths.items():
        if name in shown:
            count = f"{width:,} of {record.units.get(name, width):,} {record.what.get(name, 'unit')}s"
            groups.add_row(escape(name), _bar(shares[name]), count, percent(shares[name]))
    rest = len(widths) - len(shown)
    more = [Text(f"and {counted(rest, 'group')} of which more is left")] if rest else []
    reason = [Text(f"step {last.step:,}: {resources.headline(last)}")] if last else []
    return Group(
        Text(f"{title}  {' · '.join(head)}", style="bold"),
        Text(counts),
        spending,
        Text(),
        groups,
        *more,
        Text(),
        *reason,
    )


def _spending(record: Record, resource: str) -> Iterator[tuple[RenderableType, ...]]:
    """Two rows: what a step costs now and its share of dense; the reference, the budget and the price."""
    last = record.entries[-1] if record.entries else None
    dense, unit = resources.dense_of(record, resource), resources.UNITS.get(resource, resource)
    spent = last.spent.get(resource, dense) if last else dense
    limit = resources.limit_of(record, resource)
    reference = last.reference.get(resource) if last else None
    price = last.price.get(resource) if last else None

    def shown(value: float | None) -> str:
        return NOTHING if value is None else percent(value / dense) if dense else human(value, unit)

    share = spent / dense if spent is not None and dense else 1.0
    cost = f"{human(spent, unit)} per {resources.PER.get(resource, 'step')}"
    yield resources.NAMES.get(resource, resource), _bar(share), cost + (f", {shown(spent)} of dense" if dense else "")
    held = [f"reference {shown(reference)}", *([f"budget {shown(limit)}"] if limit else [])]
    yield "", "", ", ".join((*held, f"price {NOTHING if price is None else digits(price)}"))


def _bar(share: float) -> ProgressBar:
    return ProgressBar(total=1.0, completed=min(1.0, max(0.0, share)), width=_BAR)


def watch(file: Path, screen: Console, seconds: float) -> Record:
    """Show a ledger until its run has ended, or Ctrl-C, and read it whenever it has changed; gives the last state.

    A file that is not there yet is waited for. What becomes of the file meanwhile is reported, and waited for.

    Raises:
        ReportError: if its folder is not there, or if it is no ledger to begin with.
    """
    if file.parent.is_dir() and not _begun(file):
        waiting = f"waiting for {file}, which a run writes by log_to(loop, {str(file)!r}); Ctrl-C ends it"
        if screen.is_terminal:
            screen.print(waiting)
        else:
            print(waiting, file=sys.stderr)
        with suppress(KeyboardInterrupt):
            while not _begun(file):
                time.sleep(seconds)
    record, known = read_ledger(file), _stamp(file)
    live = Live(console=screen, auto_refresh=False)
    drawn = screen.is_terminal  # elsewhere one picture comes below the other
    try:
        with live if drawn else nullcontext():
            shown = view(record, file.name, screen.height if drawn else None)
            while True:
                live.update(shown, refresh=True) if drawn else screen.print(shown)
                screen.file.flush()
                if record.end_step is not None:
                    return record
                warned = False
                while (now := _stamp(file)) == known:
                    time.sleep(seconds)
                    if not warned and now is not None and time.time() - now[0] / 1e9 > _SILENT_S:
                        warned, silent = True, Text("nothing was written for five minutes: was the run stopped?")
                        live.update(Group(shown, silent), refresh=True) if drawn else screen.print(silent)
                        screen.file.flush()
                known, trouble = now, list[RenderableType]()
                try:
                    record = read_ledger(file)
                except ReportError as error:
                    trouble = [Text(str(error), style="red")]
                shown = Group(view(record, file.name, screen.height - 2 * len(trouble) if drawn else None), *trouble)
    except KeyboardInterrupt:
        return record


def _begun(file: Path) -> bool:
    found = _stamp(file)
    return found is not None and found[1] > 0


def _stamp(file: Path) -> tuple[int, int, int] | None:
    """What differs once the file has been written to; None where there is none."""
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
