"""Figures of one ledger: spending, price, widths, and what was dropped when and why."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from setpoint.ledger import Entry
from setpoint.messages import counted
from setpoint.report.figures import BLUE, FAINT, GREY, INK, Figure, Trace, escape, layout, line, scatter
from setpoint.report.numbers import digits, scale
from setpoint.report.record import Record
from setpoint.report.resources import PER, dense_of, dropped, end_of, limit_of, num_dropped, unit_of

BAND = 0.84
"""Share of a group's band that its units fill; a gap to the next band remains."""

MOST_EVENTS = 15_000
"""How many units that were dropped or regrown have a marker each; of more the figure would be large and unreadable."""


def num_grown(entry: Entry) -> dict[str, int]:
    """Number of units the entry regrew, by group."""
    return {name: len(origins) for name, origins in entry.grown.items() if origins} | dict(entry.num_grown)


def spending(record: Record, resource: str) -> Figure:
    """Spent against reference, with the dense cost, the budget and the cuts."""
    dense, limit = dense_of(record, resource), limit_of(record, resource)
    entries = [entry for entry in record.entries if resource in entry.spent]
    top = max([dense or 0.0, *(entry.spent[resource] for entry in entries)])
    factor, unit = scale(top, unit_of(resource))
    spent = [] if dense is None else [(0, dense / factor)]
    spent += [(entry.step, entry.spent[resource] / factor) for entry in entries]
    if spent:
        spent.append((end_of(record), spent[-1][1]))
    held = [(entry.step, entry.reference[resource] / factor) for entry in entries if resource in entry.reference]
    data = [
        line("reference", held, INK, dash="dash", width=1.4, hover=f"%{{y:.4g}} {unit}"),
        line("spent", spent, BLUE, width=2.6, shape="hv", hover=f"%{{y:.4g}} {unit}"),
        cuts(entries, [entry.spent[resource] / factor for entry in entries]),
        *metered(entries, resource, factor, unit),
    ]
    shapes, notes = list[Trace](), list[Trace]()
    for name, value, color, dash in (("dense", dense, FAINT, "solid"), ("budget", limit, INK, "dot")):
        if value is not None:
            y, look = value / factor, {"color": color, "dash": dash, "width": 1.4}
            shapes.append({"y0": y, "line": look})
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
    if entries and (left := end_of(record) - entries[-1].step) > 0 and resource in entries[-1].spent:
        ahead = [spent[-1], (end_of(record), spent[-1][1] + left * entries[-1].spent[resource])]
    if record.end_step is not None:
        spent, ahead = spent + ahead[1:], []
    factor, unit = scale(max(limit, *(y for _, y in spent + ahead)), unit_of(resource))
    solid, dashed = ([(step, y / factor) for step, y in points] for points in (spent, ahead))
    y, hover = limit / factor, f"%{{y:.4g}} {unit}"
    data = [
        line("spent so far", solid, BLUE, width=2.6, hover=hover),
        *([line("to come", dashed, BLUE, dash="dash", hover=hover)] if dashed else []),
        cuts(entries, [entry.spent_run[resource] / factor for entry in entries]),
    ]
    border = {"y0": y, "line": {"color": INK, "dash": "dot", "width": 1.4}}
    shape = layout(f"{unit} so far", shapes=[border], annotations=[{"y": y, "text": f"bill {digits(y)} {unit}"}])
    shape["yaxis"]["rangemode"] = "tozero"
    return Figure(data, shape)


def metered(entries: Sequence[Entry], resource: str, factor: float, unit: str) -> list[Trace]:
    """Markers of meter readings before each decision, with the predictions; none without a meter."""
    read = [entry for entry in entries if resource in entry.metered]
    foretold = [entry.predicted.get(resource) for entry in read]
    predictions = ["" if value is None else f"predicted {digits(value / factor)} {unit}" for value in foretold]
    points = [(entry.step, entry.metered[resource] / factor) for entry in read]
    hover = f"<b>measured</b> at step %{{x:,d}}<br>%{{y:.4g}} {unit}<br>%{{hovertext}}"
    marker = {"symbol": "circle-open", "size": 8, "color": INK}
    return [scatter("markers", "measured", points, hover, hovertext=predictions, marker=marker)] if read else []


