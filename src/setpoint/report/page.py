"""The page of a run: verdict, spending, price, and what was dropped when and why."""

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path

from setpoint.ledger import Entry
from setpoint.messages import counted
from setpoint.report import markup
from setpoint.report.markup import BLUE, INK, Cell, Figure, Rule, Trace, line
from setpoint.report.numbers import NOTHING, digits, human, scale
from setpoint.report.record import (
    NAMES,
    PER,
    UNITS,
    Record,
    dense_of,
    facts,
    limit_of,
    num_dropped,
    num_grown,
    read_ledger,
)

MOST_NAMED = 12  # groups that a line of the table of decisions names
MOST_EVENTS = 15_000  # units that were dropped or regrown with a marker each; more would be large and unreadable
BAND = 0.84  # share of a group's row over which the markers of its units are spread
SPENT = "The schedule leads from the dense cost to the budget; a point is a cut, and its text says why."
BILL = "A point is a cut. After the last decision each step counts what that decision left."
PRICE = "Loss per unit of resource: a unit stays while its worth is at least the price."
UNITS_LEFT = (
    "A row is a group, and its depth of blue the share of its units that are left. A marker is a unit that was dropped "
    "or came back; of few, its text says its worth, saliency, the price and the reason."
)


def page_of(file: Path, folder: Path | None = None) -> Path:
    """Where a ledger's page lies, by default in its folder: `report.html` of a `run.jsonl`, else its name, `.html`."""
    # The usual name of a ledger says nothing of the run; any other does.
    name = "report.html" if file.name == "run.jsonl" else file.with_suffix(".html").name
    return (file.parent if folder is None else folder) / name


def write_ledger_page(file: Path, out: Path | None = None, first: str = "") -> Path:
    """Write the report of one ledger, by default to `page_of(file)`; `first` is HTML that stands above the run."""
    head = f"<header><h1>Setpoint <span>report</span></h1><p>{escape(file.name)}</p></header>\n<section>\n"
    body = head + first + run(read_ledger(file)) + "</section>\n"
    return markup.save(markup.document(file.stem, body), page_of(file) if out is None else out)


def run(record: Record) -> str:
    """One run: what is to be read first, the budget, the units, and the numbers."""
    lines = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>\n" for name, text in facts(record).items())
    page = f'<dl class="notes">\n{lines}</dl>\n'
    for resource in record.resources:
        name, per = NAMES.get(resource, resource), PER.get(resource, "step")
        page += markup.drawn(bill(record, resource), f"Spent of the run budget: {name} of the whole run", BILL)
        page += markup.drawn(spending(record, resource), f"Spent against reference: {name} per {per}", SPENT)
    page += markup.drawn(units(record), "Units of each group: what was dropped when, and why", UNITS_LEFT)
    for resource in record.resources:
        page += markup.drawn(price(record, resource), f"Price of {NAMES.get(resource, resource)}", PRICE)
    return page + "".join(entries_table(record, resource) for resource in record.resources or (None,))


def entries_table(record: Record, resource: str | None) -> str:
    """All decisions as a table, folded away, with the loss right before and after each."""
    if not record.entries:
        return ""
    key, rows = resource or "", []
    for entry in record.entries:
        # What a meter has read, and its prediction, are of the widths before the decision.
        costs = (entry.spent, entry.reference, entry.predicted, entry.metered)
        amounts = [human(values.get(key), UNITS.get(key, key)) for values in costs]
        moved = [_by_group(counts) for counts in (num_dropped(entry), num_grown(entry))]
        losses = [NOTHING if loss is None else digits(loss) for loss in (entry.loss, entry.loss_after)]
        rows.append([f"{entry.step:,}", *amounts, *moved, *losses, entry.reason])
    meters = ("predicted before", "measured before")
    titles = ("step", "spent", "reference", *meters, "dropped", "brought back", "loss before", "right after", "reason")
    # Columns without a value are left out: most runs bring nothing back, and observe no loss.
    used = [place for place in range(len(titles)) if any(row[place] != NOTHING for row in rows)]
    cells = [[escape(row[place]) for place in used] for row in rows]
    table = markup.html_table([titles[place] for place in used], cells, classes="entries")
    return f'<details><summary>All decisions</summary><div class="scroll">{table}</div></details>\n'


