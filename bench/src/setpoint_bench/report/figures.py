"""Figures of many runs: the metric against what it cost, learning against training FLOPs, and FLOPs per step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from setpoint.report.markup import BLUE, FAINT, GREY, INK, ORANGE, OTHERS, Figure, Rule, Trace, line
from setpoint.report.numbers import scale
from setpoint_bench.report.columns import metric_text
from setpoint_bench.report.results import Cell
from setpoint_bench.report.statistics import Estimate
from setpoint_bench.report.summary import DENSE, SETPOINT, Row

FIXED = {DENSE: GREY, "small": ORANGE, SETPOINT: BLUE}
MOST_POINTS = 80
"""How many points a curve of the training loss has: of more, means over stretches."""
FEW = 6
"""Up to this number of labels, all have curves."""
ALWAYS = (DENSE, "small", "small-long", SETPOINT)
"""Methods that have curves even among many."""
DASHES = ("solid", "dash", "dot", "dashdot")

Cost = Callable[[Row], Estimate | None]


def looks(methods: Iterable[str]) -> dict[str, tuple[str, bool]]:
    """Colour of each method, the same in all figures, and whether its dots are squares: for the second round."""
    others = sorted({method for method in methods if method not in FIXED})
    found = {method: (color, False) for method, color in FIXED.items()}
    for place, method in enumerate(others):
        found[method] = OTHERS[place % len(OTHERS)], place // len(OTHERS) % 2 == 1
    return found


def training_flops(row: Row) -> Estimate | None:
    """What the run cost; None for a masked model, whose FLOPs in theory nobody has spent."""
    return None if row.theoretical_ratio is not None or row.train_flops is None else Estimate(row.train_flops)


def training_seconds(row: Row) -> Estimate | None:
    """What the run took; None where the clocks of the runs do not compare."""
    return None if row.clock == "shared" else row.seconds


def pareto(rows: Sequence[Row], cost: Cost, title: str, unit: str) -> Figure | None:
    """The metric against a cost: a dot per method and budget with its deviation over seeds, and the front.

    Dots are large at the largest budget and small at the others. The line joins what no other dot beats in both.
    None for fewer than two rows whose metric and cost are numbers.
    """
    known = [(row, spent) for row in rows if math.isfinite(row.value.mean) and (spent := cost(row)) is not None]
    if len(known) < 2:
        return None
    factor, counted = (1.0, "s") if unit == "s" else scale(max(spent.mean for _, spent in known), unit)
    budgets = sorted({row.budget for row in rows if row.budget is not None and row.method != DENSE}, reverse=True)
    colors, data = looks(row.method for row in rows), [_front(known, factor)]
    for method in dict.fromkeys(row.method for row, _ in known):
        points = [(row, spent) for row, spent in known if row.method == method]
        color, square = colors[method]
        data.append(_deviations(points, factor, color))
        for rows_shown, dot in (
            ([point for point in points if point[0].budget not in budgets[1:]], 11),
            ([point for point in points if point[0].budget in budgets[1:]], 7),
        ):
            places = [(spent.mean / factor, row.value.mean * _percent(row)) for row, spent in rows_shown]
            texts = [f"{row.label}\n{metric_text(row)}" for row, _ in rows_shown]
            data.append(Trace(method, places, color, texts, dot=dot, square=square))
    return Figure(data, _metric_title(rows[0]), f"{title} ({counted})", height=400, x_from_zero=True)


def _deviations(points: Sequence[tuple[Row, Estimate]], factor: float, color: str) -> Trace:
    """Bars of the deviation over seeds, both ways, around the means."""
    ends: list[tuple[float, float | None]] = []
    for row, spent in points:
        x, y = spent.mean / factor, row.value.mean * _percent(row)
        right, up = (spent.deviation or 0.0) / factor, (row.value.deviation or 0.0) * _percent(row)
        # A y of None lifts the pen.
        ends += [(x - right, y), (x + right, y), (x, None), (x, y - up), (x, y + up), (x, None)]
    return Trace("deviation", ends, color, width=1, in_legend=False)


def _front(known: Sequence[tuple[Row, Estimate]], factor: float) -> Trace:
    """The staircase of what no other dot equals or beats in both a low cost and a good metric."""
    better = 1.0 if known[0][0].metric == "accuracy" else -1.0
    points = [(spent.mean / factor, better * row.value.mean * _percent(row)) for row, spent in known]
    best: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or y > best[-1][1]:
            best.append((x, y))
    return Trace("front", [(x, better * y) for x, y in best], INK, width=1.2, stairs=True, opacity=0.55)


def _percent(row: Row) -> float:
    return 100.0 if row.metric == "accuracy" else 1.0


def _metric_title(row: Row) -> str:
    return "accuracy (%)" if row.metric == "accuracy" else f"loss ({row.unit})" if row.unit else "loss"


def followed(series: Mapping[str, Sequence[Cell]]) -> dict[str, Sequence[Cell]]:
    """The labels whose training is drawn."""
    return {label: cells for label, cells in series.items() if len(series) <= FEW or label.partition(" ")[0] in ALWAYS}


def _line_look(labels: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and dash of each label: budgets of a method share its colour and differ by their dashes."""
    methods = [label.partition(" ")[0] for label in labels]
    colors = looks(methods)
    return {
        label: (colors[method][0], DASHES[methods[:place].count(method) % len(DASHES)])
        for place, (label, method) in enumerate(zip(labels, methods, strict=True))
    }