def cuts(entries: Sequence[Entry], heights: Sequence[float]) -> Trace:
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
    dense = record.dense.get(resource) or max(entry.spent.get(resource, 1.0) for entry in entries)
    factor, unit = scale(dense, unit_of(resource))
    points = [(entry.step, entry.price[resource] * factor) for entry in entries]
    data = line(f"loss per {unit}", points, BLUE, width=2.4, shape="hv", hover="%{y:.3g}<br>%{hovertext}")
    data["mode"] = "lines+markers"
    data["hovertext"] = [f"{digits(entry.price[resource] * dense)} for the whole dense cost" for entry in entries]
    shape = layout(f"loss per {unit}", height=300)
    shape["yaxis"]["rangemode"] = "tozero"
    shape["xaxis"]["range"] = [0, end_of(record)]
    return Figure([data], shape)


def first_widths(record: Record) -> dict[str, int]:
    """Width of each group before the first decision: from the header, else rebuilt from the first entry."""
    found = dict(record.units)
    for entry in record.entries[:1]:
        for name, width in entry.widths.items():
            lost = num_dropped(entry).get(name, 0) - num_grown(entry).get(name, 0)
            found.setdefault(name, width + lost)
    return found


def widths(record: Record) -> Figure | None:
    """Width of each group over steps, as a share of its dense width; None without groups."""
    dense = first_widths(record)
    if not dense:
        return None
    end = end_of(record)
    moments = [entry for entry in record.entries if entry.step < end]
    edges = [0, *(entry.step for entry in moments), end]
    columns = [dense, *(entry.widths for entry in moments)]
    final = record.entries[-1].widths if record.entries else dense
    table = [[column.get(name, dense[name]) for column in columns] for name in dense]
    labels = [f"{short(name)}  <b>{final.get(name, dense[name])}</b> / {dense[name]}" for name in dense]
    what = {name: f"{dense[name]} {escape(record.what.get(name, 'unit'))}s" for name in dense}
    trace: Trace = {
        "type": "heatmap",
        "x": edges,
        "y": list(range(len(dense) + 1)),
        "z": [[width / (dense[name] or 1) for width in row] for name, row in zip(dense, table, strict=True)],
        "text": [[f"{escape(n)}<br>{w} of {what[n]}" for w in row] for n, row in zip(dense, table, strict=True)],
        "ygap": 3,
    }
    shape = layout("", height=120 + 26 * len(dense))
    shape["yaxis"] |= rows(labels)
    return Figure([trace], shape)


def short(name: str, most: int = 40) -> str:
    """A group's name for an axis: of a long one the end."""
    return escape(name if len(name) <= most else "…" + name[1 - most :])


