"""Figures of a run: spending, price, widths, and what was dropped when and why."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from setpoint.ledger import Entry
from setpoint.messages import counted
from setpoint.report.drawing import BLUE, FAINT, GREY, INK, Figure, Trace, escape, layout, line, scatter
from setpoint.report.numbers import digits, scale
from setpoint.report.record import PER, UNITS, Record, dense_of, dropped, limit_of, num_dropped, num_grown

BAND = 0.84
"""Share of a group's band that its units fill; a gap to the next band remains."""
MOST_EVENTS = 15_000
"""How many units that were dropped or regrown have a marker each; of more the figure would be large and unreadable."""


def spending(record: Record, resource: str) -> Figure:
    """Spent against reference, with the dense cost, the budget and the cuts."""
    dense, limit = dense_of(record, resource), limit_of(record, resource)
    entries = [entry for entry in record.entries if resource in entry.spent]
    factor, unit = scale(max([dense or 0.0, *(entry.spent[resource] for entry in entries)]), _unit(resource))
    spent = [] if dense is None else [(0, dense / factor)]
    spent += [(entry.step, entry.spent[resource] / factor) for entry in entries]
    if spent:
        # The line of a step goes on to the end of the run, where nothing is decided any more.
        spent.append((record.last_step, spent[-1][1]))
    held = [(entry.step, entry.reference[resource] / factor) for entry in entries if resource in entry.reference]
    data = [
        line("reference", held, INK, dash="dash", width=1.4, hover=f"%{{y:.4g}} {unit}"),
        line("spent", spent, BLUE, width=2.6, shape="hv", hover=f"%{{y:.4g}} {unit}"),
        _cuts(entries, [entry.spent[resource] / factor for entry in entries]),
        *_metered(entries, resource, factor, unit),
    ]
    shapes, notes = list[Trace](), list[Trace]()
    for name, value, color, dash in (("dense", dense, FAINT, "solid"), ("budget", limit, INK, "dot")):
        if value is not None:
            y = value / factor
            shapes.append({"y0": y, "line": {"color": color, "dash": dash, "width": 1.4}})
            notes.append({"y": y, "text": f"{name} {digits(y)} {unit}"})
    shape = layout(f"{unit} per {PER.get(resource, 'step')}", shapes=shapes, annotations=notes)
    shape["yaxis"]["rangemode"] = "tozero"
    return Figure(data, shape)


def bill(record: Record, resource: str) -> Figure | None:
    """What the run has spent so far against its bill; None where it has none.

    After the last decision each step counts what that decision left; of a run that has not ended this is to come.
    """
    limit = record.limit_run.get(resource)
    entries = [entry for entry in record.entries if resource in entry.spent_run]
    if limit is None:
        return None
    spent, ahead = [(0, 0.0), *((entry.step, entry.spent_run[resource]) for entry in entries)], []
    if entries and (left := record.last_step - entries[-1].step) > 0 and resource in entries[-1].spent:
        ahead = [spent[-1], (record.last_step, spent[-1][1] + left * entries[-1].spent[resource])]
    # A run that has ended has made these steps: they are no longer to come.
    if record.end_step is not None:
        spent, ahead = spent + ahead[1:], []
    factor, unit = scale(max(limit, *(y for _, y in spent + ahead)), _unit(resource))
    solid, dashed = ([(step, y / factor) for step, y in points] for points in (spent, ahead))
    y, hover = limit / factor, f"%{{y:.4g}} {unit}"
    data = [
        line("spent so far", solid, BLUE, width=2.6, hover=hover),
        *([line("to come", dashed, BLUE, dash="dash", hover=hover)] if dashed else []),
        _cuts(entries, [entry.spent_run[resource] / factor for entry in entries]),
    ]
    border = {"y0": y, "line": {"color": INK, "dash": "dot", "width": 1.4}}
    shape = layout(f"{unit} so far", shapes=[border], annotations=[{"y": y, "text": f"bill {digits(y)} {unit}"}])
    shape["yaxis"]["rangemode"] = "tozero"
    return Figure(data, shape)


def _unit(resource: str | None) -> str:
    return UNITS.get(resource or "", escape(resource or ""))


