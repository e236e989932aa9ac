"""A page: one self-contained HTML file without scripts; the page and the tables of a user's own run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from rich.markup import escape as plain
from rich.table import Table

from setpoint.ledger import Entry, replace_text
from setpoint.messages import counted
from setpoint.report import figures
from setpoint.report.drawing import Figure, drawing, scheme
from setpoint.report.numbers import NOTHING, digits, human, percent
from setpoint.report.record import (
    NAMES,
    PER,
    UNITS,
    Record,
    dropped,
    dynamics_line,
    ledger_line,
    num_dropped,
    num_grown,
    read_ledger,
)

MOST_NAMED = 12
"""Groups that a line of the table of decisions names."""
SPENT = "The schedule leads from the dense cost to the budget; a point is a cut, and its text says why."
BILL = "A point is a cut. After the last decision each step counts what that decision left."
PRICE = "Loss per unit of resource: a unit stays while its worth is at least the price."
WIDTHS = "Active units of those of the dense model, by group, over steps."
LIVES = (
    "Each line is a unit; a marker ends it, and shows its worth, saliency, the price and the reason. "
    "Blue: worth next to nothing. Orange: a close call."
)


# Pieces of a page.


def document(title: str, body: str) -> str:
    """The HTML of a page."""
    style = (files("setpoint.report") / "page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>Setpoint: {escape(title)}</title>\n<style>\n{scheme()}{style}</style>\n</head>\n<body>\n"
        f"<main>\n{body}</main>\n</body>\n</html>\n"
    )


def save(page: str, target: Path) -> Path:
    """Write a page completely or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # In place of the old page at once: a browser that reloads never sees half of one.
    replace_text(target, page)
    return target


def html_table(titles: Iterable[str], lines: Iterable[Sequence[str]], classes: str = "") -> str:
    """A table whose first column names the line; cells are HTML already."""
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in titles)
    rows = ((first, "".join(f"<td>{cell}</td>" for cell in cells)) for first, *cells in lines)
    body = "".join(f'<tr><th scope="row">{first}</th>{cells}</tr>\n' for first, cells in rows)
    return f'<table class="{classes}"><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>'


def drawn(figure: Figure | None, title: str, caption: str) -> str:
    """A titled figure; nothing if there is none."""
    if figure is None:
        return ""
    return f"<figure><h4>{escape(title)}</h4>{drawing(figure, title)}<figcaption>{caption}</figcaption></figure>\n"


# The page of a run.


def page_of(file: Path, folder: Path | None = None) -> Path:
    """Where a ledger's page lies, by default in its folder: `report.html` of a `run.jsonl`, else its name, `.html`."""
    # The usual name of a ledger says nothing of the run; any other does.
    name = "report.html" if file.name == "run.jsonl" else file.with_suffix(".html").name
    return (file.parent if folder is None else folder) / name


def write_ledger_page(file: Path, out: Path | None = None, first: str = "") -> Path:
    """Write the report of one ledger, by default to `page_of(file)`; `first` is HTML that stands above the run.

    Raises:
        ReportError: if the ledger cannot be read.
    """
    head = f"<header><h1>Setpoint <span>report</span></h1><p>{escape(file.name)}</p></header>\n<section>\n"
    body = head + first + run(file.stem, read_ledger(file)) + "</section>\n"
    return save(document(file.stem, body), page_of(file) if out is None else out)


def run(label: str, record: Record, *, final: tuple[float, float] | None = None) -> str:
    """One run: the budget, the architecture, the units, and the numbers.

    Args:
        final: the last step and its loss, where known.
    """
    page = f'<p class="caption"><b>{escape(label)}</b>: {escape(ledger_line(record))}</p>\n'
    for resource in record.resources:
        named, per = NAMES.get(resource, resource), PER.get(resource, "step")
        page += drawn(figures.bill(record, resource), f"Spent against the bill: {named} of the whole run", BILL)
        page += drawn(figures.spending(record, resource), f"Spent against reference: {named} per {per}", SPENT)
    page += _architecture(record)
    page += drawn(figures.widths(record), "Width of each group", WIDTHS)
    returns = any(num_grown(entry) for entry in record.entries)
    about = f"{LIVES} A circle brings a unit back. {escape(dynamics_line(record))}" if returns else LIVES
    timeline = figures.timeline(record, record.resources[0] if record.resources else None)
    page += drawn(timeline, "What was dropped when, and why", about)
    for resource in record.resources:
        page += drawn(figures.price(record, resource), f"Price of {NAMES.get(resource, resource)}", PRICE)
    page += "".join(entries_table(record, resource, final) for resource in record.resources or (None,))
    return page


