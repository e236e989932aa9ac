"""Pareto figures show every method once, and their line joins what nothing beats."""

from __future__ import annotations

from dataclasses import replace

import pytest

from setpoint_bench.method import all_methods
from setpoint_bench.report.curves import curves
from setpoint_bench.report.history import Point
from setpoint_bench.report.looks import marks, styles
from setpoint_bench.report.pareto import dots, expenses, pareto
from setpoint_bench.report.results import Cell, Results
from setpoint_bench.report.summary import Row, series, summary_rows


def rows(metric: str = "accuracy", *more: Cell) -> tuple[Row, ...]:
    """Dense, small and Setpoint at two budgets, over two seeds."""
    made = [("dense", None, 0.95, 100.0), ("small", 0.5, 0.93, 50.0), ("setpoint", 0.5, 0.94, 60.0)]
    made += [("small", 0.25, 0.90, 25.0), ("setpoint", 0.25, 0.89, 35.0)]
    cells = [
        Cell("t", method, value + 0.002 * seed, metric=metric, budget=budget, seed=seed, family=method)
        for method, budget, value, _ in made
        for seed in (0, 1)
    ]
    cost = {(method, budget): cost for method, budget, _, cost in made}
    cells = [replace(cell, train_flops=cost[cell.method, cell.budget], final_flops=1.0) for cell in cells]
    return summary_rows(Results((*cells, *more)))


def test_the_front_is_what_nothing_beats() -> None:
    """Small at both budgets, Setpoint at the larger and dense are on the front; Setpoint at the smaller is beaten."""
    found = rows()
    train = next(each for each in expenses(found) if each.name == "train")
    line = pareto(found, train).data[0]
    assert line["x"] == [25.0, 50.0, 60.0, 100.0]
    assert line["y"] == pytest.approx([90.1, 93.1, 94.1, 95.1])
    lower = next(trace for trace in pareto(rows("loss"), train).data)
    assert lower["x"] == [25.0, 35.0]  # of losses the lowest is best


def test_each_method_has_a_mark_with_its_spread() -> None:
    """A trace for each method, full at the larger budget and open at the smaller; no two methods look alike."""
    found = rows()
    figure = pareto(found, expenses(found)[0])
    ours = next(trace for trace in figure.data if trace["name"] == "setpoint")
    assert ours["marker"]["symbol"] == ["circle", "circle-open"]
    assert ours["error_y"]["array"] == pytest.approx([100 * 0.002 / 2**0.5] * 2)
    assert sorted(trace["name"] for trace in figure.data[1:]) == ["dense", "setpoint", "small"]
    methods = ["dense", "small", "setpoint", *(f"m{place}" for place in range(48))]
    assert len(set(marks(methods).values())) == len(methods)


def test_a_method_has_one_colour_on_all_figures() -> None:
    """Marks of costs and curves of a training have the same colour, at all budgets; budgets differ by their dashes."""
    learned = (Point(1, 1.0, 1.0, "validation", 0.5, 0.9),)
    cells = [
        Cell(
            "t",
            method,
            0.9,
            budget=budget,
            seed=0,
            family=method,
            final_flops=budget,
            train_flops=budget,
            history=learned,
        )
        for method, budget in (
            ("dense", 1.0),
            *((name, b) for b in (0.5, 0.25) for name in ("small", "cubic", "setpoint")),
        )
    ]
    found, groups = summary_rows(Results(tuple(cells))), series(cells)
    of_marks = {trace["name"]: trace["marker"]["color"] for trace in pareto(found, expenses(found)[0]).data[1:]}
    figure = curves(groups, "accuracy", "flops")
    assert figure
    of_curves = {trace["name"]: trace["line"]["color"] for trace in figure.data}
    assert {label: of_marks[label.partition(" ")[0]] for label in of_curves} == of_curves
    assert len(set(of_marks.values())) == 4 and set(of_curves) == set(groups) - {"cubic 0.5", "cubic 0.25"}
    look = styles(list(groups))
    assert look["setpoint 0.5"].dash == look["cubic 0.5"].dash != look["setpoint 0.25"].dash == look["cubic 0.25"].dash