def _by_group(counts: Mapping[str, int]) -> str:
    """Numbers of units by group: the largest where there are many."""
    shown = counts if len(counts) <= MOST_NAMED else sorted(counts, key=lambda name: -counts[name])[:MOST_NAMED]
    rest = sum(counts.values()) - sum(counts[name] for name in shown)
    more = [f"{rest:,} in {len(counts) - MOST_NAMED} more groups"] if rest else []
    return ", ".join([*(f"{name}: {counts[name]}" for name in shown), *more]) or NOTHING


# Figures.


def spending(record: Record, resource: str) -> Figure:
    """Spent against reference, with the dense cost, the budget and the cuts."""
    dense, limit = dense_of(record, resource), limit_of(record, resource)
    entries = [entry for entry in record.entries if resource in entry.spent]
    largest = max([dense or 0.0, *(entry.spent[resource] for entry in entries)])
    factor, unit = scale(largest, UNITS.get(resource, resource))
    spent = [] if dense is None else [(0, dense / factor)]
    spent += [(entry.step, entry.spent[resource] / factor) for entry in entries]
    if spent:
        # The line of a step goes on to the end of the run, where nothing is decided any more.
        spent.append((record.last_step, spent[-1][1]))
    reference = [(entry.step, entry.reference[resource] / factor) for entry in entries if resource in entry.reference]
    metered = [entry for entry in entries if resource in entry.metered]
    texts = [
        f"measured at step {entry.step:,}\n{human(entry.metered[resource], UNITS.get(resource, resource))}, "
        f"predicted {human(entry.predicted.get(resource), UNITS.get(resource, resource))}"
        for entry in metered
    ]
    points = [(entry.step, entry.metered[resource] / factor) for entry in metered]
    traces = [
        line("reference", reference, INK, dash="dash", width=1.4, unit=unit),
        line("spent", spent, BLUE, width=2.6, stairs=True, unit=unit),
        _cuts(entries, [entry.spent[resource] / factor for entry in entries]),
        *([Trace("measured", points, INK, texts, dot=8)] if metered else []),
    ]
    rules = [
        Rule(value / factor, f"{name} {digits(value / factor)} {unit}", color, dash)
        for name, value, color, dash in (("dense", dense, markup.FAINT, "solid"), ("budget", limit, INK, "dot"))
        if value is not None
    ]
    return Figure(traces, f"{unit} per {PER.get(resource, 'step')}", rules=rules, y_from_zero=True)


def bill(record: Record, resource: str) -> Figure | None:
    """What the run has spent so far against its bill, and what is to come; None where it has none."""
    limit = record.limit_run.get(resource)
    if limit is None:
        return None
    entries = [entry for entry in record.entries if resource in entry.spent_run]
    spent, ahead = [(0, 0.0), *((entry.step, entry.spent_run[resource]) for entry in entries)], []
    if entries and (steps_left := record.last_step - entries[-1].step) > 0 and resource in entries[-1].spent:
        ahead = [spent[-1], (record.last_step, spent[-1][1] + steps_left * entries[-1].spent[resource])]
    # A run that has ended has made these steps: they are no longer to come.
    if record.ended:
        spent, ahead = spent + ahead[1:], []
    factor, unit = scale(max(limit, *(y for _, y in spent + ahead)), UNITS.get(resource, resource))
    traces = [line("spent so far", [(step, y / factor) for step, y in spent], BLUE, width=2.6, unit=unit)]
    if ahead:
        traces.append(line("to come", [(step, y / factor) for step, y in ahead], BLUE, dash="dash", unit=unit))
    traces.append(_cuts(entries, [entry.spent_run[resource] / factor for entry in entries]))
    border = Rule(limit / factor, f"budget {digits(limit / factor)} {unit}", INK, "dot")
    return Figure(traces, f"{unit} so far", rules=[border], y_from_zero=True)