def _architecture(record: Record) -> str:
    """The units of each group before and after, as a table with bars; nothing without groups."""
    before = figures.first_widths(record)
    if not before:
        return ""
    after = {**before, **record.final_widths}
    lines = []
    for name, num_units in before.items():
        kept = after[name] / num_units if num_units else 1.0
        # The outline is the width before, as a share of the widest group's, and `kept` of it is filled.
        bar = f'<i class="width" style="--full:{num_units / max(before.values()):.4f};--kept:{kept:.4f}"></i>'
        lines.append([escape(name), bar, f"{num_units:,}", f"{after[name]:,}", percent(kept)])
    left = f"{sum(after.values()):,} of {sum(before.values()):,} units are left in {counted(len(before), 'group')}."
    about = f"{left} The outline is the width before, the filled part the width after."
    table = html_table(("group", "", "before", "after", "kept"), lines, classes="architecture")
    return (
        f'<figure><h4>Architecture before and after</h4><div class="bare">{table}</div>'
        f"<figcaption>{about}</figcaption></figure>\n"
    )


def _by_group(counts: Mapping[str, int]) -> str:
    """Numbers of units by group: the largest where there are many."""
    shown = counts if len(counts) <= MOST_NAMED else sorted(counts, key=lambda name: -counts[name])[:MOST_NAMED]
    rest = sum(counts.values()) - sum(counts[name] for name in shown)
    more = [f"{rest:,} in {len(counts) - MOST_NAMED} more groups"] if rest else []
    return ", ".join([*(f"{name}: {counts[name]}" for name in shown), *more]) or NOTHING


def entries_table(record: Record, resource: str | None, final: tuple[float, float] | None) -> str:
    """All decisions as a table, folded away, with the loss right before and after each; `final` is the run's last."""
    if not record.entries:
        return ""
    unit = UNITS.get(resource or "", resource or "")
    read = any(entry.metered for entry in record.entries)
    lines = []
    for entry in record.entries:
        lost, back = (_by_group(counts) for counts in (num_dropped(entry), num_grown(entry)))
        losses = tuple(NOTHING if loss is None else digits(loss) for loss in (entry.loss, entry.loss_after))
        cells = (f"{entry.step:,}", *_amounts(entry, resource, unit, read), lost, back, *losses, entry.reason)
        lines.append([escape(cell) for cell in cells])
    meters = ("predicted before", "measured before") if read else ()
    titles = ("step", "spent", "reference", *meters, "dropped", "brought back", "loss before", "right after", "reason")
    if final is not None:
        blank = [NOTHING] * (len(titles) - 4)
        lines.append([f"{final[0]:,}", *blank, digits(final[1]), NOTHING, "the end of the run"])
    # Columns without a value are left out: most runs bring nothing back, and observe no loss.
    used = [place for place in range(len(titles)) if any(row[place] != NOTHING for row in lines)]
    table = html_table([titles[p] for p in used], [[row[p] for p in used] for row in lines], classes="entries")
    return f'<details><summary>All decisions</summary><div class="scroll">{table}</div></details>\n'


def ledger_tables(record: Record) -> Iterator[Table]:
    """For each resource its decisions, for a terminal: spent, reference, predicted, measured."""
    for resource in record.resources or (None,):
        # Rich reads [brackets] as markup, and names come from files.
        unit = plain(UNITS.get(resource or "", resource or ""))
        read = any((resource or "") in entry.metered for entry in record.entries)
        name = plain(NAMES.get(resource or "", resource or "decisions"))
        table = Table(title=f"{name} per {PER.get(resource or '', 'step')}", title_justify="left")
        meters = ("predicted before", "measured before") if read else ()
        for title in ("step", "spent", "reference", *meters, "dropped"):
            table.add_column(title, justify="right", no_wrap=True)
        table.add_column("reason")
        for entry in record.entries:
            lost = dropped(entry)
            amounts = _amounts(entry, resource, unit, read)
            table.add_row(
                f"{entry.step:,}", *amounts, f"{lost:,}" if lost else NOTHING, plain(entry.reason.partition("; ")[0])
            )
        yield table


def _amounts(entry: Entry, resource: str | None, unit: str, read: bool) -> list[str]:
    """Spent and reference, and where a meter has read, the prediction and the reading before the decision."""
    columns = (entry.spent, entry.reference, *((entry.predicted, entry.metered) if read else ()))
    return [human(values.get(resource or ""), unit) for values in columns]
