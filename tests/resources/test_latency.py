"""Latency from timed operations: curves, tables and fits, on times in closed form and on this machine."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from setpoint.controller.ladder import lowest_width
from setpoint.cost.cost import Cost
from setpoint.errors import CostError
from setpoint.groups.group import Group, Size, widths_of
from setpoint.groups.trace import trace
from setpoint.resources import costing
from setpoint.resources import table as table_file
from setpoint.resources.curve import Curve, points
from setpoint.resources.energy import EnergyCost, fit_energy
from setpoint.resources.latency import Fit, LatencyCost, fit_steps
from setpoint.resources.lengths import trial_widths
from setpoint.resources.problem import Problem, on_one_dim, pose
from setpoint.resources.replica import replica
from setpoint.resources.table import Table
from setpoint.resources.tape import Operand, Operation, Tape, record

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def step() -> tuple[tuple[Group, ...], Tape]:
    """The recorded step of two hidden layers, one wide in few blocks and one in many."""
    model = nn.Sequential(nn.Linear(16, 256), nn.ReLU(), nn.Linear(256, 384), nn.ReLU(), nn.Linear(384, 4))
    optimizer = torch.optim.AdamW(model.parameters())
    example = (torch.randn(32, 16),)
    groups = trace(model, example).groups
    make = lambda widths: replica(model, (optimizer,), example, groups, widths, data=False)  # noqa: E731
    return groups, record(make, trial_widths(groups))


def law(problem: Problem, values: tuple[int, ...]) -> float:
    """Times in closed form: a staircase of 16 in every length of a product, bytes for the rest."""
    if problem.contraction:
        return 1e-7 + 1e-9 * float(np.prod([-(-value // 16) * 16 for value in values]))
    return 1e-7 + 1e-11 * problem.num_bytes(values)


@pytest.fixture
def by_law(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Operations that take as long as the law says; yields the keys that were timed."""
    timed: list[str] = []

    def seconds(problem: Problem, point: tuple[int, ...], device: torch.device) -> float:
        timed.append(problem.key)
        return law(problem, point)

    monkeypatch.setattr(table_file, "_seconds", seconds)
    yield timed


def test_curves_follow_stairs_and_products(step: tuple[tuple[Group, ...], Tape]) -> None:
    """At reachable lengths a curve is within 2 % of a law with stairs of 16, give or take 0.2 % of the dense time."""
    groups, tape = step
    by_name = {group.name: group for group in groups}
    worst = 0.0
    for operation in tape.operations:
        problem = pose(operation, by_name)
        curve = Curve(problem, {point: law(problem, point) for point in points(problem, coarse=False)})
        generator = np.random.default_rng(0)
        for _ in range(30):
            values = tuple(int(generator.choice(axis.values)) for axis in problem.axes)
            off = abs(curve.at(values) - law(problem, values))
            worst = max(worst, off / (0.02 * law(problem, values) + 0.002 * law(problem, problem.dense)))
    assert worst < 1.0


