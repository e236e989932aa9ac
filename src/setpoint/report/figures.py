"""Figures of the report as plain Plotly specifications: curves of the runs, and their seconds by part."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float64

from setpoint.report.numbers import duration, percent, scale
from setpoint.report.results import Cell, Point
from setpoint.report.statistics import mean

Trace = dict[str, Any]

GREY, BLUE, ORANGE = "#667085", "#0b62a8", "#c2570c"
OTHERS = ("#00795c", "#a2407f", "#8a6d00", "#4a4ab8")
FAINT, INK = "#c9d1dc", "#1c2430"
DARK = {
    GREY: "#a3acb9",
    BLUE: "#5eb1f5",
    ORANGE: "#f0944d",
    OTHERS[0]: "#3fc9a0",
    OTHERS[1]: "#e08cc0",
    OTHERS[2]: "#d9b93a",
    OTHERS[3]: "#a3a3ff",
    FAINT: "#3a4554",
    INK: "#e6eaf0",
    "#e6edf5": "#1b2530",
}
"""The same colours on a dark page. All pairs differ in lightness too, for readers who cannot see the hue."""

AXES = {"step": "optimizer step", "seconds": "training time (s)", "flops": "training FLOPs"}
MOST_POINTS = 240
FEW = 6
"""Up to this number of labels, all curves are shown at once and the legend stands above."""
ALWAYS = ("dense", "small", "small-long", "setpoint")
"""Methods whose curves are shown even among many."""
SPLITS = ("validation", "test", "train")


@dataclass(frozen=True)
class Figure:
    """A Plotly specification, and the other abscissas its curves can be drawn against.

    Args:
        layout: the page fills in colours and fonts.
        abscissas: by name of the axis, its title and the x values of every trace.
    """

    data: Sequence[Trace]
    layout: Mapping[str, Any]
    abscissas: Mapping[str, tuple[str, Sequence[Sequence[float | None]]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Style:
    """How the curves of one method look: colour, dash and line width in pixels."""

    color: str
    dash: str
    width: float


def plotly_script() -> str:
    """The Plotly library as JavaScript.

    Raises:
        ModuleNotFoundError: if plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'the report needs plotly, which is not installed: pip install "setpoint[report]"', name="plotly"
        ) from error
    return str(get_plotlyjs())


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


def layout(y_title: str, x_title: str = AXES["step"], height: int = 360, **more: Any) -> dict[str, Any]:
    """A layout with titled axes and a legend above the plot."""
    return {
        "height": height,
        "margin": {"l": 64, "r": 24, "t": 36, "b": 48},
        "hovermode": "closest",
        "hoverlabel": {"align": "left"},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "traceorder": "normal"},
        "xaxis": {"title": {"text": x_title}, "zeroline": False, "automargin": True},
        "yaxis": {"title": {"text": y_title}, "zeroline": False, "automargin": True},
        **more,
    }


def escape(text: str) -> str:
    """Text for Plotly's labels, which interpret some HTML and `%{...}` placeholders."""
    return html.escape(text).replace("{", "&#123;")


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
        told = False
        for split in SPLITS:
            for cell in cells:
                points = [p for p in cell.history if p.split == split and getattr(p, quantity) is not None]
                if not points:
                    continue
                table = thin(points, quantity)
                for axis, column in zip(AXES, table[:, :3].T, strict=True):
                    abscissas[axis].append(plain(column))
                data.append(
                    curve(escape(label), split, look[label], plain(table[:, 3] * factor), show=not told)
                    | {"x": abscissas["step"][-1]}
                )
                told = True
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
    """Mean seconds by part of the run; None if the runs have no times.

    Sensing, deciding and resizing come from the ledger; other overhead (tracing the model and verifying cuts
    among it) is "attaching, other", and the remainder is training.
    """
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