def _cuts(entries: Sequence[Entry], heights: Sequence[float]) -> Trace:
    cuts = [(entry, height) for entry, height in zip(entries, heights, strict=True) if num_dropped(entry)]
    texts = [
        f"cut at step {entry.step:,}\ndropped {counted(sum(num_dropped(entry).values()), 'unit')}\n{entry.reason}"
        for entry, _ in cuts
    ]
    return Trace("cut", [(entry.step, height) for entry, height in cuts], BLUE, texts, dot=8)


def price(record: Record, resource: str) -> Figure | None:
    """The price over steps; None if no entry has one."""
    entries = [entry for entry in record.entries if resource in entry.price]
    if not entries:
        return None
    dense = record.dense.get(resource, 1.0)
    factor, unit = scale(dense, UNITS.get(resource, resource))
    title = f"loss per {unit}"
    texts = [
        f"{title} at step {entry.step:,}\n{digits(entry.price[resource] * factor)}\n"
        f"{digits(entry.price[resource] * dense)} for the whole dense cost"
        for entry in entries
    ]
    points = [(entry.step, entry.price[resource] * factor) for entry in entries]
    trace = Trace(title, points, BLUE, texts, width=2.4, stairs=True, dot=6)
    return Figure([trace], title, height=300, x_range=(0, record.last_step), y_from_zero=True)


def units(record: Record) -> Figure | None:
    """The width of each group over steps, and when each unit was dropped or came back; None without groups."""
    if not record.units:
        return None
    names, final = list(record.units), record.final_widths
    # Single weights under masks have no markers.
    events = [own for entry in record.entries for own in (*entry.dropped.values(), *entry.grown.values())]
    marked = not record.pattern and sum(map(len, events)) <= MOST_EVENTS
    return Figure(
        [trace for verb in ("dropped", "brought back") if marked and (trace := _events(record, verb)).points],
        cells=[cell for row, name in enumerate(names) for cell in _row(record, row, name)],
        rows=[f"{name}: {final.get(name, num)} of {num}" for name, num in record.units.items()],
        height=120 + max(26, min(64, 900 // len(names))) * len(names),
        x_range=(0, record.last_step),
    )


def _row(record: Record, row: int, name: str) -> Iterator[Cell]:
    start, width, dense = 0, record.units[name], record.units[name]
    for step, after in [*((e.step, e.widths.get(name, dense)) for e in record.entries), (record.last_step, None)]:
        if after != width and step > start:
            text = f"{name}\n{width} of {dense} {record.what.get(name, 'unit')}s"
            yield Cell(row, start, step, width / (dense or 1), text)
            start = step
        width = width if after is None else after


def _events(record: Record, verb: str) -> Trace:
    """Markers of the units that were dropped, or brought back, over the rows of their groups."""
    resource, rows = record.resources[0] if record.resources else "", list(record.units)
    factor, unit = scale(record.dense.get(resource, 1.0), UNITS.get(resource, resource))
    points, texts, dropped = [], [], verb == "dropped"
    for entry in record.entries:
        chosen, worths, values, name_of_value = entry.dropped, entry.worth, entry.saliency, "saliency"
        if not dropped:
            chosen, worths, values, name_of_value = entry.grown, entry.grown_worth, entry.gain, "probed gain"
        price = _times(entry.price.get(resource), factor)
        for name, origins in chosen.items():
            for place, origin in enumerate(origins if name in record.units else ()):
                worth, value = (known.get(name, ())[place : place + 1] for known in (worths, values))
                shift = (1 - BAND) / 2 + BAND * (origin + 0.5) / max(record.units[name], origin + 1)
                points.append((entry.step, rows.index(name) + shift))
                texts.append(
                    f"{name}, {record.what.get(name, 'unit')} {origin} {verb} at step {entry.step:,}\n"
                    f"worth {_times(*worth, factor)}, price {price} loss per {unit}\n"
                    f"{name_of_value} {_times(*value, 1.0)} loss\n{entry.reason}"
                )
    return Trace(verb, points, markup.ORANGE if dropped else INK, texts, dot=6, square=dropped)


def _times(*numbers: float | None) -> str:
    """A product in digits; "–" where a factor is missing or no number."""
    known = [number for number in numbers if number is not None and math.isfinite(number)]
    return digits(math.prod(known)) if len(known) == 2 else NOTHING
