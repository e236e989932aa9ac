"""Figures of a run: spending, price, widths, and what was dropped when and why."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from setpoint.ledger import Entry
from setpoint.messages import counted
from setpoint.report.drawing import BLUE, FAINT, GREY, INK, Cells, Figure, Rule, Spans, Trace, line
from setpoint.report.numbers import digits, scale
from setpoint.report.record import PER, UNITS, Record, dense_of, dropped, limit_of, num_dropped, num_grown

BAND = 0.84
"""Share of a group's band that its units fill; a gap to the next band remains."""
MOST_EVENTS = 15_000
"""How many units that were dropped or regrown have a marker each; of more the figure would be large and unreadable."""
_Life = tuple[tuple[str, int], int, int]
"""A unit as (group, origin), and the first and the last step at which it was there."""


def spending(record: Record, resource: str) -> Figure:
    """Spent against reference, with the dense cost, the budget and the cuts."""
    dense, limit = dense_of(record, resource), limit_of(record, resource)
    entries = [entry for entry in record.entries if resource in entry.spent]
    factor, unit = scale(
        max([dense or 0.0, *(entry.spent[resource] for entry in entries)]), UNITS.get(resource, resource)
    )
    spent = [] if dense is None else [(0, dense / factor)]
    spent += [(entry.step, entry.spent[resource] / factor) for entry in entries]
    if spent:
        # The line of a step goes on to the end of the run, where nothing is decided any more.
        spent.append((record.last_step, spent[-1][1]))
    reference = [(entry.step, entry.reference[resource] / factor) for entry in entries if resource in entry.reference]
    traces = [
        line("reference", reference, INK, dash="dash", width=1.4, unit=unit),
        line("spent", spent, BLUE, width=2.6, stairs=True, unit=unit),
        _cuts(entries, [entry.spent[resource] / factor for entry in entries]),
    ]
    metered = [entry for entry in entries if resource in entry.metered]
    if metered:
        texts = [
            f"measured at step {entry.step:,}\n{digits(entry.metered[resource] / factor)} {unit}"
            + (
                f"\npredicted {digits(entry.predicted[resource] / factor)} {unit}"
                if resource in entry.predicted
                else ""
            )
            for entry in metered
        ]
        points = [(entry.step, entry.metered[resource] / factor) for entry in metered]
        traces.append(Trace("measured", points, INK, texts, dot=8))
    rules = [
        Rule(value / factor, f"{name} {digits(value / factor)} {unit}", color, dash)
        for name, value, color, dash in (("dense", dense, FAINT, "solid"), ("budget", limit, INK, "dot"))
        if value is not None
    ]
    return Figure(traces, f"{unit} per {PER.get(resource, 'step')}", rules=rules, y_from_zero=True)


def bill(record: Record, resource: str) -> Figure | None:
    """What the run has spent so far against its bill; None where it has none.

    After the last decision each step counts what that decision left; of a run that has not ended this is to come.
    """
    limit = record.limit_run.get(resource)
    entries = [entry for entry in record.entries if resource in entry.spent_run]
    if limit is None:
        return None
    spent, ahead = [(0, 0.0), *((entry.step, entry.spent_run[resource]) for entry in entries)], []
    if entries and (steps_left := record.last_step - entries[-1].step) > 0 and resource in entries[-1].spent:
        ahead = [spent[-1], (record.last_step, spent[-1][1] + steps_left * entries[-1].spent[resource])]
    # A run that has ended has made these steps: they are no longer to come.
    if record.end_step is not None:
        spent, ahead = spent + ahead[1:], []
    factor, unit = scale(max(limit, *(y for _, y in spent + ahead)), UNITS.get(resource, resource))
    traces = [line("spent so far", [(step, y / factor) for step, y in spent], BLUE, width=2.6, unit=unit)]
    if ahead:
        traces.append(line("to come", [(step, y / factor) for step, y in ahead], BLUE, dash="dash", unit=unit))
    traces.append(_cuts(entries, [entry.spent_run[resource] / factor for entry in entries]))
    border = Rule(limit / factor, f"bill {digits(limit / factor)} {unit}", INK, "dot")
    return Figure(traces, f"{unit} so far", rules=[border], y_from_zero=True)


def _cuts(entries: Sequence[Entry], heights: Sequence[float]) -> Trace:
    """A dot on every decision that dropped units, with the reason."""
    cuts = [(entry, height) for entry, height in zip(entries, heights, strict=True) if dropped(entry)]
    texts = [
        f"cut at step {entry.step:,}\ndropped {counted(dropped(entry), 'unit')}\n{entry.reason}" for entry, _ in cuts
    ]
    return Trace("cut", [(entry.step, height) for entry, height in cuts], BLUE, texts, dot=8)


def price(record: Record, resource: str) -> Figure | None:
    """The price over steps; None if no entry has one."""
    entries = [entry for entry in record.entries if resource in entry.price]
    if not entries:
        return None
    # Ledgers of other tools may lack the dense cost: any scale will do for reading.
    dense = record.dense.get(resource) or max(entry.spent.get(resource, 1.0) for entry in entries)
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


def first_widths(record: Record) -> dict[str, int]:
    """Width of each group before the first decision: from the header, else rebuilt from the first entry."""
    found = dict(record.units)
    for entry in record.entries[:1]:
        for name, width in entry.widths.items():
            lost = num_dropped(entry).get(name, 0) - num_grown(entry).get(name, 0)
            # Without a header only the first decision tells what was there before it.
            found.setdefault(name, width + lost)
    return found


