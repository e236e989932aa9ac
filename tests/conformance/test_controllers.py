"""Conformance of controllers: every controller, on every plant, keeps the contract of the protocol."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest

from controller.plants import Decision, chain, lognormal, observe, residual, run, unit_group
from setpoint.controller.even import EvenController
from setpoint.controller.plan import Controller
from setpoint.controller.priced import PricedController
from setpoint.controller.schedule import Schedule
from setpoint.cost.cost import Cost, ProductCost, Term
from setpoint.gates.gated import GatedController
from setpoint.groups.group import Group, Size, widths_of
from setpoint.sensor.reading import Reading
from setpoint.weights.controller import DropAndGrowController
from setpoint_bench.scheduled import ScheduledController

Plant = tuple[tuple[Group, ...], Cost]


def _parameters() -> Plant:
    """Parameters of two layers with biases: a cost with constant terms."""
    groups = (unit_group("a", 24, multiple_of=8), unit_group("b", 40, multiple_of=8))
    a, b = (Size(0, ((group.name, 1),)) for group in groups)
    terms = (Term(9.0, (Size(3), a)), Term(9.0, (a, b)), Term(3.0, (a,)), Term(3.0, (b,)), Term(1.0, (b, Size(10))))
    return groups, ProductCost("flops", (*terms, Term(50.0, ())))


def _concatenation() -> Plant:
    """Two branches joined by concatenation, each entry of the first counting twice."""
    groups = (unit_group("left", 16), unit_group("right", 30))
    joined = Size(1, (("left", 2), ("right", 1)))
    left, right = (Size(0, ((group.name, 1),)) for group in groups)
    terms = (Term(5.0, (Size(8), left)), Term(5.0, (Size(8), right)), Term(4.0, (joined, Size(20))))
    return groups, ProductCost("flops", terms)


def _transformer() -> Plant:
    """Layers of few heads and many neurons on a stream that stays."""
    groups: list[Group] = []
    terms: list[Term] = []
    for i in range(4):
        groups += [unit_group(f"heads{i}", 8), unit_group(f"neurons{i}", 256, multiple_of=8)]
        terms += [Term(4 * 64.0 * 16, (Size(0, ((f"heads{i}", 1),)),)), Term(128.0, (Size(0, ((f"neurons{i}", 1),)),))]
    return tuple(groups), ProductCost("flops", tuple(terms))


CONTROLLERS: dict[str, Controller[Any]] = {
    "priced": PricedController(),
    "priced, uniform": PricedController(allocation="uniform"),
    "priced, four cuts": PricedController(schedule=Schedule(num_cuts=4)),
    "scheduled": ScheduledController(),
    "one-shot": ScheduledController(begin=0.0, end=0.0, num_cuts=1),
    "priced, unguarded": PricedController(slew=1.0, min_density=0.0, dwell=0, hysteresis=0.0, deadband=0.0),
    "priced, regrowing": PricedController(regrow=True),
    "exchanging": DropAndGrowController(PricedController(schedule=Schedule(num_cuts=3))),
    "even": EvenController(PricedController()),
    "even, uniform": EvenController(PricedController(allocation="uniform")),
    "gated": GatedController(),
    "gated, regrowing": GatedController(PricedController(regrow=True), steps=2),
}
PLANTS: dict[str, Callable[[], Plant]] = {
    "one group": lambda: chain(50),
    "chain": lambda: chain(20, 40, 30),
    "chain in blocks": lambda: chain(32, 64, 48, multiple_of=8),
    "odd widths in blocks": lambda: chain(21, 35, 50, multiple_of=8),
    "residual stream": lambda: residual(32, (32, 64), multiple_of=4),
    "single units": lambda: chain(1, 20, 1),
    "parameters": _parameters,
    "concatenation": _concatenation,
    "transformer": _transformer,
}
SALIENCIES = {
    "lognormal": lognormal,
    "ties": lambda groups: {group.name: np.floor(np.arange(group.num_units) / 3.0) for group in groups},
    "zero": lambda groups: {group.name: np.zeros(group.num_units) for group in groups},
    "tiny and huge": lambda groups: {
        group.name: np.logspace(-30, 30, group.num_units) * (1 + i) for i, group in enumerate(groups)
    },
}

controllers = pytest.mark.parametrize("controller", CONTROLLERS.values(), ids=CONTROLLERS.keys())
plants = pytest.mark.parametrize("plant", PLANTS.values(), ids=PLANTS.keys())


def _run(
    controller: Controller[Any], plant: Callable[[], Plant], saliency: str = "lognormal", **settings: Any
) -> tuple[list[Decision], Plant]:
    groups, cost = plant()
    values = SALIENCIES[saliency](groups)  # type: ignore[operator]
    return run(controller, groups, cost, values, **{"fraction": 0.6, "total_steps": 200, **settings}), (groups, cost)


_once = cache(_run)
"""Decisions are values, so tests that read the same run share it."""


@controllers
@plants
@pytest.mark.parametrize("saliency", SALIENCIES)
def test_lands_within_the_budget(controller: Controller[Any], plant: Callable[[], Plant], saliency: str) -> None:
    """A run lands by 70 %, never over the limit, never below min_units, at multiples; met means within the limit."""
    decisions, (groups, cost) = _once(controller, plant, saliency)
    limit = 0.6 * cost.total(widths_of(groups))
    last = decisions[-1]
    assert last.plan.budget_met and last.predicted <= limit and last.step <= 140
    for decision in decisions:
        comes_back = controller.conduct.regrow or isinstance(controller, DropAndGrowController)
        may_grow = comes_back and decision.step < 140
        assert decision.plan.budget_met == (decision.predicted <= limit and not may_grow)
        for group in decision.groups:
            assert group.num_units >= group.min_units
            untouched = group.num_units == decision.before[group.name]
            assert untouched or group.num_units % group.multiple_of == 0


@controllers
@plants
def test_plan_fits_the_groups(controller: Controller[Any], plant: Callable[[], Plant]) -> None:
    """Keep and worth have a value per active unit, prices and references are finite, and there is always a reason."""
    decisions, (_, cost) = _once(controller, plant, "lognormal")
    for decision in decisions:
        plan = decision.plan
        assert plan.step == decision.step and plan.reason
        for name, width in decision.before.items():
            assert plan.keep[name].shape == (width,) and plan.keep[name].dtype == np.bool_
            if name in plan.worth:
                assert plan.worth[name].shape == (width,)
                assert np.isfinite(plan.worth[name][~plan.keep[name]]).all()
        assert np.isfinite(plan.price[cost.resource]) and plan.price[cost.resource] >= 0
        assert np.isfinite(plan.reference[cost.resource])


@controllers
@plants
def test_decide_is_pure(controller: Controller[Any], plant: Callable[[], Plant]) -> None:
    """Deciding twice from the same state gives the same plan and the same next decision."""
    first, _ = _once(controller, plant, "lognormal")
    second, _ = _run(controller, plant)
    assert len(first) == len(second)
    for one, two in zip(first, second, strict=True):
        assert one.plan.reason == two.plan.reason and one.plan.price == two.plan.price
        assert all(np.array_equal(one.plan.keep[name], two.plan.keep[name]) for name in one.plan.keep)
    groups, cost = plant()
    state, reading = controller.init(groups), Reading(1, lognormal(groups), 1)
    seen = observe(groups, cost, limit=0.5, dense=1.0, reading=reading)
    plans = [controller.decide(state, seen, cost, groups)[1] for _ in range(2)]
    assert all(np.array_equal(plans[0].keep[name], plans[1].keep[name]) for name in plans[0].keep)


@controllers
@plants
@pytest.mark.parametrize("bad", ["none", "nan", "inf"])
def test_bad_reading_makes_no_decision(controller: Controller[Any], plant: Callable[[], Plant], bad: str) -> None:
    """Without a reading, or with one that is not finite, every unit stays and the plan has not met its budget."""
    groups, cost = plant()
    saliency = lognormal(groups)
    saliency[groups[0].name][-1] = float("nan" if bad == "none" else bad)
    reading = None if bad == "none" else Reading(1, saliency, 1)
    dense = cost.total(widths_of(groups))
    seen = observe(groups, cost, limit=0.5 * dense, dense=dense, reading=reading)
    _, plan = controller.decide(controller.init(groups), seen, cost, groups)
    assert plan.empty() and not plan.budget_met and plan.reason


@controllers
@plants
def test_full_budget_drops_nothing(controller: Controller[Any], plant: Callable[[], Plant]) -> None:
    """A budget of the dense cost drops nothing and has met its budget."""
    decisions, _ = _run(controller, plant, fraction=1.0)
    assert all(decision.plan.empty() for decision in decisions) and decisions[-1].plan.budget_met


@controllers
@plants
def test_uncalibrated_readings_only_rank_within_groups(controller: Controller[Any], plant: Callable[[], Plant]) -> None:
    """With an uncalibrated reading, the scale of a group's saliencies is no matter."""
    groups, cost = plant()
    saliency = lognormal(groups)
    scaled = {name: values * 10.0 ** (3 * i) for i, (name, values) in enumerate(saliency.items())}
    ends = [
        run(controller, groups, cost, values, fraction=0.6, total_steps=200, calibrated=False)[-1]
        for values in (saliency, scaled)
    ]
    assert widths_of(ends[0].groups) == widths_of(ends[1].groups)
    for group in groups:
        assert np.array_equal(ends[0].plan.keep[group.name], ends[1].plan.keep[group.name])


@controllers
@pytest.mark.parametrize("total_steps", [*range(1, 21), 137, 10_000])
def test_due_within_the_run(controller: Controller[Any], total_steps: int) -> None:
    """Decisions fall within the run, there is at least one, and a long run has few of them."""
    due = [step for step in range(-2, total_steps + 20) if controller.due(step, total_steps)]
    assert due and due[0] >= 1 and due[-1] <= total_steps
    assert len(due) <= 30


@controllers
def test_is_a_controller(controller: Controller[Any]) -> None:
    """It has the methods of the protocol, and its settings are a value: a copy is equal and hashes alike."""
    assert isinstance(controller, Controller)
    copy = dataclasses.replace(controller)  # type: ignore[type-var]
    assert copy == controller and hash(copy) == hash(controller)


@controllers
@plants
def test_lands_in_any_short_run(controller: Controller[Any], plant: Callable[[], Plant]) -> None:
    """However few the steps, the last decision is within the limit."""
    groups, cost = plant()
    for total_steps in (1, 2, 3, 7):
        decisions, _ = _run(controller, plant, total_steps=total_steps)
        assert decisions[-1].plan.budget_met
        assert cost.total(widths_of(decisions[-1].groups)) <= 0.6 * cost.total(widths_of(groups))