def _metered(entries: Sequence[Entry], resource: str, factor: float, unit: str) -> list[Trace]:
    """Markers of meter readings before each decision, with the predictions; none without a meter."""
    read = [entry for entry in entries if resource in entry.metered]
    foretold = [entry.predicted.get(resource) for entry in read]
    predictions = ["" if value is None else f"predicted {digits(value / factor)} {unit}" for value in foretold]
    points = [(entry.step, entry.metered[resource] / factor) for entry in read]
    hover = f"<b>measured</b> at step %{{x:,d}}<br>%{{y:.4g}} {unit}<br>%{{hovertext}}"
    marker = {"symbol": "circle-open", "size": 8, "color": INK}
    return [scatter("markers", "measured", points, hover, hovertext=predictions, marker=marker)] if read else []


def _cuts(entries: Sequence[Entry], heights: Sequence[float]) -> Trace:
    """A marker on every decision that dropped units, with the reason."""
    made = [(entry, height) for entry, height in zip(entries, heights, strict=True) if dropped(entry)]
    texts = [f"dropped {counted(dropped(entry), 'unit')}<br>{escape(entry.reason)}" for entry, _ in made]
    points, hover = [(entry.step, height) for entry, height in made], "<b>cut</b> at step %{x:,d}<br>%{hovertext}"
    marker = {"symbol": "circle", "size": 8, "color": BLUE}
    return scatter("markers", "cut", points, hover, hovertext=texts, marker=marker)


def price(record: Record, resource: str) -> Figure | None:
    """The price over steps; None if no entry has one."""
    entries = [entry for entry in record.entries if resource in entry.price]
    if not entries:
        return None
    # Ledgers of other tools may lack the dense cost: any scale will do for reading.
    dense = record.dense.get(resource) or max(entry.spent.get(resource, 1.0) for entry in entries)
    factor, unit = scale(dense, _unit(resource))
    points = [(entry.step, entry.price[resource] * factor) for entry in entries]
    trace = line(f"loss per {unit}", points, BLUE, width=2.4, shape="hv", hover="%{y:.3g}<br>%{hovertext}")
    trace["mode"] = "lines+markers"
    trace["hovertext"] = [f"{digits(entry.price[resource] * dense)} for the whole dense cost" for entry in entries]
    shape = layout(f"loss per {unit}", height=300)
    shape["yaxis"]["rangemode"] = "tozero"
    shape["xaxis"]["range"] = [0, record.last_step]
    return Figure([trace], shape)


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
    moments = [entry for entry in record.entries if entry.step < record.last_step]
    columns = [dense, *(entry.widths for entry in moments)]
    table = {name: [column.get(name, dense[name]) for column in columns] for name in dense}
    kinds = {name: f"{dense[name]} {escape(record.what.get(name, 'unit'))}s" for name in dense}
    trace: Trace = {
        "type": "heatmap",
        "x": [0, *(entry.step for entry in moments), record.last_step],
        "y": list(range(len(dense) + 1)),
        # A group of no unit has no share: it is drawn as none.
        "z": [[width / (dense[name] or 1) for width in row] for name, row in table.items()],
        "text": [[f"{escape(name)}<br>{width} of {kinds[name]}" for width in row] for name, row in table.items()],
        "ygap": 3,
    }
    shape = layout("", height=120 + 26 * len(dense))
    labels = [f"{_short(name)}  <b>{final.get(name, dense[name])}</b> / {dense[name]}" for name in dense]
    shape["yaxis"] |= _rows(labels)
    return Figure([trace], shape)


def _short(name: str, most: int = 40) -> str:
    """A group's name for an axis: of a long one the end."""
    return escape(name if len(name) <= most else "…" + name[1 - most :])


def _rows(labels: Sequence[str]) -> dict[str, object]:
    """A y axis with one labelled row per group, the first on top."""
    places = [place + 0.5 for place in range(len(labels))]
    return {"tickvals": places, "ticktext": list(labels), "range": [len(labels), 0], "showgrid": False}