def widths(record: Record) -> Figure | None:
    """Width of each group over steps, as a share of its dense width; None without groups."""
    dense, final = first_widths(record), record.final_widths
    if not dense:
        return None
    # A column of no width cannot be drawn: the decision of the last step has none.
    entries = [entry for entry in record.entries if entry.step < record.last_step]
    table = {name: [num, *(entry.widths.get(name, num) for entry in entries)] for name, num in dense.items()}
    cells = Cells(
        edges=[0, *(entry.step for entry in entries), record.last_step],
        # A group of no unit has no share: it is drawn as none.
        shares=[[width / (dense[name] or 1) for width in row] for name, row in table.items()],
        texts=[
            [f"{name}\n{width} of {dense[name]} {record.what.get(name, 'unit')}s" for width in row]
            for name, row in table.items()
        ],
    )
    rows = [f"{_short(name)}: {final.get(name, num)} of {num}" for name, num in dense.items()]
    return Figure(cells=cells, rows=rows, height=120 + 26 * len(dense), x_range=(0, record.last_step))


def _short(name: str, length: int = 40) -> str:
    """A group's name for an axis: of a long one the end."""
    return name if len(name) <= length else "…" + name[1 - length :]


def timeline(record: Record, resource: str | None) -> Figure | None:
    """When each unit was dropped or regrown, and why.

    None without groups, where single weights were masked, and with more than `MOST_EVENTS`.
    Every unit is a line up to the step it was dropped at, at its origin within the band of its group. A marker's
    colour is worth / price: how clear the decision was.
    """
    dense = first_widths(record)
    events = [units for entry in record.entries for units in (*entry.dropped.values(), *entry.grown.values())]
    if not dense or record.pattern or sum(map(len, events)) > MOST_EVENTS:
        return None
    bands = {name: place for place, name in enumerate(dense)}

    def height(name: str, origin: int) -> float:
        return bands[name] + (1 - BAND) / 2 + BAND * (origin + 0.5) / max(dense[name], origin + 1)

    traces = [trace for entry in record.entries for trace in _events(entry, record, resource, height)]
    kept, ended = _lives(record, dense)
    return Figure(
        traces,
        spans=[
            Spans("kept", [(start, height(*unit), stop) for unit, start, stop in kept], BLUE, 0.55),
            Spans("dropped later", [(start, height(*unit), stop) for unit, start, stop in ended], GREY, 0.3),
        ],
        rows=[_short(name) for name in dense],
        height=120 + max(34, min(64, 900 // len(dense))) * len(dense),
        x_range=(0, record.last_step * 1.01),
        shades="worth / price",
    )


def _lives(record: Record, dense: Mapping[str, int]) -> tuple[list[_Life], list[_Life]]:
    """From when to when a unit was there: of the units kept to the end, and of those dropped before."""
    since = {(name, unit): 0 for name, num in dense.items() for unit in range(num)}
    ended: list[_Life] = []
    for entry in record.entries:
        for name, origins in entry.dropped.items():
            ended += [((name, u), since.pop((name, u)), entry.step) for u in origins if (name, u) in since]
        since |= {(name, u): entry.step for name, origins in entry.grown.items() if name in dense for u in origins}
    return [(unit, start, record.last_step) for unit, start in since.items()], ended


def _events(entry: Entry, record: Record, resource: str | None, height: Callable[[str, int], float]) -> Iterator[Trace]:
    """Markers of the units that one decision dropped and regrew."""
    price = entry.price.get(resource) if resource else None
    factor, unit = scale(record.dense.get(resource or "", 1.0), UNITS.get(resource or "", resource or ""))
    notes = [f"step {entry.step:,}"]
    if price is not None:
        notes.append(f"price {digits(price * factor)} loss per {unit}")
    if entry.reason:
        notes.append(entry.reason)
    known = first_widths(record)
    for verb, chosen, worths, values, names, unread in (
        ("dropped", entry.dropped, entry.worth, entry.saliency, ("worth", "saliency"), "not evaluated"),
        ("brought back", entry.grown, entry.grown_worth, entry.gain, ("probed worth", "probed gain"), "unknown"),
    ):
        points, texts, shares = [], [], []
        for name, origins in chosen.items():
            for place, origin in enumerate(origins if name in known else ()):
                worth, value = _nth(worths, name, place), _nth(values, name, place)
                lines = [
                    f"{_short(name)}, {record.what.get(name, 'unit')} {origin} {verb}",
                    f"{names[0]} {unread if worth is None else f'{digits(worth * factor)} loss per {unit}'}",
                    f"{names[1]} {'unknown' if value is None else f'{digits(value)} loss'}",
                    *notes,
                ]
                points.append((entry.step, height(name, origin)))
                texts.append("\n".join(lines))
                # The ratio says how clear the decision was; above 1 a block went for its neighbours.
                shares.append(None if worth is None or not price else min(worth / price, 1.0))
        if points:
            dropped_here = verb == "dropped"
            shades = shares if dropped_here else ()
            yield Trace(verb, points, GREY, texts, dot=6, square=dropped_here, shares=shades, in_legend=False)


def _nth(values: Mapping[str, Sequence[float]], name: str, place: int) -> float | None:
    """A finite value by group and place, None where there is none."""
    found = values.get(name, ())
    value = found[place] if place < len(found) else None
    return None if value is None or not math.isfinite(value) else value
