"""Tests of the penalty controller: what earns less than the price goes, and nothing else."""

from __future__ import annotations

import math

import numpy as np
import pytest

from controller.plants import chain, lognormal, observe
from setpoint.controller.penalty import PenaltyController
from setpoint.controller.plan import Plan
from setpoint.cost.budget import Price
from setpoint.cost.cost import Cost
from setpoint.groups.group import Group, widths_of
from setpoint.sensor.reading import Reading

STEPS = 1000
SETTLED = 300


def decide(
    rate: float,
    groups: tuple[Group, ...],
    cost: Cost,
    saliency: dict[str, np.ndarray],
    *,
    step: int = SETTLED,
    slew: float = 0.5,
    calibrated: bool = True,
) -> Plan:
    """One decision on a plant, at full price by default."""
    controller = PenaltyController(Price(rate, of="flops"), slew=slew)
    reading = Reading(step, saliency, 1, calibrated)
    dense = cost.total(widths_of(groups))
    seen = observe(groups, cost, limit=math.inf, dense=dense, reading=reading, step=step, total_steps=STEPS)
    return controller.decide(controller.init(groups), seen, cost, groups)[1]


def kept(plan: Plan) -> dict[str, int]:
    """Widths after a plan."""
    return {name: int(keep.sum()) for name, keep in plan.keep.items()}


def test_at_the_end_no_block_costs_more_than_it_earns() -> None:
    """After a decision without slew limit every block left earns the price less hysteresis, no dropped one does."""
    groups, cost = chain(32, 48, 64)
    saliency = lognormal(groups, spread=2.0)
    plan = decide(20.0, groups, cost, saliency, slew=1.0)
    widths = kept(plan)
    bound = plan.price["flops"] * 0.9
    for group in groups:
        keep = plan.keep[group.name]
        assert widths[group.name] >= 1
        if widths[group.name] > 1:
            least = float(saliency[group.name][keep].min())
            assert least / cost.saving(widths, group.name, 1) >= bound
        dropped = plan.worth[group.name][~keep]
        assert (dropped < bound).all()


def test_a_higher_rate_never_keeps_more() -> None:
    """On one reading the kept units shrink as a nested sequence when the rate grows: monotone, no unit comes back."""
    groups, cost = chain(32, 48, 64)
    saliency = lognormal(groups, spread=2.0)
    before = {group.name: np.ones(group.num_units, dtype=bool) for group in groups}
    costs = []
    assert decide(0.0, groups, cost, {name: np.zeros(len(values)) for name, values in saliency.items()}).empty()
    for rate in np.geomspace(0.1, 1e4, 40):
        plan = decide(float(rate), groups, cost, saliency, slew=1.0)
        for name, keep in plan.keep.items():
            assert not (keep & ~before[name]).any()
        before = dict(plan.keep)
        costs.append(cost.total(kept(plan)))
    assert costs == sorted(costs, reverse=True) and len(set(costs)) > 20


def test_the_price_ramps_up() -> None:
    """The price is 0 until warm-up ends, rises in proportion to time, and is the full rate from settle on."""
    groups, cost = chain(8, 8)
    saliency = lognormal(groups)
    dense = cost.total(widths_of(groups))
    prices = [decide(2.0, groups, cost, saliency, step=step).price["flops"] for step in (50, 175, 300, 600)]
    assert prices == pytest.approx([0.0, 1.0 / dense, 2.0 / dense, 2.0 / dense])


def test_it_lands_when_there_is_nothing_left_to_drop() -> None:
    """From settle on a decision without a drop lands; one with a drop does not before the landing is due."""
    groups, cost = chain(32, 48)
    low = {group.name: np.full(group.num_units, 1e-9) for group in groups}
    assert not decide(1.0, groups, cost, low).budget_met
    assert decide(1.0, groups, cost, low, step=700).budget_met
    high = {group.name: np.full(group.num_units, 1e9) for group in groups}
    assert decide(1.0, groups, cost, high).budget_met
    assert not decide(1.0, groups, cost, high, step=175).budget_met


def test_an_uncalibrated_reading_decides_nothing() -> None:
    """Saliencies that are no losses cannot be set against a price, and the reason says so."""
    groups, cost = chain(8, 8)
    plan = decide(1e9, groups, cost, lognormal(groups), calibrated=False)
    assert plan.empty() and "units of the loss" in plan.reason
