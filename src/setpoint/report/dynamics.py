"""Figures of a run's dynamics: units over steps, events as spikes, rests of units, the loss around events."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from setpoint.report.decisions import first_widths, height_of, line, num_grown, rows, short
from setpoint.report.figures import BLUE, GREY, INK, ORANGE, OTHERS, Figure, Trace, escape, layout
from setpoint.report.numbers import digits
from setpoint.report.record import Point, Record
from setpoint.report.resources import dropped, end_of

COLORS = (BLUE, ORANGE, *OTHERS, GREY)
DASHES = ("solid", "dash", "dot", "dashdot")
AROUND = 0.03
"""Share of the run on either side of an event over which the loss is shown."""


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
        for name, origins in entry.dropped.items():
            since |= {(name, unit): entry.step for unit in origins}
    end = end_of(record)
    return (*found, *(Rest(name, unit, begin, end, returned=False) for (name, unit), begin in since.items()))


def active(record: Record) -> Figure | None:
    """Active units of each group over steps; None without groups."""
    dense = first_widths(record)
    if not dense:
        return None
    data = []
    for place, (name, width) in enumerate(dense.items()):
        points = [(0, width), *((entry.step, entry.widths.get(name, width)) for entry in record.entries)]
        points.append((end_of(record), points[-1][1]))
        style = {"dash": DASHES[place // len(COLORS) % len(DASHES)], "width": 2.0, "shape": "hv"}
        data.append(line(short(name), points, COLORS[place % len(COLORS)], **style))  # type: ignore[arg-type]
    shape = layout("active units", height=340)
    shape["yaxis"]["rangemode"] = "tozero"
    shape["hovermode"] = "x unified" if len(dense) <= 8 else "closest"
    return Figure(data, shape)


def raster(record: Record) -> Figure | None:
    """A raster of all events, like a spike train: a row for each unit, a tick for each drop and each regrowth.

    Below the rows, bars count the events of each decision: regrowths upward, drops downward. None without an event.
    """
    dense = first_widths(record)
    bands = {name: place for place, name in enumerate(dense)}
    spikes: dict[str, list[tuple[int, str, int]]] = {"dropped": [], "brought back": []}
    for entry in record.entries:
        for verb, chosen in (("dropped", entry.dropped), ("brought back", entry.grown)):
            spikes[verb] += [(entry.step, name, u) for name, units in chosen.items() if name in dense for u in units]
    if not any(spikes.values()):
        return None
    data: list[Trace] = []
    for (verb, events), color in zip(spikes.items(), (ORANGE, BLUE), strict=True):
        sign = -1 if verb == "dropped" else 1
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": verb,
                "legendgroup": verb,
                "x": [step for step, _, _ in events],
                "y": [height_of(bands, dense, name, unit) for _, name, unit in events],
                "text": [f"{short(name)} {unit}" for _, name, unit in events],
                "hovertemplate": f"<b>%{{text}}</b> {verb} at step %{{x:,d}}<extra></extra>",
                "marker": {"symbol": "line-ns-open", "size": 7, "color": color, "line": {"width": 1.6}},
            }
        )
        counts: dict[int, int] = {}
        for step, _, _ in events:
            counts[step] = counts.get(step, 0) + 1
        data.append(
            {
                "type": "bar",
                "name": verb,
                "legendgroup": verb,
                "showlegend": False,
                "x": list(counts),
                "y": [sign * count for count in counts.values()],
                "width": end_of(record) / 120,
                "yaxis": "y2",
                "hovertemplate": f"%{{y:,d}} units {verb} at step %{{x:,d}}<extra></extra>",
                "marker": {"color": color},
            }
        )
    shape = layout("", height=240 + max(26, min(56, 700 // len(dense))) * len(dense), barmode="relative")
    shape["yaxis"] |= rows([short(name) for name in dense], 0.5) | {"domain": [0.22, 1]}
    shape["yaxis2"] = {"domain": [0, 0.16], "title": {"text": "units"}, "zeroline": True, "automargin": True}
    shape["xaxis"] |= {"range": [0, end_of(record) * 1.01], "anchor": "y2"}
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
            data.append(
                {
                    "type": "histogram",
                    "name": f"{name} ({len(lengths):,}, median {digits(statistics.median(lengths))} steps)",
                    "x": lengths,
                    "xbins": {"start": 0, "end": end, "size": max(1.0, end / 40)},
                    "marker": {"color": color},
                    "hovertemplate": f"%{{y:,d}} {name} after %{{x}} steps<extra></extra>",
                }
            )
    return Figure(data, layout("units", "optimizer steps out of the model", height=280, barmode="stack"))


def loss_around(record: Record, history: Sequence[Point]) -> Figure | None:
    """The training loss around each decision that changed the model, less its mean before; None without a history.

    A jump at 0 is the effect of the event; the bold line is the mean over all events.
    """
    steps, losses = _training_losses(history)
    reach = max(4.0, AROUND * end_of(record))
    data: list[Trace] = []
    every: dict[int, list[float]] = {}
    width = reach / 8
    for entry in record.entries:
        back = sum(num_grown(entry).values())
        before = [loss for step, loss in zip(steps, losses, strict=True) if entry.step - reach < step <= entry.step]
        after = [loss for step, loss in zip(steps, losses, strict=True) if entry.step < step <= entry.step + reach]
        if not (dropped(entry) or back) or len(before) < 2 or len(after) < 2:
            continue
        base = statistics.fmean(before)
        by_bin: dict[int, list[float]] = {}
        for step, loss in zip(steps, losses, strict=True):
            if entry.step - reach < step <= entry.step + reach:
                by_bin.setdefault(math.ceil((step - entry.step) / width), []).append(loss - base)
        points = [((place - 0.5) * width, statistics.fmean(values)) for place, values in sorted(by_bin.items())]
        for place, values in by_bin.items():
            every.setdefault(place, []).append(statistics.fmean(values))
        label = f"step {entry.step:,}: {dropped(entry):,} dropped, {back:,} back"
        data.append(line(label, points, ORANGE if not back else BLUE, width=1.0) | {"opacity": 0.5})
    if not data:
        return None
    means = [((place - 0.5) * width, statistics.fmean(values)) for place, values in sorted(every.items())]
    data.append(line("mean over events", means, INK, width=3.0))
    shape = layout("loss less its mean before", "optimizer steps since the event", height=340)
    shape["showlegend"] = len(data) <= 8
    shape["shapes"] = [
        {"type": "line", "yref": "paper", "x0": 0, "x1": 0, "y0": 0, "y1": 1, "line": {"color": GREY, "dash": "dot"}}
    ]
    return Figure(data, shape)


def _training_losses(history: Sequence[Point]) -> tuple[list[float], list[float]]:
    """Steps and training losses, in order of steps."""
    found = sorted((p.step, p.loss) for p in history if p.split == "train" and p.loss is not None)
    return [step for step, _ in found], [loss for _, loss in found]


def dynamics_line(record: Record) -> str:
    """One sentence about dropped and regrown units."""
    found = rests(record)
    units = {(rest.group, rest.origin) for rest in found}
    back = [rest for rest in found if rest.returned]
    sentence = f"{len(units):,} units were dropped, {len({(r.group, r.origin) for r in back}):,} of them came back"
    if back:
        median = statistics.median(rest.end - rest.begin for rest in back)
        again = len(found) - len(units)
        sentence += f" after {digits(median)} steps (median), {again:,} were dropped again"
    return f"{escape(sentence)}."
