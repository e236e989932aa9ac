"""A run on a page: its decisions, its dynamics, and where the time of a step goes."""

from __future__ import annotations

from html import escape
from typing import Any

from setpoint.report import decisions, dynamics, resources
from setpoint.report.draft import Draft, download, drawn, html_table
from setpoint.report.numbers import NOTHING, digits, duration, human, percent
from setpoint.report.record import Record

SPENT = "The schedule leads from the dense cost to the budget; a point is a cut, and its text tells why."
PRICE = "Loss per unit of resource: a unit stays while its worth is at least the price."
WIDTHS = "Active units / units of the dense model, by group, over steps."
LIVES = (
    "Each line is a unit; a marker ends it, and tells its worth, saliency, the price and the reason. "
    "Blue: worth next to nothing. Orange: a close call."
)
RESTS = "From the step at which a unit was dropped to its return, or to the end of the run."


def run(
    name: str,
    label: str,
    record: Record,
    *,
    hidden: bool = False,
    more: Draft = Draft(""),  # noqa: B008
    final: tuple[float, float] | None = None,
) -> Draft:
    """One run: the budget, `more`, the architecture, the units, and the numbers.

    Args:
        final: the last step and its loss, where known.
    """
    html = f'<p class="caption"><b>{escape(label)}</b>: {escape(resources.ledger_line(record))}</p>\n'
    draft = Draft(f'<div class="run" id="{name}"{" hidden" if hidden else ""}>\n{html}')
    main = resources.resources(record)
    for resource in main:
        named, per = resources.NAMES.get(resource, resource), resources.PER.get(resource, "step")
        draft += drawn(decisions.spending(record, resource), f"Spent against reference: {named} per {per}", SPENT)
    draft += more + architecture(record)
    draft += drawn(decisions.widths(record), "Width of each group", WIDTHS)
    figure = decisions.timeline(record, main[0] if main else None)
    draft += drawn(figure, "What was dropped when, and why", LIVES)
    if any(decisions.num_grown(entry) for entry in record.entries):
        about = f"A row for each unit, a tick for each event; below, their number. {dynamics.dynamics_line(record)}"
        draft += drawn(dynamics.raster(record), "Every drop and every return, like a spike train", about)
        draft += drawn(dynamics.reserve_lives(record), "How long units rested", RESTS)
    for resource in main:
        draft += drawn(decisions.price(record, resource), f"Price of {resources.NAMES.get(resource, resource)}", PRICE)
    html, dense = "", record.dense.get("latency")
    if groups := resources.seconds_by_group(record):
        lines = [[escape(group), duration(s), percent(s / dense) if dense else NOTHING] for group, s in groups]
        listing = html_table(("group", "predicted seconds that go with it", "of a dense step"), lines)
        html = f"<details><summary>Where the time of a step goes</summary>{listing}</details>\n"
    html += "".join(entries_table(record, resource, final) for resource in main or (None,))
    return draft + Draft(html) + numbers_files(record, label) + Draft("</div>\n")


def architecture(record: Record) -> Draft:
    """The units of each group before and after, as a table with bars; nothing without groups."""
    before = decisions.first_widths(record)
    if not before:
        return Draft("")
    after = {**before, **(record.entries[-1].widths if record.entries else {})}
    lines = []
    for name, width in before.items():
        kept = after[name] / width if width else 1.0
        bar = f'<i class="width" style="--full:{width / max(before.values()):.4f};--kept:{kept:.4f}"></i>'
        lines.append([escape(name), bar, f"{width:,}", f"{after[name]:,}", percent(kept)])
    titles = ("group", "", "before", "after", "kept")
    listing = html_table(titles, lines, classes="architecture")
    total = f"{sum(after.values()):,} of {sum(before.values()):,} units are left in {len(before):,} groups."
    return Draft(
        f'<figure><h4>Architecture before and after</h4><div class="bare">{listing}</div>'
        f"<figcaption>{total} The outline is the width before, the filled part the width after.</figcaption></figure>\n"
    )


def numbers_files(record: Record, label: str) -> Draft:
    """Links to the page's numbers as files: spending by decision and resource, widths by decision and group."""
    costs: list[tuple[Any, ...]] = []
    for entry in record.entries:
        for name, spent in entry.spent.items():
            values = (getattr(entry, field).get(name, "") for field in ("reference", "limit", "price", "metered"))
            loss = "" if entry.loss is None else entry.loss
            costs.append((entry.step, name, record.dense.get(name, ""), spent, *values, loss))
    titles = ("step", "resource", "dense", "spent", "reference", "budget", "price", "measured", "loss")
    links = download(f"{label}-spending.csv", "spending", titles, costs)
    known, changes = decisions.first_widths(record), list[tuple[Any, ...]]()
    for entry in record.entries:
        lost, back = resources.num_dropped(entry), decisions.num_grown(entry)
        for name, width in entry.widths.items():
            if width != known.get(name):
                row = (known.get(name, ""), width, lost.get(name, 0), back.get(name, 0))
                changes.append((entry.step, name, *row, entry.reason))
                known[name] = width
    heads = ("step", "group", "units before", "units after", "dropped", "regrown", "reason")
    links += Draft(", ") + download(f"{label}-widths.csv", "widths", heads, changes)
    return Draft('<p class="caption">Numbers as CSV: ') + links + Draft("</p>\n")


def entries_table(record: Record, resource: str | None, final: tuple[float, float] | None) -> str:
    """All decisions as a table, folded away, with the loss right before and after each beside the final one."""
    if not record.entries:
        return ""
    unit = resources.UNITS.get(resource or "", resource or "")
    read = any(entry.metered for entry in record.entries)
    lines = []
    for entry in record.entries:
        lost = ", ".join(f"{name}: {count}" for name, count in resources.num_dropped(entry).items())
        back = ", ".join(f"{name}: {count}" for name, count in decisions.num_grown(entry).items())
        each = (entry.spent, entry.reference, entry.predicted, entry.metered)
        amounts = [human(values.get(resource or ""), unit) for values in each[: 4 if read else 2]]
        losses = tuple(NOTHING if loss is None else digits(loss) for loss in (entry.loss, entry.loss_after))
        cells = (f"{entry.step:,}", *amounts, lost or NOTHING, back or NOTHING, *losses)
        lines.append([escape(cell) for cell in (*cells, entry.reason)])
    meters = ("predicted before", "measured before") if read else ()
    titles = ("step", "spent", "reference", *meters, "dropped", "brought back", "loss before", "right after", "reason")
    if final is not None:
        blank = [NOTHING] * (len(titles) - 4)
        lines.append([f"{final[0]:,}", *blank, digits(final[1]), NOTHING, "the end of the run"])
    listing = html_table(titles, lines, classes="entries")
    return f'<details><summary>All decisions</summary><div class="scroll">{listing}</div></details>\n'
