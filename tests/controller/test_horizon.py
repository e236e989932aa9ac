"""Tests of the horizon: a run that is held to the limit it gives spends exactly what is left."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from setpoint.controller.horizon import cheapest_run, highest_step, step_limit
from setpoint.controller.schedule import Schedule


def run(budget: float, total_steps: int, schedule: Schedule, *, drift: float = 1.0, block: float = 0.0) -> float:
    """What a run spends whose cuts end `block` below the target; from the middle on a step costs `drift` times more."""
    spent, cost = 0.0, 1.0
    for step in range(1, total_steps + 1):
        factor = drift if step > total_steps // 2 else 1.0
        spent += cost * factor
        if schedule.due(step, total_steps) and step < total_steps:
            limit = step_limit(schedule, step, total_steps, left=(budget - spent) / factor, start=1.0, present=cost)
            target = schedule.at(step, total_steps, start=1.0, limit=limit)
            cost = min(cost, max(0.01, target - block))
    return spent


@given(st.floats(0.2, 0.95), st.integers(40, 3000), st.integers(2, 16))
@settings(deadline=None)
def test_a_plant_that_obeys_spends_the_budget(budget: float, total_steps: int, num_cuts: int) -> None:
    """Where cuts reach their target exactly, the run's sum equals the budget."""
    spent = run(budget * total_steps, total_steps, Schedule(num_cuts=num_cuts))
    assert spent == pytest.approx(budget * total_steps, rel=1e-6)


@pytest.mark.parametrize("drift", [0.8, 1.0, 1.1])
def test_replanning_takes_in_what_came_out_otherwise(drift: float) -> None:
    """Steps that turn dearer or cheaper in the middle are made up for by the decisions that follow, within 1 %."""
    schedule = Schedule(settle=0.6, land=0.95, num_cuts=24)
    spent = run(600.0, 1000, schedule, drift=drift)
    assert spent == pytest.approx(600.0, rel=0.01) or (drift < 1 and spent < 600.0)
    assert spent <= 600.0 * (1 + 1e-9)


def test_what_blocks_leave_is_spent_later() -> None:
    """Cuts that fall short of the target by a block raise the limit of the next: the sum is nearer than each cut."""
    schedule = Schedule(num_cuts=8)
    spent = run(600.0, 1000, schedule, block=0.02)
    assert 600.0 * 0.96 < spent <= 600.0


@given(st.integers(30, 3000), st.integers(1, 16), st.floats(0.01, 0.9), st.floats(1.0, 1.2), st.data())
@settings(deadline=None, max_examples=50)
def test_a_run_that_keeps_to_the_most_is_never_over(
    total_steps: int, num_cuts: int, cheapest: float, room: float, data: st.DataObject
) -> None:
    """From the least on: whatever decisions do within the most, there is always a next one, and the sum is met."""
    schedule = Schedule(num_cuts=num_cuts)
    budget = room * cheapest_run(schedule, 0, total_steps, present=1.0, cheapest=cheapest)
    spent, cost = 0.0, 1.0
    for step in range(1, total_steps + 1):
        spent += cost
        if schedule.due(step, total_steps) and step < total_steps:
            most = highest_step(schedule, step, total_steps, left=budget - spent, cheapest=cheapest)
            assert most >= cheapest * (1 - 1e-9)
            lowest, highest = min(cheapest, most), min(cost, most)
            cost = lowest + data.draw(st.sampled_from([0.0, 0.5, 1.0])) * (max(highest, lowest) - lowest)
    assert spent <= budget * (1 + 1e-9)
