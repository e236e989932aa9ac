"""Figures of the metric: of every method at a budget, best first, and against what it cost, with the front."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from setpoint.messages import counted
from setpoint.report.drawing import FAINT, GREY, INK, Figure, Trace, escape, layout
from setpoint.report.numbers import human, scale
from setpoint_bench.report.columns import metric_text
from setpoint_bench.report.looks import marks
from setpoint_bench.report.statistics import FEWEST_FOR_AN_INTERVAL, Estimate, half_interval
from setpoint_bench.report.summary import DENSE, SETPOINT, Row


@dataclass(frozen=True)
class Expense:
    """What a method costs, as one axis.

    Args:
        name: for the figure's id.
        title: of the axis, without its unit.
        unit: of the values.
        of: mean and standard deviation of a row, None if unknown.
    """

    name: str
    title: str
    unit: str
    of: Callable[[Row], Estimate | None]


def _exact(value: float | None) -> Estimate | None:
    return None if value is None else Estimate(value)


def _in_theory(row: Row, whole: float | None, share: float | None, realised: float | None) -> Estimate | None:
    """Cost of a masked model if zeros cost nothing; of any other model its actual cost."""
    return _exact(realised if share is None or whole is None else share * whole)


def expenses(rows: Sequence[Row]) -> tuple[Expense, ...]:
    """Training FLOPs, seconds, final FLOPs and energy, as far as they are known and comparable.

    The FLOPs of masked models are those in theory, as the literature counts them.
    """
    dense = next((row for row in rows if row.method == DENSE), None)
    train, final = (None, None) if dense is None else (dense.train_flops, dense.final_flops)
    all_of_them = (
        Expense(
            "train",
            "training FLOPs",
            "FLOPs",
            lambda row: _in_theory(row, train, row.theoretical_train_ratio, row.train_flops),
        ),
        Expense("time", "training time", "s", lambda row: None if row.clock == "shared" else row.seconds),
        Expense(
            "final",
            "FLOPs of a step at the end",
            "FLOPs",
            lambda row: _in_theory(row, final, row.theoretical_ratio, row.final_flops),
        ),
        Expense("energy", "energy of training", "J", lambda row: row.energy_j),
    )
    return tuple(each for each in all_of_them if len(_known(rows, each)) > 1)


def _known(rows: Sequence[Row], expense: Expense) -> list[tuple[Row, Estimate]]:
    """Rows and what they cost, where both that and the metric are numbers: a run that diverged has no place."""
    costs = [(row, expense.of(row)) for row in rows if math.isfinite(row.value.mean)]
    return [(row, cost) for row, cost in costs if cost is not None and math.isfinite(cost.mean)]


def pareto(rows: Sequence[Row], expense: Expense) -> Figure:
    """The metric against an expense: a mark per method and budget with its deviation over seeds, and the front.

    Marks are full at the largest budget and open at smaller ones; the line joins what no other mark beats in both
    the metric and the expense. Masked models do not spend their FLOPs in theory, so there they are not on it.
    """
    known = _known(rows, expense)
    spent = [(row, cost) for row, cost in known if row.theoretical_ratio is None or expense.unit != "FLOPs"]
    factor, unit = (1.0, "s") if expense.unit == "s" else scale(max(cost.mean for _, cost in known), expense.unit)
    budgets = budgets_of(rows)
    looks = marks(row.method for row in rows)
    data: list[Trace] = [front_line(spent, factor)]
    names = dict.fromkeys(row.method for row in rows)
    for method in sorted(names, key=lambda name: name == SETPOINT):  # Setpoint's marks lie on top
        of_method = [(row, cost) for row, cost in known if row.method == method]
        if of_method:
            data.append(_trace(method, of_method, factor, budgets, looks[method]))
            data[-1]["hovertext"] = [_hover(row, cost, expense) for row, cost in of_method]
    shape = layout(_metric_title(rows[0]), f"{expense.title} ({unit})", height=400)
    shape["showlegend"] = False  # one legend for all figures stands above them
    shape["xaxis"]["rangemode"] = "tozero"
    return Figure(data, shape)


def budgets_of(rows: Sequence[Row]) -> list[float]:
    """The budgets of the rows, from the largest."""
    return sorted({row.budget for row in rows if row.budget is not None and row.method != DENSE}, reverse=True)


def dots(rows: Sequence[Row], budget: float) -> Figure | None:
    """The metric of every method at a budget, and of those without one, with its interval: a line each, best first.

    None if no metric is a number. The axis holds all rows, so that figures of several budgets compare.
    """
    finite = [row for row in rows if math.isfinite(row.value.mean)]
    best = -1 if rows[0].metric == "accuracy" else 1
    shown = [row for row in finite if row.method == DENSE or row.budget in (None, budget)]
    shown.sort(key=lambda row: best * row.value.mean)
    if not shown:
        return None
    looks, mark = marks(row.method for row in rows), "-open" if budget in budgets_of(rows)[1:] else ""
    data, shapes = list[Trace](), list[Trace]()
    for place, row in enumerate(shown):
        y, (color, symbol) = len(shown) - 1 - place, looks[row.method]
        value, half = row.value.mean * _factor(row), _half(row)
        interval = f" ± {half:.2g} (95 % interval)" if half else ""
        text = f"<b>{escape(row.label)}</b><br>{escape(row.metric)} {value:.4g}{interval}<br>"
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": escape(row.method),
                "x": [value],
                "y": [y],
                "error_x": {"array": [half]},
                "error_y": {"array": [0.0]},
                "marker": {"color": color, "symbol": [symbol + (mark if row.budget == budget else "")]},
                "hovertext": [text + counted(row.num_seeds, "seed")],
                "hovertemplate": "%{hovertext}",
            }
        )
        if row.method == SETPOINT:
            shapes.insert(0, {"y0": y, "line": {"color": FAINT, "width": 20}})
        elif row.method == DENSE:
            shapes.append({"x0": value, "line": {"color": GREY, "width": 1.5, "dash": "dash"}})
    shape = layout("", _metric_title(rows[0]), height=20 * len(shown) + 12, shapes=shapes, showlegend=False)
    ends = [row.value.mean * _factor(row) + side * _half(row) for row in finite for side in (-1, 1)]
    room = 0.04 * (max(ends) - min(ends)) or 1.0
    shape["xaxis"] |= {"range": (min(ends) - room, max(ends) + room), "showgrid": True}
    names = [_row_name(row) for row in reversed(shown)]
    shape["yaxis"] |= {"range": (-0.8, len(shown) - 0.2), "tickvals": [*range(len(shown))], "ticktext": names}
    return Figure(data, shape)


def _half(row: Row) -> float:
    """Half of the 95 % interval of a row's mean; 0 for too few seeds."""
    deviation = row.value.deviation
    if deviation is None or row.num_seeds < FEWEST_FOR_AN_INTERVAL:
        return 0.0
    return half_interval(deviation, row.num_seeds) * _factor(row)


