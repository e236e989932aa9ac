"""Figures of a run's dynamics: units over steps, events as spikes, rests of units."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass

from setpoint.messages import counted
from setpoint.report.decisions import MOST_EVENTS, first_widths, height_of, num_events, rows, short
from setpoint.report.figures import BLUE, GREY, ORANGE, Figure, Trace, escape, layout, scatter
from setpoint.report.numbers import digits
from setpoint.report.record import Record
from setpoint.report.resources import end_of


@dataclass(frozen=True)
class Rest:
    """One stay of a unit, given by its origin, in the reserve; where `returned` is False, `end` is that of the run."""

    group: str
    origin: int
    begin: int
    end: int
    returned: bool


def rests(record: Record) -> tuple[Rest, ...]:
    """Every stay of a unit out of the model, in the order of their ends."""
    since: dict[tuple[str, int], int] = {}
    found = []
    for entry in record.entries:
        for name, origins in entry.grown.items():
            for unit in origins:
                if (name, unit) in since:
                    found.append(Rest(name, unit, since.pop((name, unit)), entry.step, returned=True))
        since |= {(name, unit): entry.step for name, origins in entry.dropped.items() for unit in origins}
    end = end_of(record)
    return (*found, *(Rest(name, unit, begin, end, returned=False) for (name, unit), begin in since.items()))


def raster(record: Record) -> Figure | None:
    """A raster of all events, like a spike train: a row for each unit, a tick for each drop and each regrowth.

    Below the rows, bars count the events of each decision: regrowths upward, drops downward.
    None without an event, and with more than `MOST_EVENTS`.
    """
    dense = first_widths(record)
    bands = {name: place for place, name in enumerate(dense)}
    kinds = (("dropped", "dropped", ORANGE, -1), ("brought back", "grown", BLUE, 1))
    data: list[Trace] = []
    for verb, field, color, sign in kinds:
        chosen = [(entry.step, *each) for entry in record.entries for each in getattr(entry, field).items()]
        events = [(step, name, unit) for step, name, units in chosen if name in dense for unit in units]
        points = [(step, height_of(bands, dense, name, unit)) for step, name, unit in events]
        ticks = scatter("markers", verb, points, f"<b>%{{text}}</b> {verb} at step %{{x:,d}}")
        ticks["text"] = [f"{short(name)} {unit}" for _, name, unit in events]
        ticks["marker"] = {"symbol": "line-ns-open", "color": color}
        counts = Counter(step for step, _, _ in events)
        bars = {"type": "bar", "name": verb, "showlegend": False, "marker": {"color": color}}
        bars |= {"x": list(counts), "y": [sign * count for count in counts.values()], "yaxis": "y2"}
        bars["hovertemplate"] = f"%{{y:,d}} units {verb} at step %{{x:,d}}"
        data += [ticks, {**bars, "width": end_of(record) / 120}]
    if not 0 < num_events(record) <= MOST_EVENTS or not any(trace["x"] for trace in data):
        return None
    shape = layout("", height=240 + max(26, min(56, 700 // len(dense))) * len(dense), barmode="relative")
    shape["yaxis"] |= rows([short(name) for name in dense]) | {"domain": [0.22, 1]}
    shape["yaxis2"] = {"domain": [0, 0.16]}
    shape["xaxis"] |= {"range": [0, end_of(record) * 1.01]}
    return Figure(data, shape)


def reserve_lives(record: Record) -> Figure | None:
    """Steps that dropped units rested: those that were regrown, and those that never were."""
    found, end = rests(record), end_of(record)
    if not found:
        return None
    data: list[Trace] = []
    for name, returned, color in (("came back", True, BLUE), ("never came back", False, GREY)):
        lengths = [rest.end - rest.begin for rest in found if rest.returned == returned]
        if lengths:
            title = f"{name} ({len(lengths):,}, median {digits(statistics.median(lengths))} steps)"
            trace = {"type": "histogram", "name": title, "x": lengths, "marker": {"color": color}}
            trace["xbins"] = {"start": 0, "end": end, "size": max(1.0, end / 40)}
            data.append({**trace, "hovertemplate": f"%{{y:,d}} {name} after %{{x}} steps"})
    return Figure(data, layout("units", "optimizer steps out of the model", height=280, barmode="stack"))


def dynamics_line(record: Record) -> str:
    """One sentence about dropped and regrown units."""
    found = rests(record)
    units = {(rest.group, rest.origin) for rest in found}
    back = [rest for rest in found if rest.returned]
    returned = len({(rest.group, rest.origin) for rest in back})
    sentence = f"{counted(len(units), 'unit')} dropped, {returned:,} of them brought back"
    if back:
        median = statistics.median(rest.end - rest.begin for rest in back)
        again = len(found) - len(units)
        sentence += f" after {digits(median)} steps (median), {again:,} dropped again"
    return f"{escape(sentence)}."