def spending(series: Mapping[str, Sequence[Cell]]) -> Figure | None:
    """FLOPs per step over steps, of the first run of each label, with the budgets; None if no run was cut."""
    lines = {label: _spending_line(cells[0]) for label, cells in followed(series).items()}
    lines = {label: points for label, points in lines.items() if points}
    if not any(cell.record for cells in series.values() for cell in cells) or not lines:
        return None
    factor, unit = scale(max(y for points in lines.values() for _, y in points), "FLOPs")
    look = _line_look(list(lines))
    data = [
        line(label, [(x, y / factor) for x, y in points], look[label][0], dash=look[label][1], width=2.0, unit=unit)
        for label, points in lines.items()
    ]
    budgets = {cell.budget for cells in series.values() for cell in cells if cell.method != DENSE and cell.budget}
    rules = [
        Rule(budget * lines[DENSE][0][1] / factor, f"budget {budget:g}", FAINT)
        for budget in (sorted(budgets) if DENSE in lines else ())
    ]
    return Figure(data, f"{unit} per step", height=300, rules=rules, x_from_zero=True, y_from_zero=True)


def _spending_line(cell: Cell) -> list[tuple[float, float]]:
    """FLOPs per step over steps: in stairs from the ledger, or level.

    Empty where a dense run came before, or where the model was cut and no ledger says when.
    """
    record, end = cell.record, max((point.step for point in cell.history), default=0.0)
    if cell.family == "post-training" or (cell.resizes and record is None):
        return []
    if record is None or "flops" not in record.dense:
        return [] if cell.final_flops is None or not end else [(0.0, cell.final_flops), (end, cell.final_flops)]
    level, points = record.dense["flops"], [(0.0, record.dense["flops"])]
    for entry in record.entries:
        if "flops" in entry.spent:
            points += [(float(entry.step), level), (float(entry.step), entry.spent["flops"])]
            level = entry.spent["flops"]
    return [*points, (max(end, points[-1][0]), level)]


def curves(series: Mapping[str, Sequence[Cell]], quantity: str) -> Figure | None:
    """Loss or accuracy against training FLOPs, of the first run of each label; None if no run has it.

    Training curves are thin; validation and test values are shown as they were measured.
    """
    percent, shown = 100.0 if quantity == "accuracy" else 1.0, followed(series)
    look, data = _line_look(list(shown)), list[Trace]()
    flops = [point.flops for cells in shown.values() for point in cells[0].history if point.flops]
    factor, unit = scale(max(flops, default=1.0), "FLOPs")
    for label, cells in shown.items():
        for split in ("validation", "test", "train"):
            measured = [
                (point.flops / factor, percent * value)
                for point in cells[0].history
                if point.split == split and point.flops is not None and (value := getattr(point, quantity)) is not None
            ]
            points = [point for point in measured if all(map(math.isfinite, point))]
            if split == "train" and len(points) > MOST_POINTS:
                stretches = np.array_split(np.array(points), MOST_POINTS)
                points = [(float(x), float(y)) for x, y in (stretch.mean(axis=0) for stretch in stretches)]
            if points:
                color, dash = look[label]
                thin = split == "train"
                texts = [f"{label}, {split}\n{y:.4g} after {x:.4g} {unit}" for x, y in points]
                data.append(
                    Trace(
                        label,
                        points,
                        color,
                        texts,
                        width=1.2 if thin else 2.0,
                        dash=dash,
                        dot=0 if thin else 6,
                        opacity=0.45 if thin else 1.0,
                        in_legend=label not in {other.name for other in data},
                    )
                )
    title = "accuracy (%)" if quantity == "accuracy" else "loss"
    return Figure(data, title, f"training so far ({unit})") if data else None
