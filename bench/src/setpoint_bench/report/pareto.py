"""Pareto figures: the metric of every method and budget against what it cost, with the front that nothing beats."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from setpoint.report.figures import INK, Figure, Trace, escape, layout
from setpoint.report.numbers import human, scale
from setpoint.words import counted
from setpoint_bench.report.columns import metric_text
from setpoint_bench.report.looks import marks
from setpoint_bench.report.statistics import Estimate
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
    """Training FLOPs, seconds, final FLOPs and energy, as far as they are known.

    The FLOPs of masked models are those in theory, as the literature counts them.
    """
    dense = next((row for row in rows if row.method == DENSE), None)
    train, final = (None, None) if dense is None else (dense.train_flops, dense.final_flops)
    all_of_them = (
        Expense(
            "train",
            "training FLOPs",
            "FLOP",
            lambda row: _in_theory(row, train, row.theoretical_train_ratio, row.train_flops),
        ),
        Expense("time", "training time", "s", lambda row: row.seconds),
        Expense(
            "final",
            "FLOPs of a step at the end",
            "FLOP",
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
    spent = [(row, cost) for row, cost in known if row.theoretical_ratio is None or expense.unit != "FLOP"]
    factor, unit = (1.0, "s") if expense.unit == "s" else scale(max(cost.mean for _, cost in known), expense.unit)
    budgets = sorted({row.budget for row in rows if row.budget is not None and row.method != DENSE}, reverse=True)
    looks = marks(row.method for row in rows)
    data: list[Trace] = [front_line(spent, factor)]
    names = dict.fromkeys(row.method for row in rows)
    for method in sorted(names, key=lambda name: name == SETPOINT):  # Setpoint's marks lie on top
        of_method = [(row, cost) for row, cost in known if row.method == method]
        if of_method:
            data.append(_trace(method, of_method, factor, budgets, looks[method]))
            data[-1]["hovertext"] = [_hover(row, cost, expense) for row, cost in of_method]
    loss = f"loss ({rows[0].unit})" if rows[0].unit else "loss"
    title = "accuracy (%)" if rows[0].metric == "accuracy" else loss
    shape = layout(title, f"{expense.title} ({unit})", height=400)
    shape["showlegend"] = False  # one legend for all figures stands above them
    shape["xaxis"]["rangemode"] = "tozero"
    return Figure(data, shape)


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
    theory = " in theory" if row.theoretical_ratio is not None and expense.unit == "FLOP" else ""
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
