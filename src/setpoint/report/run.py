"""A run on a page: its decisions, its dynamics, and where the time of a step goes."""

from __future__ import annotations

from html import escape

from setpoint.report import decisions, dynamics, resources
from setpoint.report.draft import Draft, html_table, place_of
from setpoint.report.numbers import NOTHING, digits, duration, human, percent
from setpoint.report.record import Record

SPENT = "The reference leads from the dense cost to the budget; a triangle is a cut, and its text tells why."
PRICE = "Loss per unit of resource: a unit stays while its worth is at least the price."
WIDTHS = "Active units / units of the dense model, by group, over steps."
LIVES = (
    "Each line is a unit; a marker ends it, and tells its worth, saliency, the price and the reason. "
    "Blue: worth next to nothing. Orange: a close call."
)
ACTIVE = "At every step, after each decision."
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
    """The decisions of one run, its dynamics and `more`; `final` are the last step and its loss, where known."""
    html = f'<p class="caption"><b>{escape(label)}</b>: {escape(resources.ledger_line(record))}</p>\n'
    draft = Draft(f'<div class="run" id="{name}"{" hidden" if hidden else ""}>\n{html}')
    main = resources.resources(record)
    for resource in main:
        named, per = resources.NAMES.get(resource, resource), resources.PER.get(resource, "step")
        place, title = f"{name}-spent-{len(draft.figures)}", f"Spent against reference: {named} per {per}"
        draft += place_of(place, decisions.spending(record, resource), title, SPENT)
        place = f"{name}-price-{len(draft.figures)}"
        draft += place_of(place, decisions.price(record, resource), f"Price of {named}", PRICE)
    figure = decisions.timeline(record, main[0] if main else None)
    draft += place_of(f"{name}-widths", decisions.widths(record), "Width of each group", WIDTHS)
    draft += place_of(f"{name}-units", figure, "What was dropped when, and why", LIVES)
    titled = "Every drop and every return, like a spike train"
    about = f"A row for each unit, a tick for each event; below, their number. {dynamics.dynamics_line(record)}"
    draft += place_of(f"{name}-active", dynamics.active(record), "Active units of each group", ACTIVE)
    draft += place_of(f"{name}-raster", dynamics.raster(record), titled, about)
    draft += place_of(f"{name}-rests", dynamics.reserve_lives(record), "How long units rested", RESTS)
    draft += more
    html, dense = "", record.dense.get("latency")
    if groups := resources.seconds_by_group(record):
        lines = [[escape(group), duration(s), percent(s / dense) if dense else NOTHING] for group, s in groups]
        listing = html_table(("group", "predicted seconds that go with it", "of a dense step"), lines)
        html = f"<details><summary>Where the time of a step goes</summary>{listing}</details>\n"
    html += "".join(entries_table(record, resource, final) for resource in main or (None,))
    return draft + Draft(f"{html}</div>\n")


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
