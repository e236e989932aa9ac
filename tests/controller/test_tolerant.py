"""Tests of the tolerant controller on plants whose loss follows from their widths."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from controller.plants import after, chain, lognormal, observe
from setpoint.controller.plan import Plan
from setpoint.controller.tolerant import TolerantController
from setpoint.controller.trend import Excess
from setpoint.cost.budget import Tolerance
from setpoint.errors import LoopError
from setpoint.groups.group import widths_of
from setpoint.sensor.reading import Reading


def run(
    tolerance: float, *, error: float = 0.0, total_steps: int = 1000, per_unit: float = 1e-3
) -> tuple[list[Plan], float]:
    """A run whose loss rises by `per_unit` for each unit that is gone; its plans, and the rise at the end."""
    groups, cost = chain(64, 64)
    controller = TolerantController(Tolerance(loss=tolerance))
    state, saliency = controller.init(groups), lognormal(groups)
    dense, plans, before, last = cost.total(widths_of(groups)), [], None, {}
    num_units = sum(group.num_units for group in groups)
    for step in range(1, total_steps + 1):
        if not controller.due(step, total_steps):
            continue
        rise = per_unit * ((num_units if before is None else before[1]) - sum(g.num_units for g in groups))
        reading = Reading(step, saliency, num_samples=64, calibrated=True)
        seen = observe(groups, cost, limit=dense, dense=dense, reading=reading, step=step, total_steps=total_steps)
        excess = Excess(rise, error, 2.0, 2.0) if before is not None else None
        seen = replace(seen, loss=1.0 + rise, excess=excess, last_dropped=last)
        state, plan = controller.decide(state, seen, cost, groups)
        plans.append(plan)
        if plan.drops():
            before = (groups, sum(g.num_units for g in groups), saliency)
            last = {name: np.flatnonzero(~keep) for name, keep in plan.keep.items() if not keep.all()}
            saliency = {name: values[plan.keep[name]] for name, values in saliency.items()}
            groups = after(groups, plan)
        elif plan.grows():
            assert before is not None
            assert {name: units.tolist() for name, units in plan.grow.items()} == {
                n: u.tolist() for n, u in last.items()
            }
            groups, saliency, before = before[0], before[2], None
        if plan.budget_met:
            break
    return plans, per_unit * (num_units - sum(g.num_units for g in groups))


@pytest.mark.parametrize("tolerance", [0.01, 0.03, 0.06])
def test_the_rise_ends_within_the_tolerance_and_near_it(tolerance: float) -> None:
    """Cuts go on while the tolerance lasts; the one that breaks it comes back, and strides halve."""
    plans, rise = run(tolerance)
    assert plans[-1].budget_met
    assert 0.5 * tolerance <= rise <= tolerance
    assert any(plan.grows() for plan in plans) or rise > 0.8 * tolerance


def test_no_tolerance_means_no_cut_stays() -> None:
    """With a tolerance of 0 every cut that costs anything is taken back."""
    plans, rise = run(0.0)
    assert plans[-1].budget_met
    assert rise == 0.0
    assert sum(plan.drops() for plan in plans) == sum(plan.grows() for plan in plans) > 0


def test_what_cannot_be_told_is_watched_on() -> None:
    """With an error above the tolerance no second cut is made before the landing decides on the first."""
    plans, _ = run(0.02, error=1.0)
    assert sum(plan.drops() for plan in plans) == 1
    assert sum("watching the last cut on" in plan.reason for plan in plans) >= 5


def test_a_cut_that_nothing_is_known_about_comes_back_at_the_landing() -> None:
    """Without an excess the controller waits, and gives the benefit of the doubt to the loss."""
    groups, cost = chain(64, 64)
    controller = TolerantController(Tolerance(loss=1.0))
    state = replace(controller.init(groups), pending=True)
    reading = Reading(700, lognormal(groups), num_samples=64, calibrated=True)
    seen = observe(groups, cost, limit=1.0, dense=1.0, reading=reading, step=700, total_steps=1000)
    last = {"layer0": np.array([3, 5])}
    _, plan = controller.decide(state, replace(seen, loss=1.0, last_dropped=last), cost, groups)
    assert plan.budget_met
    assert plan.grow == last
    assert "too few losses" in plan.reason


def test_without_a_loss_nothing_is_decided() -> None:
    """A run that never tells its loss is stopped with words that say what to call."""
    groups, cost = chain(64, 64)
    controller = TolerantController(Tolerance(loss=1.0))
    seen = observe(groups, cost, limit=1.0, dense=1.0, reading=None, step=700, total_steps=1000)
    with pytest.raises(LoopError, match="call loop.observe"):
        controller.decide(controller.init(groups), seen, cost, groups)
