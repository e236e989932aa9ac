"""A run on a page: its decisions, its dynamics, and where the time of a step goes."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from setpoint.messages import counted
from setpoint.report import decisions, dynamics, resources
from setpoint.report.numbers import NOTHING, digits, duration, human, percent
from setpoint.report.page import download, drawn, html_table, width
from setpoint.report.record import Record

MOST_NAMED = 12
"""Groups that a line of the table of decisions names."""
SPENT = "The schedule leads from the dense cost to the budget; a point is a cut, and its text says why."
BILL = "A point is a cut. After the last decision each step counts what that decision left."
PRICE = "Loss per unit of resource: a unit stays while its worth is at least the price."
WIDTHS = "Active units / units of the dense model, by group, over steps."
LIVES = (
    "Each line is a unit; a marker ends it, and shows its worth, saliency, the price and the reason. "
    "Blue: worth next to nothing. Orange: a close call."
)
RESTS = "From the step at which a unit was dropped to its return, or to the end of the run."


def run(label: str, record: Record, *, more: str = "", final: tuple[float, float] | None = None) -> str:
    """One run: the budget, `more`, the architecture, the units, and the numbers.

    Args:
        final: the last step and its loss, where known.
    """
    page = f'<p class="caption"><b>{escape(label)}</b>: {escape(resources.ledger_line(record))}</p>\n'
    main = resources.resources(record)
    for resource in main:
        named, per = resources.NAMES.get(resource, resource), resources.PER.get(resource, "step")
        page += drawn(decisions.bill(record, resource), f"Spent against the bill: {named} of the whole run", BILL)
        page += drawn(decisions.spending(record, resource), f"Spent against reference: {named} per {per}", SPENT)
    page += more + architecture(record)
    page += drawn(decisions.widths(record), "Width of each group", WIDTHS)
    figure = decisions.timeline(record, main[0] if main else None)
    page += drawn(figure, "What was dropped when, and why", LIVES)
    if any(decisions.num_grown(entry) for entry in record.entries):
        about = f"A row for each unit, a tick for each event; below, their number. {dynamics.dynamics_line(record)}"
        page += drawn(dynamics.raster(record), "Every drop and every return, like a spike train", about)
        page += drawn(dynamics.reserve_lives(record), "How long units rested", RESTS)
    for resource in main:
        page += drawn(decisions.price(record, resource), f"Price of {resources.NAMES.get(resource, resource)}", PRICE)
    dense = record.dense.get("latency")
    if groups := resources.seconds_by_group(record):
        lines = [[escape(group), duration(s), percent(s / dense) if dense else NOTHING] for group, s in groups]
        listing = html_table(("group", "predicted seconds that go with it", "of a dense step"), lines)
        listing = f'<div class="scroll">{listing}</div>'
        page += f"<details><summary>Where the time of a step goes</summary>{listing}</details>\n"
    page += "".join(entries_table(record, resource, final) for resource in main or (None,))
    return page + numbers_files(record, label)


def architecture(record: Record) -> str:
    """The units of each group before and after, as a table with bars; nothing without groups."""
    before = decisions.first_widths(record)
    if not before:
        return ""
    after = {**before, **(record.entries[-1].widths if record.entries else {})}
    lines = []
    for name, num_units in before.items():
        kept = after[name] / num_units if num_units else 1.0
        bar = width(num_units / max(before.values()), kept)
        lines.append([escape(name), bar, f"{num_units:,}", f"{after[name]:,}", percent(kept)])
    titles = ("group", "", "before", "after", "kept")
    listing = html_table(titles, lines, classes="architecture")
    total = f"{sum(after.values()):,} of {sum(before.values()):,} units are left in {counted(len(before), 'group')}."
    return (
        f'<figure><h4>Architecture before and after</h4><div class="bare">{listing}</div>'
        f"<figcaption>{total} The outline is the width before, the filled part the width after.</figcaption></figure>\n"
    )


def numbers_files(record: Record, label: str) -> str:
    """Links to the page's numbers as files: spending by decision and resource, widths of the groups by decision."""
    costs: list[tuple[Any, ...]] = []
    for entry in record.entries:
        for name, spent in entry.spent.items():
            values = (getattr(entry, field).get(name, "") for field in ("reference", "limit", "price", "metered"))
            loss = "" if entry.loss is None else entry.loss
            costs.append((entry.step, name, record.dense.get(name, ""), spent, *values, loss))
    titles = ("step", "resource", "dense", "spent", "reference", "budget", "price", "measured", "loss")
    links = download(f"{label}-spending.csv", "spending", titles, costs)
    known = decisions.first_widths(record)
    heads, changes = ("step", "dropped", "regrown", "reason", *known), [(0, 0, 0, "", *known.values())]
    for entry in record.entries:
        known |= {name: left for name, left in entry.widths.items() if name in known}
        counts = (resources.dropped(entry), sum(decisions.num_grown(entry).values()))
        changes.append((entry.step, *counts, entry.reason, *known.values()))
    links += ", " + download(f"{label}-widths.csv", "widths", heads, changes)
    return f'<p class="caption files">Numbers as CSV: {links}</p>\n'


def _by_group(counts: Mapping[str, int]) -> str:
    """Numbers of units by group: the largest where there are many."""
    shown = counts if len(counts) <= MOST_NAMED else sorted(counts, key=lambda name: -counts[name])[:MOST_NAMED]
    rest = sum(counts.values()) - sum(counts[name] for name in shown)
    more = [f"{rest:,} in {len(counts) - MOST_NAMED} more groups"] if rest else []
    return ", ".join([*(f"{name}: {counts[name]}" for name in shown), *more]) or NOTHING


def entries_table(record: Record, resource: str | None, final: tuple[float, float] | None) -> str:
    """All decisions as a table, folded away, with the loss right before and after each beside the final one."""
    if not record.entries:
        return ""
    unit = resources.UNITS.get(resource or "", resource or "")
    read = any(entry.metered for entry in record.entries)
    lines = []
    for entry in record.entries:
        lost, back = (_by_group(counts) for counts in (resources.num_dropped(entry), decisions.num_grown(entry)))
        each = (entry.spent, entry.reference, entry.predicted, entry.metered)
        amounts = [human(values.get(resource or ""), unit) for values in each[: 4 if read else 2]]
        losses = tuple(NOTHING if loss is None else digits(loss) for loss in (entry.loss, entry.loss_after))
        cells = (f"{entry.step:,}", *amounts, lost, back, *losses)
        lines.append([escape(cell) for cell in (*cells, entry.reason)])
    meters = ("predicted before", "measured before") if read else ()
    titles = ("step", "spent", "reference", *meters, "dropped", "brought back", "loss before", "right after", "reason")
    if final is not None:
        blank = [NOTHING] * (len(titles) - 4)
        lines.append([f"{final[0]:,}", *blank, digits(final[1]), NOTHING, "the end of the run"])
    used = [place for place in range(len(titles)) if any(row[place] != NOTHING for row in lines)]
    listing = html_table(
        [titles[place] for place in used], [[row[place] for place in used] for row in lines], classes="entries"
    )
    return f'<details><summary>All decisions</summary><div class="scroll">{listing}</div></details>\n'
