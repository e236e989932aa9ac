"""Tests of the reference trajectory and of the times of decisions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from setpoint.controller.schedule import Schedule


def _steps(schedule: Schedule, total_steps: int) -> list[int]:
    return [step for step in range(1, total_steps + 50) if schedule.due(step, total_steps)]


def test_dense_before_limit_after() -> None:
    """The reference is exactly the dense cost until warm-up ends and exactly the limit from settle on."""
    schedule = Schedule(warmup=0.1, settle=0.4, land=0.8)
    values = [schedule.at(step, 100, start=7.0, limit=3.0) for step in range(1, 101)]
    assert values[:10] == [7.0] * 10
    assert values[39:] == [3.0] * 61
    assert all(3.0 < value < 7.0 for value in values[10:39])


def test_the_ramp_falls_evenly() -> None:
    """Between two decisions the geometric reference always falls by the same factor."""
    schedule = Schedule(warmup=0.0, settle=0.8, land=1.0, num_cuts=8)
    values = [schedule.at(step, 1000, start=1.0, limit=0.25) for step in (0, *_steps(schedule, 1000)[:8])]
    factors = [b / a for a, b in zip(values, values[1:], strict=False)]
    assert factors == pytest.approx([0.25 ** (1 / 8)] * 8)


def test_few_decisions_last_one_of_the_ramp_at_settle() -> None:
    """A long run makes num_cuts decisions up to settle, the last exactly there, and lands by 70 % if it can."""
    steps = _steps(Schedule(), 10_000)
    ramp = [step for step in steps if step <= 3000]
    assert len(ramp) == 8 and ramp[-1] == 3000 and ramp[0] > 500
    assert 7000 in steps
    assert len([step for step in steps if step > 7000]) == 3 and steps[-1] == 10_000
    gaps = {b - a for a, b in zip(ramp, ramp[1:], strict=False)}
    assert max(gaps) - min(gaps) <= 1


@given(st.integers(1, 3000), st.integers(1, 20), st.floats(0, 0.5), st.floats(0.01, 0.5))
def test_any_settings(total_steps: int, num_cuts: int, warmup: float, ramp: float) -> None:
    """For any settings the reference never rises, and at least one decision comes at or after settle."""
    schedule = Schedule(warmup=warmup, settle=warmup + ramp, land=1.0, num_cuts=num_cuts)
    steps = _steps(schedule, total_steps)
    values = [schedule.at(step, total_steps, start=5.0, limit=1.0) for step in steps]
    assert values == sorted(values, reverse=True)
    assert values[-1] == 1.0
