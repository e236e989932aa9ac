"""Figures of the runs: FLOPs per step, and loss or accuracy, over a training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float64

from setpoint.report.drawing import AXES, FAINT, Figure, Trace, escape, layout, line
from setpoint.report.numbers import scale
from setpoint_bench.report.history import Point
from setpoint_bench.report.looks import Style, styles
from setpoint_bench.report.results import Cell
from setpoint_bench.report.statistics import mean
from setpoint_bench.report.summary import DENSE, SETPOINT

MOST_POINTS = 80
"""How many points a curve of the training loss has."""
FEW = 6
"""Up to this number of labels, all have curves."""
ALWAYS = (DENSE, "small", "small-long", SETPOINT)
"""Methods that have curves even among many."""
SPLITS = ("validation", "test", "train")


def followed(series: Mapping[str, Sequence[Cell]]) -> dict[str, Sequence[Cell]]:
    """The labels whose training is drawn."""
    return {label: cells for label, cells in series.items() if len(series) <= FEW or label.partition(" ")[0] in ALWAYS}


def spending(series: Mapping[str, Sequence[Cell]]) -> Figure | None:
    """FLOPs per step over steps, of the first run of each label, with the budgets; None if no run was cut."""
    look, lines = styles(list(series)), {}
    for label, cells in series.items():
        cell = next((cell for cell in cells if cell.record), cells[0])
        if (cell.record or cell.method in (DENSE, "small")) and (spent := spending_line(cell)):
            lines[label] = spent
    if not any(cell.record for cells in series.values() for cell in cells):
        return None
    factor, unit = scale(max(y for spent in lines.values() for _, y in spent), "FLOPs")
    data = []
    for label, spent in lines.items():
        style, points = look[label], [(x, y / factor) for x, y in spent]
        data.append(line(escape(label), points, style.color, dash=style.dash, width=style.width))
    dense = next((y for label, spent in lines.items() for _, y in spent[:1] if label == DENSE), None)
    budgets = {cell.budget for cells in series.values() for cell in cells if cell.method != DENSE and cell.budget}
    shapes, notes = list[Trace](), list[Trace]()
    for budget in sorted(budgets) if dense else ():
        y = budget * (dense or 0.0) / factor
        shapes.append({"y0": y, "line": {"color": FAINT, "dash": "solid", "width": 1.4}})
        notes.append({"y": y, "text": f"budget {budget:g}"})
    shape = layout(f"{unit} per step", height=300, shapes=shapes, annotations=notes)
    shape["yaxis"]["rangemode"] = shape["xaxis"]["rangemode"] = "tozero"
    return Figure(data, shape)


def spending_line(cell: Cell) -> list[tuple[float, float]]:
    """FLOPs per step over steps: in stairs from the ledger, or level.

    None where a dense run came before, or where the model was cut and no ledger says when.
    """
    record = cell.record
    if cell.family == "post-training" or (cell.resizes and record is None):
        return []
    end = max((point.step for point in cell.history), default=0.0)
    if record is not None and "flops" in record.dense:
        level, line = record.dense["flops"], [(0.0, record.dense["flops"])]
        for entry in record.entries:
            if "flops" in entry.spent:
                line += [(float(entry.step), level), (float(entry.step), entry.spent["flops"])]
                level = entry.spent["flops"]
        return [*line, (max(end, line[-1][0]), level)]
    return [] if cell.final_flops is None or not end else [(0.0, cell.final_flops), (end, cell.final_flops)]


def curves(series: Mapping[str, Sequence[Cell]], quantity: str, axis: str) -> Figure | None:
    """Loss or accuracy over the run, by method, against an axis of `AXES`; None if no run has it.

    Training curves are thin, of means over stretches of steps (at most `MOST_POINTS` a curve). Validation and test
    values are shown as they were measured.
    """
    look = styles(list(series))
    factor, title = (100.0, "accuracy (%)") if quantity == "accuracy" else (1.0, "loss")
    column, data, shown = list(AXES).index(axis), list[Trace](), set[str]()
    for label, cells in followed(series).items():
        for split in SPLITS:
            for cell in cells:
                points = [p for p in cell.history if p.split == split and getattr(p, quantity) is not None]
                table = thin(points, quantity)
                table = table[np.isfinite(table[:, column])]
                if len(table):
                    made = curve(
                        escape(label), split, look[label], plain(table[:, 3] * factor), show=label not in shown
                    )
                    data.append(made | {"x": plain(table[:, column])})
                    shown.add(label)
    if not data:
        return None
    name = AXES[axis]
    if axis == "flops":
        unit, counted = scale(max(x for trace in data for x in trace["x"]), "FLOPs")
        name = f"training so far ({counted})"
        data = [{**trace, "x": [x / unit for x in trace["x"]]} for trace in data]
    return Figure(data, layout(title, name))


def curve(label: str, split: str, look: Style, values: Sequence[float | None], show: bool) -> Trace:
    """One curve; all curves of a label share one entry of the legend."""
    trained = split == "train"
    return {
        "type": "scatter",
        "mode": "lines" if trained else "lines+markers",
        "name": label,
        "showlegend": show,
        "y": values,
        "opacity": 0.45 if trained else 1.0,
        "line": {"color": look.color, "dash": look.dash, "width": 1.2 if trained else look.width},
        "marker": {"color": look.color, "size": 5},
        "hovertemplate": f"<b>{label}</b>, {split}<br>%{{y:.4g}} at %{{x:,.4g}}",
    } | ({"hoverinfo": "skip"} if trained else {})


def thin(points: Sequence[Point], quantity: str) -> Float64[np.ndarray, "points 4"]:
    """Columns step, seconds, FLOPs and quantity; long training curves become means over stretches."""
    rows = [(p.step, p.seconds, p.flops, getattr(p, quantity)) for p in points]
    table = np.array(rows, dtype=np.float64).reshape(-1, 4)
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
        name: sum(entry.own_seconds.get(name, 0.0) for run in entries for entry in run) / len(cells)
        for name in PARTS[1:4]
    }
    overhead = max(mean(cell.overhead_seconds for cell in cells) or 0.0, sum(parts.values()))
    return {"training": total - overhead, **parts, "attaching, other": overhead - sum(parts.values())}
