"""Figures of a comparison as plain Plotly specifications: curves of the runs and where their seconds went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64

from setpoint.report.figures import AXES, BLUE, FAINT, GREY, ORANGE, OTHERS, Figure, Trace, escape, layout
from setpoint.report.numbers import duration, percent, scale
from setpoint_bench.report.history import Point
from setpoint_bench.report.results import Cell
from setpoint_bench.report.statistics import mean

MOST_POINTS = 240
FEW = 6
"""Up to this number of labels, all curves are shown at once and the legend stands above."""
ALWAYS = ("dense", "small", "small-long", "setpoint")
"""Methods whose curves are shown even among many."""
SPLITS = ("validation", "test", "train")


@dataclass(frozen=True)
class Style:
    """How the curves of one method look: colour, dash and line width in pixels."""

    color: str
    dash: str
    width: float


def styles(labels: Sequence[str]) -> dict[str, Style]:
    """A style for each label, the same in all figures: Setpoint blue, small orange, dense grey."""
    fixed = {"dense": Style(GREY, "solid", 1.8), "small": Style(ORANGE, "dash", 1.8)}
    found: dict[str, Style] = {}
    dashes, free = ("solid", "dashdot", "dot", "longdash"), 0
    ours = [label for label in labels if label.partition(" ")[0] == "setpoint"]
    for label in labels:
        if label in fixed:
            found[label] = fixed[label]
        elif label in ours:
            found[label] = Style(BLUE, dashes[ours.index(label) % len(dashes)], 2.4)
        else:
            found[label] = Style(OTHERS[free % len(OTHERS)], dashes[1 + free % 3], 1.8)
            free += 1
    return found


def curves(series: Mapping[str, Sequence[Cell]], quantity: str) -> Figure | None:
    """Loss or accuracy over the run, by method; None if no run has it.

    Training curves are thin, of means over stretches of steps (at most `MOST_POINTS` a curve). Validation and test
    values are shown as they were measured.
    """
    look = styles(list(series))
    factor, title = (100.0, "accuracy (%)") if quantity == "accuracy" else (1.0, "loss")
    data: list[Trace] = []
    abscissas: dict[str, list[Sequence[float | None]]] = {axis: [] for axis in AXES}
    for label, cells in series.items():
        named = False
        for split in SPLITS:
            for cell in cells:
                points = [p for p in cell.history if p.split == split and getattr(p, quantity) is not None]
                if not points:
                    continue
                table = thin(points, quantity)
                for axis, column in zip(AXES, table[:, :3].T, strict=True):
                    abscissas[axis].append(plain(column))
                data.append(
                    curve(escape(label), split, look[label], plain(table[:, 3] * factor), show=not named)
                    | {"x": abscissas["step"][-1]}
                )
                named = True
    if not data:
        return None
    many = len(series) > FEW
    for trace in data:
        if many and trace["name"].partition(" ")[0] not in ALWAYS:
            trace["visible"] = "legendonly"
    largest = max((x for xs in abscissas["flops"] for x in xs if x is not None), default=0.0)
    unit, name = scale(largest, "FLOP")
    abscissas["flops"] = [[None if x is None else x / unit for x in xs] for xs in abscissas["flops"]]
    titles = AXES | {"flops": f"training so far ({name})"}
    return Figure(
        data,
        layout(title) if not many else _below(layout(title, height=340 + 11 * len(series))),
        {axis: (titles[axis], xs) for axis, xs in abscissas.items()},
    )


def curve(label: str, split: str, look: Style, values: Sequence[float | None], show: bool) -> Trace:
    """One curve; all curves of a label share one entry of the legend."""
    trained = split == "train"
    return {
        "type": "scatter",
        "mode": "lines" if trained else "lines+markers",
        "name": label,
        "legendgroup": label,
        "showlegend": show,
        "y": values,
        "opacity": 0.45 if trained else 1.0,
        "line": {"color": look.color, "dash": look.dash, "width": 1.2 if trained else look.width},
        "marker": {"color": look.color, "size": 5},
        "hovertemplate": f"<b>{label}</b>, {split}<br>%{{y:.4g}} at %{{x:,.4~g}}<extra></extra>",
    }


def _below(shape: dict[str, Any]) -> dict[str, Any]:
    """The layout with its legend below the plot, where a long one has room."""
    shape["legend"] |= {"y": -0.18 * 360 / shape["height"], "yanchor": "top", "font": {"size": 11}}
    shape["margin"] |= {"t": 16}
    return shape


def thin(points: Sequence[Point], quantity: str) -> Float64[np.ndarray, "points 4"]:
    """Columns step, seconds, FLOPs and quantity; long training curves become means over stretches."""
    rows = [(p.step, p.seconds, p.flops, getattr(p, quantity)) for p in points]
    table = np.array(rows, dtype=np.float64)
    table = table[np.argsort(table[:, 0], kind="stable")]
    if len(table) <= MOST_POINTS or points[0].split != "train":
        return table
    return np.stack([stretch.mean(axis=0) for stretch in np.array_split(table, MOST_POINTS)])


def plain(values: Float64[np.ndarray, " points"]) -> list[float | None]:
    """Values for JSON, with six significant digits; None for a value that is not finite."""
    return [float(f"{value:.6g}") if np.isfinite(value) else None for value in values]


PARTS = ("training", "sensing", "deciding", "resizing", "attaching, other")


def seconds_by_part(cells: Sequence[Cell]) -> dict[str, float] | None:
    """Mean seconds by part of the run, over the runs with a ledger if there are any; None if they have no times.

    Sensing, deciding and resizing come from the ledger; other overhead (tracing the model and verifying cuts
    among it) is "attaching, other", and the remainder is training.
    """
    cells = [cell for cell in cells if cell.record is not None] or cells
    total = mean(cell.seconds for cell in cells)
    if total is None:
        return None
    entries = [cell.record.entries if cell.record else () for cell in cells]
    parts = {
        name: sum(getattr(entry, f"{name}_seconds") for run in entries for entry in run) / len(cells)
        for name in PARTS[1:4]
    }
    overhead = max(mean(cell.overhead_seconds for cell in cells) or 0.0, sum(parts.values()))
    return {"training": total - overhead, **parts, "attaching, other": overhead - sum(parts.values())}


def seconds_figure(series: Mapping[str, Sequence[Cell]]) -> Figure | None:
    """Seconds of a run by part and method; None if no run has times."""
    table = {label: parts for label, cells in series.items() if (parts := seconds_by_part(cells)) is not None}
    if not table:
        return None
    colors = dict(zip(PARTS, (FAINT, BLUE, OTHERS[0], ORANGE, GREY), strict=True))
    data: list[Trace] = []
    for part in PARTS:
        hover = [f"{part}: {duration(p[part])}, {percent(p[part] / (sum(p.values()) or 1.0))}" for p in table.values()]
        data.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": part,
                "y": [escape(label) for label in table],
                "x": [parts[part] for parts in table.values()],
                "hovertext": hover,
                "hovertemplate": "<b>%{y}</b><br>%{hovertext}<extra></extra>",
                "marker": {"color": colors[part]},
            }
        )
    shape = layout(
        "",
        "seconds of the whole run",
        height=130 + (44 if len(table) <= 12 else 26) * len(table),
        barmode="stack",
        bargap=0.35,
    )
    shape["yaxis"] |= {"autorange": "reversed", "type": "category"}
    return Figure(data, shape)