def _row_name(row: Row) -> str:
    """A method's name as a label: bold for dense and Setpoint, in italics for a masked model."""
    name = escape(row.method)
    if row.method in (DENSE, SETPOINT):
        return f"<b>{name}</b>"
    return name if row.theoretical_ratio is None else f"<em>{name}</em>"


def _metric_title(row: Row) -> str:
    loss = f"loss ({row.unit})" if row.unit else "loss"
    return "accuracy (%)" if row.metric == "accuracy" else loss


def _factor(row: Row) -> float:
    return 100.0 if row.metric == "accuracy" else 1.0


def _trace(
    method: str,
    points: Sequence[tuple[Row, Estimate]],
    factor: float,
    budgets: Sequence[float],
    look: tuple[str, str],
) -> Trace:
    color, mark = look
    symbols = [mark + ("-open" if row.budget in budgets[1:] else "") for row, _ in points]

    def bars(spreads: Sequence[float | None]) -> dict[str, Any]:
        return {"array": [spread or 0.0 for spread in spreads]}

    return {
        "type": "scatter",
        "mode": "markers+lines" if len(points) > 1 else "markers",
        "name": escape(method),
        "x": [cost.mean / factor for _, cost in points],
        "y": [row.value.mean * _factor(row) for row, _ in points],
        "error_y": bars([None if (d := row.value.deviation) is None else d * _factor(row) for row, _ in points]),
        "error_x": bars([None if (d := cost.deviation) is None else d / factor for _, cost in points]),
        "line": {"color": color, "width": 1, "dash": "dot"},
        "marker": {"color": color, "symbol": symbols},
        "hovertemplate": "%{hovertext}",
    }


def _hover(row: Row, cost: Estimate, expense: Expense) -> str:
    theory = " in theory" if row.theoretical_ratio is not None and expense.unit == "FLOPs" else ""
    amount = f"{cost.mean:.3g} s" if expense.unit == "s" else human(cost.mean, expense.unit)
    return (
        f"<b>{escape(row.label)}</b><br>{escape(row.metric)} {metric_text(row)}<br>"
        f"{escape(expense.title)} {amount}{theory}<br>{counted(row.num_seeds, 'seed')}"
    )


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of points (cost, value), those that no other equals or beats in both a low cost and a high value.

    >>> front([(1.0, 0.5), (2.0, 0.4), (3.0, 0.9)])
    [(1.0, 0.5), (3.0, 0.9)]
    """
    found: list[tuple[float, float]] = []
    for cost, value in sorted(points, key=lambda point: (point[0], -point[1])):
        if not found or value > found[-1][1]:
            found.append((cost, value))
    return found


def front_line(known: Sequence[tuple[Row, Estimate]], factor: float) -> Trace:
    """The front as a staircase."""
    sign = 1.0 if any(row.metric == "accuracy" for row, _ in known) else -1.0
    best = front([(cost.mean / factor, sign * row.value.mean * _factor(row)) for row, cost in known])
    return {
        "type": "scatter",
        "mode": "lines",
        "name": "front",
        "x": [cost for cost, _ in best],
        "y": [sign * value for _, value in best],
        "line": {"color": INK, "width": 1.2, "shape": "hv"},
        "opacity": 0.55,
        "hoverinfo": "skip",
    }