def test_a_look_does_not_depend_on_what_stands_beside() -> None:
    """Of any methods each keeps its look; a user's own take those that no method has, whatever labels are drawn."""
    every = marks(method.name for method in all_methods())
    for few in (["cubic"], ["dense", "cubic", "small-long"], ["setpoint", "rigl", "cubic"]):
        assert marks(few) == {name: every[name] for name in few}
    own = marks(["a", "cubic", "b"])
    assert own["cubic"] == every["cubic"] and own["a"] != own["b"] and not {own["a"], own["b"]} & set(every.values())
    assert styles(["b 0.5"], ["a", "cubic", "b"])["b 0.5"].color == own["b"][0]
    pictured = [every[name][0] for name in ("small-long", "filter-first", "cubic", "torch-pruning-norm", "setpoint")]
    assert len({*pictured, every["dense"][0]}) == 6  # in docs/pictures


def test_unknown_expenses_have_no_figure() -> None:
    """Without seconds and joules there is no figure against them; with a meter there is."""
    assert [each.name for each in expenses(rows())] == ["train", "final"]
    metered = [
        Cell("t", "small", 0.5, seed=seed, family="small", budget=b, energy_j=9.0) for seed, b in ((5, 0.5), (5, 0.25))
    ]
    assert [each.name for each in expenses(rows("accuracy", *metered))] == ["train", "final", "energy"]


def test_seconds_that_do_not_compare_have_no_figure() -> None:
    """Without one where the machine was busy with other work; with one where the methods took turns."""
    for clock, shown in (("interleaved", True), ("shared", False)):
        timed = [
            Cell("t", "cubic", 0.9, seed=seed, family="open-loop", budget=b, seconds=9.0, clock=clock)
            for seed, b in ((5, 0.5), (5, 0.25))
        ]
        assert ("time" in [each.name for each in expenses(rows("accuracy", *timed))]) == shown


def test_a_run_that_diverged_has_no_mark() -> None:
    """A metric that is not a number is on no figure, and keeps no other from being drawn."""
    lost = Cell("t", "rigl", float("nan"), family="sparse", budget=0.5, seed=0, train_flops=90.0)
    found = rows("accuracy", lost)
    figure = pareto(found, expenses(found)[0])
    assert "rigl" not in [trace["name"] for trace in figure.data]
    assert figure.data[0]["x"] == [25.0, 50.0, 60.0, 100.0]


def test_methods_at_a_budget_stand_best_first() -> None:
    """Those of the budget and dense have a line each; an interval needs three seeds; of losses the lowest is best."""
    more = [Cell("t", "cubic", 0.96 + 0.001 * seed, budget=0.5, seed=seed, family="open-loop") for seed in range(3)]
    masked = Cell("t", "rigl", float("nan"), budget=0.5, seed=0, family="sparse", theoretical_flops=0.5)
    half, quarter = (dots(rows("accuracy", *more, masked), budget) for budget in (0.5, 0.25))
    assert half is not None and quarter is not None
    assert half.layout["yaxis"]["ticktext"] == ["small", "<b>setpoint</b>", "<b>dense</b>", "cubic"]
    assert quarter.layout["yaxis"]["ticktext"] == ["<b>setpoint</b>", "small", "<b>dense</b>"]
    assert half.layout["xaxis"]["range"] == quarter.layout["xaxis"]["range"]
    bars = {trace["name"]: trace["error_x"]["array"][0] for trace in half.data}
    assert bars["cubic"] == pytest.approx(4.303 * 0.1 / 3**0.5, rel=1e-3) and bars["small"] == 0
    assert half.data[1]["marker"]["symbol"] == ["circle"] and quarter.data[1]["marker"]["symbol"] == ["circle-open"]
    losses = dots(rows("loss"), 0.25)
    assert losses is not None and losses.layout["yaxis"]["ticktext"][-1] == "<b>setpoint</b>"
    assert dots([row for row in rows("accuracy", masked) if row.method == "rigl"], 0.5) is None


def test_masked_models_cost_what_they_would_in_theory() -> None:
    """The FLOPs of a masked model are those in theory; without dense to compare with, those that it spends."""
    masked = Cell(
        "t", "rigl", 0.94, family="sparse", budget=0.5, seed=0, train_flops=100.0, theoretical_train_flops=55.0
    )
    found = rows("accuracy", masked)
    train = expenses(found)[0]
    assert next(trace for trace in pareto(found, train).data if trace["name"] == "rigl")["x"] == pytest.approx([55.0])
    assert 55.0 not in pareto(found, train).data[0]["x"]  # nobody spends that: it is not on the front
