"""Stopwatch and step meter."""

import time

import pytest

from setpoint.spending.meter import StepMeter, Stopwatch


class Clock:
    """A clock that the test turns."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(time, "perf_counter", made)
    return made


def test_stopwatch_adds_up_its_blocks(clock: Clock) -> None:
    """Only the time inside blocks counts, also of a block that raised."""
    watch = Stopwatch()
    with watch:
        clock.now += 2
    clock.now += 50
    with pytest.raises(RuntimeError), watch:
        clock.now += 3
        raise RuntimeError
    assert (watch.seconds, watch.last_seconds) == (5, 3)


def test_seconds_per_step_is_the_median(clock: Clock) -> None:
    """One long interval, such as an evaluation, does not move the reading."""
    meter = StepMeter()
    assert meter.seconds_per_step is None
    for seconds in (1, 2, 3, 500, 2):
        meter.begin()
        clock.now += seconds
        meter.end()
    assert meter.seconds_per_step == 2


def test_old_steps_are_forgotten(clock: Clock) -> None:
    """Only the last 50 steps count, and none after `clear`."""
    meter = StepMeter()
    for seconds in (*[9] * 50, *[1] * 50):
        meter.begin()
        clock.now += seconds
        meter.end()
    assert meter.seconds_per_step == 1
    meter.clear()
    assert meter.seconds_per_step is None


def test_laps_follow_each_other_without_a_gap(clock: Clock) -> None:
    """All laps and the rest of the block add up to the block; what is so far holds the present one."""
    watch = Stopwatch()
    with watch:
        for seconds in (2, 4):
            clock.now += seconds
            watch.lap()
        clock.now += 1
        assert watch.seconds == 6 and watch.seconds_so_far == 7
    assert watch.seconds == watch.seconds_so_far == 7 and watch.last_seconds == 1