def test_total_is_the_sum_of_the_operations(step: tuple[tuple[Group, ...], Tape], by_law: list[str]) -> None:
    """Without a fit the cost is the sum of the operations' times; a saving is a difference; it is a `Cost`."""
    groups, tape = step
    cost = LatencyCost(tape, groups, Table(CPU))
    assert isinstance(cost, Cost) and cost.resource == "latency" and not cost.untimed
    by_name = {group.name: group for group in groups}
    for widths in (widths_of(groups), {group.name: group.num_units // 32 * 16 for group in groups}):
        expected = 0.0
        for operation in tape.operations:
            problem = pose(operation, by_name)
            expected += law(problem, tuple(axis.size.at(widths) for axis in problem.axes))
        assert cost.total(widths) == pytest.approx(expected, rel=0.02)
    dense = widths_of(groups)
    for group in groups:
        fewer = {**dense, group.name: group.num_units - 32}
        assert cost.saving(dense, group.name, 32) == pytest.approx(cost.total(dense) - cost.total(fewer))


def test_pointwise_operations_share_a_curve(step: tuple[tuple[Group, ...], Tape], by_law: list[str]) -> None:
    """The optimizer's operations are timed once each, not once for each shape, and follow their entries."""
    groups, tape = step
    by_name = {group.name: group for group in groups}
    problems = [pose(operation, by_name) for operation in tape.operations]
    steps = [problem for problem in problems if problem.operation.name == "addcdiv_"]
    assert len({problem.key for problem in steps}) > 3  # weights and biases of several shapes
    curves = Table(CPU).time(problems)
    assert len({key for key in by_law if key.startswith("addcdiv_")}) == 1
    for problem in steps:
        curve = curves[problem.key]
        assert curve is not None
        for values in (problem.dense, tuple(axis.values[-1] for axis in problem.axes)):
            assert curve.at(values) == pytest.approx(law(problem, values), rel=0.05, abs=5e-8)


def test_a_broadcast_operand_keeps_an_operation_apart() -> None:
    """A product with one factor per row has a curve of its own: its time does not follow from the entries alone."""
    group, width = Group("a", "unit", 64, ()), Size(0, (("a", 1),))

    def problem(rows: int) -> Problem:
        whole, other = (Operand((Size(n), width), (0, 1), (), torch.float32) for n in (32, rows))
        spec = tree_flatten(((whole, other), {}))[1]
        return pose(Operation(torch.ops.aten.mul.Tensor, (whole, other), spec, (whole,)), {"a": group})

    assert on_one_dim(problem(32)) is not None
    assert on_one_dim(problem(1)) is None


def test_whole_steps_are_timed_at_ever_narrower_widths() -> None:
    """Each width vector is within blocks, nowhere wider than the one before, the first dense and the last the least."""
    groups = (
        Group("a", "unit", 100, (), min_units=5, multiple_of=8),
        Group("b", "unit", 12, ()),
        Group("c", "unit", 1, ()),
    )
    found = costing._narrowing(groups)
    assert found[0] == widths_of(groups)
    assert found[-1] == {group.name: lowest_width(group) for group in groups} == {"a": 8, "b": 1, "c": 1}
    for wider, narrower in pairwise(found):
        assert all(narrower[name] <= wider[name] for name in wider) and narrower["a"] % 8 == 0


@pytest.mark.parametrize(("seconds", "steps"), [((3.0, 2.0), 1), ((0.25, 0.125), 5)])
def test_a_slow_step_is_timed_once(seconds: tuple[float, float], steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step at a shape takes longer, and is left out where steps are quick; where they are slow it is all."""
    made = list[float]()

    class Slow:
        def step(self) -> None:
            made.append(seconds[bool(made)])

        def held(self) -> list[torch.Tensor]:
            return []

    monkeypatch.setattr(time, "perf_counter", lambda: sum(made))
    assert costing._step(Slow(), CPU, None) == (pytest.approx(seconds[steps > 1]), None)
    assert len(made) == steps


def test_types_of_numbers_are_other_problems() -> None:
    """A product in bfloat16 is not answered from timings in float32."""
    group = Group("a", "unit", 32, ())
    keys = set()
    for dtype in (torch.float32, torch.bfloat16):

        class Product:
            def __init__(self, width: int, dtype: torch.dtype) -> None:
                self.left, self.right = torch.ones(8, width, dtype=dtype), torch.ones(width, 4, dtype=dtype)

            def step(self) -> None:
                self.left @ self.right

            def held(self) -> list[torch.Tensor]:
                return [self.left, self.right]

        from contextlib import nullcontext

        tape = record(lambda w, dtype=dtype: nullcontext(Product(w["a"], dtype)), trial_widths((group,)))  # type: ignore[misc]
        keys |= {pose(operation, {"a": group}).key for operation in tape.operations}
    assert len(keys) == 2


def test_fit_finds_factors_and_constant(step: tuple[tuple[Group, ...], Tape], by_law: list[str]) -> None:
    """Steps made as `1.5 contractions + 2 others + 1 ms` give these coefficients back, and an error of zero."""
    groups, tape = step
    cost = LatencyCost(tape, groups, Table(CPU))
    generator = np.random.default_rng(0)
    steps = []
    for _ in range(7):
        widths = {group.name: int(generator.choice(range(16, group.num_units + 1, 8))) for group in groups}
        a, b = cost.parts(widths)
        steps.append((widths, 1.5 * a + 2.0 * b + 1e-3))
    fit = fit_steps(cost, steps)
    assert (fit.contractions, fit.others, fit.constant_s) == pytest.approx((1.5, 2.0, 1e-3), rel=1e-3)
    assert fit.error < 1e-6
    assert cost.fitted(fit).total(steps[0][0]) == pytest.approx(steps[0][1])
    assert (cost.fit.contractions, cost.fit.constant_s) == (Fit().contractions, 0.0)


def test_operations_run_alone_on_this_machine(step: tuple[tuple[Group, ...], Tape]) -> None:
    """Every operation of a real step can be timed alone, and narrow models are predicted to be quicker."""
    groups, tape = step
    cost = LatencyCost(tape, groups, Table(CPU))
    assert not cost.untimed
    narrow = {group.name: group.min_units for group in groups}
    assert 0 < cost.total(narrow) < cost.total(widths_of(groups))


def test_energy_is_power_times_time(step: tuple[tuple[Group, ...], Tape], by_law: list[str]) -> None:
    """A stated power gives joules labelled as modelled; metered steps give power and constant back."""
    groups, tape = step
    latency = LatencyCost(tape, groups, Table(CPU))
    dense = widths_of(groups)
    stated = EnergyCost(latency, 20.0)
    assert stated.total(dense) == pytest.approx(20.0 * latency.total(dense)) and stated.source.startswith("modelled")
    assert isinstance(stated, Cost) and stated.resource == "energy"
    assert stated.saving(dense, groups[0].name, 32) == pytest.approx(20.0 * latency.saving(dense, groups[0].name, 32))
    vectors = [{group.name: units for group in groups} for units in (32, 64, 128, 256)]
    steps: list[tuple[Any, float]] = [(w, 35.0 * latency.total(w) + 1e-5) for w in vectors]
    fitted = fit_energy(latency, steps, "recorded")
    assert (fitted.watts, fitted.constant_j) == pytest.approx((35.0, 1e-5), rel=1e-6)
    assert fitted.source == "modelled: fit to steps metered by recorded"
    for watts in (0.0, -1.0, float("nan")):
        with pytest.raises(CostError, match="above 0"):
            EnergyCost(latency, watts)
    with pytest.raises(CostError, match="above 0"):
        fit_energy(latency, [(dense, -1.0)], "recorded")
