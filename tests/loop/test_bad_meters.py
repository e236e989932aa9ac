"""Clocks, counters and tables that are not what they should be: an error or one warning, and no wrong number."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable

import pytest
import torch

import setpoint
from loop.test_budgets import Machine, machine, metered, mlp, train
from setpoint.resources.joules import Counter, EnergyMeter
from setpoint.resources.metering import Metering

__all__ = ["machine"]

Budget = setpoint.Budget
DENSE = {"a": 256, "b": 256}


def told(run: Callable[[], setpoint.Loop]) -> tuple[setpoint.Loop, list[str]]:
    """What a run warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loop = run()
    return loop, [str(each.message) for each in caught]


def test_a_clock_that_jumps(machine: Machine) -> None:
    """A jump ahead is outvoted: the budget is met by the steps as they are."""

    def live(loop: setpoint.Loop) -> None:
        machine.live(loop)
        if loop.step in (15, 40):
            machine.now += 5000.0

    loop, words = told(lambda: train(mlp(), Budget.fraction(0.6, of="latency"), 60, live))
    assert not words
    assert loop.summary is not None and loop.summary.budget_met
    dense = machine.factor * machine.step_s(DENSE)
    assert loop.summary.limit["latency"] == pytest.approx(0.6 * dense)
    assert 0.5 * dense < machine.factor * machine.step_s(loop.widths) <= 1.03 * 0.6 * dense


def test_counters_are_looked_at_between_decisions(monkeypatch: pytest.MonkeyPatch) -> None:
    """However far apart decisions are, a counter that wraps every minute loses no turn."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    counter = Counter("recorded", lambda: (100.0 * clock[0]) % 6000.0, range_j=6000.0)
    meter = EnergyMeter([counter])
    metering = Metering({"energy"}, list, torch.device("cpu"), model=torch.nn.Identity(), energy=meter)
    metering.stepped()
    for _ in range(3600):
        clock[0] += 1.0
        metering.stepped()
    assert metering.read().values["energy"] == pytest.approx(100.0)
    assert metering.read().run_j == pytest.approx(360_000.0)


@pytest.mark.parametrize("bad", [-1.0, float("nan")])
def test_a_counter_that_reads_nonsense(machine: Machine, monkeypatch: pytest.MonkeyPatch, bad: float) -> None:
    """A negative reading, or none that is a number, in the middle of a run is one warning and a modelled number."""
    metered(machine, monkeypatch, lambda: machine.joules if machine.now < 0.4 else bad, range_j=1000.0)
    loop, words = told(lambda: train(mlp(), Budget.fraction(0.6, of="energy"), 60, machine.live))
    assert len(words) == 1 and "vanished" in words[0]
    summary = loop.summary
    assert summary is not None and summary.budget_met and "energy" not in summary.metered
    assert summary.sources["energy"].startswith("modelled")
    final = machine.watts * machine.factor * machine.step_s(loop.widths)
    assert final <= 1.05 * summary.limit["energy"]


def test_a_budget_that_only_the_meter_shows_to_be_out_of_reach(machine: Machine) -> None:
    """Within reach by prediction, out of it by the clock: one warning says the least, and the run misses it."""
    limit, machine.factor = 1.5 * machine.step_s({"a": 8, "b": 8}), 10.0
    loop, words = told(lambda: train(mlp(), Budget.total(limit, of="latency"), 30, machine.live))
    said, least = words[0].partition("the narrowest model would still take about ")[2], machine.step_s({"a": 8, "b": 8})
    assert len(words) == 2 and said.endswith(" ms"), words
    assert float(said.removesuffix(" ms")) == pytest.approx(10 * 1e3 * least, rel=0.1)
    assert words[1].startswith("the budget is not met"), words
    assert loop.summary is not None and not loop.summary.budget_met


def beside(machine: Machine, seconds: float) -> Callable[[setpoint.Loop], None]:
    """The user's steps on a machine that predictions are exact for, with so many seconds for loading data."""
    machine.factor = 1.0

    def live(loop: setpoint.Loop) -> None:
        machine.live(loop)
        machine.now += seconds

    return live


def test_a_budget_below_what_does_not_shrink(machine: Machine) -> None:
    """Where most of a step is the user's own code, cutting stops once that shows: one warning, and no ruined model."""
    loop, words = told(lambda: train(mlp(), Budget.fraction(0.6, of="latency"), 120, beside(machine, 0.03)))
    summary = loop.summary
    assert len(words) == 2 and "does not shrink with the model" in words[0], words
    assert words[1].startswith("the budget is not met"), words
    assert summary is not None and not summary.budget_met
    dense, final = (machine.step_s(widths) + 0.03 for widths in (DENSE, loop.widths))
    assert summary.limit["latency"] == pytest.approx(0.6 * dense)
    assert f"({100 * final / dense:.1f} % of the dense latency) after" in summary.reason
    assert min(loop.widths.values()) >= 100, loop.widths


def test_a_slow_start(machine: Machine) -> None:
    """A fraction is one of the dense model's last reading: first steps that take five times as long buy nothing."""

    def live(loop: setpoint.Loop) -> None:
        machine.factor = 5.0 if loop.step < 12 else 1.0
        machine.live(loop)

    loop, _ = told(lambda: train(mlp(), Budget.fraction(0.6, of="latency"), 200, live))
    summary = loop.summary
    assert summary is not None and summary.budget_met, summary
    assert machine.step_s(loop.widths) <= 1.03 * 0.6 * machine.step_s(DENSE)


def test_a_machine_that_slows_down_after_the_landing(machine: Machine) -> None:
    """A budget that was met, and is missed at the end by the clock, counts as missed, and the reason says since."""

    def live(loop: setpoint.Loop) -> None:
        machine.factor = 1.5 if loop.step < 93 else 6.0
        machine.live(loop)

    schedule = setpoint.Schedule(0.05, 0.3, 0.3)
    early = setpoint.PricedController(schedule)  # decides at steps 64, 92 and 120 once it has met its budget
    loop, _ = told(lambda: train(mlp(), Budget.fraction(0.6, of="latency"), 120, live, controller=early))
    summary = loop.summary
    assert summary is not None and summary.metered["latency"] > summary.limit["latency"]
    assert not summary.budget_met and "; by its decisions it was met at step " in summary.reason, summary.reason