def timeline(record: Record, resource: str | None) -> Figure | None:
    """When each unit was dropped or regrown, and why.

    None without groups, where single weights were masked, and with more than `MOST_EVENTS`.
    Every unit is a line up to the step it was dropped at, at its origin within the band of its group. A marker's
    colour is worth / price: how clear the decision was.
    """
    dense = first_widths(record)
    if not dense or record.pattern or _num_events(record) > MOST_EVENTS:
        return None
    bands = {name: place for place, name in enumerate(dense)}
    data = [*_lives(record, dense), *(trace for entry in record.entries for trace in _events(entry, record, resource))]
    for trace in data:
        trace["y"] = [None if unit is None else _height(bands, dense, *unit) for unit in trace["y"]]
    shape = layout("", height=120 + max(34, min(64, 900 // len(dense))) * len(dense), shades="worth / price")
    shape["yaxis"] |= _rows([_short(name) for name in dense])
    shape["xaxis"]["range"] = [0, record.last_step * 1.01]
    return Figure(data, shape)


def _num_events(record: Record) -> int:
    """Number of drops and of returns of units."""
    return sum(
        len(units) for entry in record.entries for groups in (entry.dropped, entry.grown) for units in groups.values()
    )


def _height(bands: Mapping[str, int], dense: Mapping[str, int], name: str, origin: int) -> float:
    """Position of a unit on the y axis."""
    # A ledger that somebody edited may name origins beyond the group.
    return bands[name] + (1 - BAND) / 2 + BAND * (origin + 0.5) / max(dense[name], origin + 1)


def _lives(record: Record, dense: Mapping[str, int]) -> list[Trace]:
    """Lines of the units kept to the end, and of those dropped before."""
    since = {(name, unit): 0 for name, num in dense.items() for unit in range(num)}
    ended: list[tuple[tuple[str, int], int, int]] = []
    for entry in record.entries:
        for name, origins in entry.dropped.items():
            ended += [((name, u), since.pop((name, u)), entry.step) for u in origins if (name, u) in since]
        since |= {(name, u): entry.step for name, origins in entry.grown.items() if name in dense for u in origins}
    kept = [(unit, start, record.last_step) for unit, start in since.items()]
    traces = []
    for label, color, opacity, spans in (("kept", BLUE, 0.55, kept), ("dropped later", GREY, 0.3, ended)):
        # None lifts the pen: all lives of a kind are one path.
        xs = [x for _, start, stop in spans for x in (start, stop, None)]
        ys = [y for unit, _, _ in spans for y in (unit, unit, None)]
        trace: Trace = {"type": "scatter", "mode": "lines", "name": label, "x": xs, "y": ys}
        traces.append(trace | {"hoverinfo": "skip", "opacity": opacity, "line": {"color": color, "width": 1.5}})
    return traces


def _events(entry: Entry, record: Record, resource: str | None) -> list[Trace]:
    """Markers of the units that one decision dropped and regrew."""
    rate = entry.price.get(resource) if resource else None
    factor, unit = scale(record.dense.get(resource or "", 1.0), _unit(resource))
    notes = [f"step {entry.step:,}"]
    if rate is not None:
        notes.append(f"price {digits(rate * factor)} loss per {unit}")
    if entry.reason:
        notes.append(escape(entry.reason))
    noted, known = "".join(f"<br>{text}" for text in notes), first_widths(record)
    losses = (entry.dropped, entry.worth, entry.saliency)
    returns = (entry.grown, entry.grown_worth, entry.gain)
    traces = []
    for verb, symbol, (chosen, worths, values), (first, second), unread in (
        ("dropped", "square", losses, ("worth", "saliency"), "not evaluated"),
        ("brought back", "circle-open", returns, ("probed worth", "probed gain"), "unknown"),
    ):
        units = [(name, u, at) for name, origins in chosen.items() if name in known for at, u in enumerate(origins)]
        if not units:
            continue
        worth = [_nth(worths, name, at) for name, _, at in units]
        value = [_nth(values, name, at) for name, _, at in units]
        shown = [
            [
                f"{_short(name)}, {escape(record.what.get(name, 'unit'))} {origin}",
                unread if w is None else f"{digits(w * factor)} loss per {unit}",
                "unknown" if v is None else f"{digits(v)} loss",
            ]
            for (name, origin, _), w, v in zip(units, worth, value, strict=True)
        ]
        points = [(entry.step, (name, origin)) for name, origin, _ in units]
        hover = f"<b>%{{customdata[0]}}</b> {verb}<br>{first} %{{customdata[1]}}<br>{second} %{{customdata[2]}}{noted}"
        trace = scatter("markers", verb, points, hover, customdata=shown)
        trace |= {"showlegend": False, "marker": {"symbol": symbol, "size": 6, "color": GREY}}
        # The ratio says how clear the decision was; above 1 a block went for its neighbours.
        if verb == "dropped" and rate and any(w is not None for w in worth):
            trace["marker"]["color"] = [None if w is None else min(w / rate, 1.0) for w in worth]
        traces.append(trace)
    return traces


def _nth(values: Mapping[str, Sequence[float]], name: str, place: int) -> float | None:
    """A finite value by group and place, None where there is none."""
    found = values.get(name, ())
    # Lists of an edited file may be shorter than the list of units.
    value = found[place] if place < len(found) else None
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None