def rows(labels: Sequence[str]) -> dict[str, object]:
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
    if not dense or record.pattern or num_events(record) > MOST_EVENTS:
        return None
    height = 120 + max(34, min(64, 900 // len(dense))) * len(dense)
    bands = {name: place for place, name in enumerate(dense)}
    data = [*lives(record, dense), *(trace for entry in record.entries for trace in drops(entry, record, resource))]
    for trace in data:
        trace["y"] = [None if at is None else height_of(bands, dense, *at) for at in trace["y"]]
    shape = layout("", height=height)
    shape["yaxis"] |= rows([short(name) for name in dense])
    shape["xaxis"]["range"] = [0, end_of(record) * 1.01]
    shape["coloraxis"] = {"colorbar": {"title": {"text": "worth / price"}}}
    return Figure(data, shape)


def num_events(record: Record) -> int:
    """Number of drops and of returns of units."""
    return sum(
        len(units) for entry in record.entries for each in (entry.dropped, entry.grown) for units in each.values()
    )


def height_of(bands: Mapping[str, int], dense: Mapping[str, int], name: str, origin: int) -> float:
    """Position of a unit on the y axis."""
    return bands[name] + (1 - BAND) / 2 + BAND * (origin + 0.5) / max(dense[name], origin + 1)


def lives(record: Record, dense: Mapping[str, int]) -> list[Trace]:
    """Lines of the units kept to the end, and of those dropped before."""
    end, since = end_of(record), {(name, unit): 0 for name, num in dense.items() for unit in range(num)}
    ended: list[tuple[tuple[str, int], int, int]] = []
    for entry in record.entries:
        for name, origins in entry.dropped.items():
            ended += [((name, u), since.pop((name, u)), entry.step) for u in origins if (name, u) in since]
        since |= {(name, u): entry.step for name, origins in entry.grown.items() if name in dense for u in origins}
    kept = [(unit, start, end) for unit, start in since.items()]
    found = []
    for label, color, opacity, spans in (("kept", BLUE, 0.55, kept), ("dropped later", GREY, 0.3, ended)):
        xs = [x for _, start, stop in spans for x in (start, stop, None)]
        ys = [y for unit, _, _ in spans for y in (unit, unit, None)]
        trace: Trace = {"type": "scatter", "mode": "lines", "name": label, "x": xs, "y": ys}
        found.append(trace | {"hoverinfo": "skip", "opacity": opacity, "line": {"color": color, "width": 1.5}})
    return found


def drops(entry: Entry, record: Record, resource: str | None) -> list[Trace]:
    """Markers of the units that one decision dropped and regrew."""
    rate = entry.price.get(resource) if resource else None
    factor, unit = scale(record.dense.get(resource or "", 1.0), unit_of(resource))
    notes = [f"step {entry.step:,}"]
    if rate is not None:
        notes.append(f"price {digits(rate * factor)} loss per {unit}")
    if entry.reason:
        notes.append(escape(entry.reason))
    noted, known = "".join(f"<br>{text}" for text in notes), first_widths(record)
    dropped, grown = (entry.dropped, entry.worth, entry.saliency), (entry.grown, entry.grown_worth, entry.gain)
    kinds = (
        ("dropped", "square", dropped, ("worth", "saliency"), "not evaluated"),
        ("brought back", "circle-open", grown, ("probed worth", "probed gain"), "unknown"),
    )
    found = []
    for verb, symbol, (chosen, *values), (first, second), unread in kinds:
        units = [(name, u, at) for name, origins in chosen.items() if name in known for at, u in enumerate(origins)]
        if not units:
            continue
        worth, loss = ([nth(each, name, at) for name, _, at in units] for each in values)
        named = [f"{short(name)}, {escape(record.what.get(name, 'unit'))} {origin}" for name, origin, _ in units]
        texts = [unread if w is None else f"{digits(w * factor)} loss per {unit}" for w in worth]
        losses = ["unknown" if each is None else f"{digits(each)} loss" for each in loss]
        shown = [list(each) for each in zip(named, texts, losses, strict=True)]
        points = [(entry.step, (name, origin)) for name, origin, _ in units]
        hover = f"<b>%{{customdata[0]}}</b> {verb}<br>{first} %{{customdata[1]}}<br>{second} %{{customdata[2]}}{noted}"
        trace = scatter("markers", verb, points, hover, customdata=shown)
        trace |= {"showlegend": False, "marker": {"symbol": symbol, "size": 6, "color": GREY}}
        if verb == "dropped" and rate and any(w is not None for w in worth):
            ratios = [None if w is None else min(w / rate, 1.0) for w in worth]
            trace["marker"]["color"] = ratios
        found.append(trace)
    return found


def nth(values: Mapping[str, Sequence[float]], name: str, place: int) -> float | None:
    """A finite value by group and place, None where there is none."""
    found = values.get(name, ())
    value = found[place] if place < len(found) else None
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None
