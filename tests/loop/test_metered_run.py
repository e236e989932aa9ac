"""Runs held to seconds and joules, on a recorded clock and meter."""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

import setpoint
from loop.test_budgets import Machine, machine, metered, mlp, train
from setpoint.errors import BudgetError
from setpoint.resources.joules import Counter, EnergyMeter
from setpoint.resources.metering import Metering

Budget = setpoint.Budget
DENSE = {"a": 256, "b": 256}
STEPS = 120
__all__ = ["machine"]


def ended(loop: setpoint.Loop, resource: str) -> float:
    """The share of its budget that a run has spent, which must not be over it."""
    summary = loop.summary
    assert summary is not None and summary.budget_met, summary
    share = summary.spent_run[resource] / summary.limit_run[resource]
    assert share <= 1, summary
    return share


def test_seconds_of_a_run(machine: Machine) -> None:
    """Steps take half as long again as copies: the run ends within 1 % of its seconds, and not over, by the clock."""
    loop = train(mlp(), Budget.fraction(0.5, of="latency", per="run"), STEPS, machine.live)
    assert ended(loop, "latency") > 0.99
    assert loop.summary is not None and loop.summary.spent_run["latency"] == pytest.approx(machine.now)
    dense = machine.factor * machine.step_s(DENSE)
    assert loop.summary.limit_run["latency"] == pytest.approx(0.5 * STEPS * dense)
    assert loop.summary.sources["latency"].startswith("measured")


def test_joules_of_a_run(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """`Budget.total(j, of="energy", per="run")` holds the whole run to j joules, as metered."""
    metered(machine, monkeypatch, lambda: machine.joules)
    limit = 0.6 * STEPS * machine.watts * machine.factor * machine.step_s(DENSE)
    loop = train(mlp(), Budget.total(limit, of="energy", per="run"), STEPS, machine.live)
    assert ended(loop, "energy") > 0.99
    assert loop.summary is not None and loop.summary.limit_run["energy"] == limit
    assert loop.summary.spent_run["energy"] == pytest.approx(machine.joules)
    assert loop.summary.sources["energy"] == "measured: recorded"


def slower(machine: Machine) -> Callable[[setpoint.Loop], None]:
    """From the middle of the run on every step takes a twentieth longer."""

    def live(loop: setpoint.Loop) -> None:
        machine.factor = 1.5 if loop.step < STEPS // 2 else 1.575
        machine.live(loop)

    return live


def evaluated(machine: Machine) -> Callable[[setpoint.Loop], None]:
    """Every ten steps the user evaluates, which takes as long as a quarter of a dense step."""

    def live(loop: setpoint.Loop) -> None:
        machine.live(loop)
        if loop.step % 10 == 9:
            machine.now += machine.factor * machine.step_s(DENSE) / 4

    return live


def wavering(machine: Machine) -> Callable[[setpoint.Loop], None]:
    """Each step takes up to a tenth more or less."""
    generator = random.Random(0)

    def live(loop: setpoint.Loop) -> None:
        machine.factor = generator.uniform(1.35, 1.65)
        machine.live(loop)

    return live


@pytest.mark.parametrize("live", [slower, evaluated, wavering])
def test_what_comes_otherwise_is_made_up_for(
    machine: Machine, live: Callable[[Machine], Callable[[setpoint.Loop], None]]
) -> None:
    """A machine that becomes slower after the landing, evaluations, and steps that waver: not over, and near."""
    limit = 0.6 * STEPS * machine.factor * machine.step_s(DENSE)
    loop = train(mlp(), Budget.total(limit, of="latency", per="run"), STEPS, live(machine))
    assert ended(loop, "latency") > 0.96


def test_a_machine_that_becomes_far_too_slow(machine: Machine) -> None:
    """A budget that cannot be met any more is one warning with the least, and at the end one that it is not met."""

    def live(loop: setpoint.Loop) -> None:
        machine.factor = 1.5 if loop.step < STEPS // 3 else 30.0
        machine.live(loop)

    with pytest.warns(UserWarning, match=r"cannot be met any more.*narrowest model it would come to") as caught:
        loop = train(mlp(), Budget.fraction(0.7, of="latency", per="run"), STEPS, live)
    assert len(caught) == 2 and str(caught[1].message).startswith("the budget is not met")
    assert loop.summary is not None and not loop.summary.budget_met and "asked for" in loop.summary.reason


def test_a_meter_that_vanishes(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """One warning; joules go on as predicted from what was read, within the budget, and are labelled as modelled."""
    gone: list[float] = []

    def read_j() -> float:
        if machine.now > 0.4:
            gone.append(machine.joules)
            raise OSError("unplugged")
        return machine.joules

    metered(machine, monkeypatch, read_j)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loop = train(mlp(), Budget.fraction(0.6, of="energy", per="run"), STEPS, machine.live)
    assert len(caught) == len(gone) == 1 and "vanished" in str(caught[0].message)
    assert ended(loop, "energy") > 0.99
    summary = loop.summary
    assert summary is not None and summary.sources["energy"].startswith("modelled")
    assert "joules are modelled" in summary.reason and "energy" not in summary.metered
    assert summary.spent_run["energy"] == pytest.approx(machine.joules, rel=0.02)


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (
            Budget.fraction(0.05, of="latency", per="run"),
            r"cannot be met.*at least Budget.fraction\(0\.\d+, of='latency'",
        ),
        (
            Budget.total(500.0, of="latency", per="run"),
            r"500 s for the run .* nothing would be cut.* without a unit is in seconds",
        ),
        (Budget.fraction(0.5, of="memory", per="run"), "no budget per run of 'memory'"),
        (Budget.fraction(0.5, of="inference", per="run"), "no budget per run of 'inference'"),
    ],
)
def test_what_cannot_be_held_is_refused(machine: Machine, budget: Budget, words: str) -> None:
    """Too little, milliseconds for seconds, and what no run spends are errors that say what to ask for."""
    with pytest.raises(BudgetError, match=words):
        train(mlp(), budget, STEPS)


@pytest.mark.parametrize("resource", ["latency", "energy"])
def test_an_interrupted_run(machine: Machine, monkeypatch: pytest.MonkeyPatch, resource: str) -> None:
    """A run that goes on in another process, whose clock and meter begin anew, is held to the same budget."""
    start = [0.0]
    metered(machine, monkeypatch, lambda: machine.joules - start[0])
    budget = Budget.fraction(0.6, of=resource, per="run")

    def begun() -> tuple[setpoint.Loop, nn.Module, torch.optim.Optimizer, torch.Tensor]:
        model, optimizer, x = mlp()
        return setpoint.attach(model, optimizer, budget, example=(x,), total_steps=STEPS), model, optimizer, x

    def steps(until: int) -> None:
        while loop.step < until:
            model(x).square().mean().backward()
            machine.live(loop)
            optimizer.step()
            optimizer.zero_grad()

    loop, model, optimizer, x = begun()
    steps(40)
    saved = [part.state_dict() for part in (loop, model, optimizer)]
    loop.detach()
    machine.now, start[0] = machine.now + 1000.0, machine.joules + 1000.0  # a pause
    machine.joules += 1000.0
    loop, model, optimizer, x = begun()
    for part, state in zip((loop, model, optimizer), saved, strict=True):
        part.load_state_dict(state)
    steps(STEPS)
    loop.finish()
    assert ended(loop, resource) > 0.99


# Meters and clocks that mislead.


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
    assert f"({100 * final / dense:.1f} % of the dense latency) (read; the fit says" in summary.reason
    assert min(loop.widths.values()) >= 100, loop.widths


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


# Steps right after a cut, or at the beginning, that take longer.


COLD = (1.7, 1.5, 1.3)
"""What the first steps after a cut take, as multiples of those that follow; measured on a small model."""


def cold(machine: Machine) -> Callable[[setpoint.Loop], None]:
    """Steps of a machine that each cut makes cold, and so does the beginning."""
    seen, machine.factor = [(0, 0), 0], 1.0  # widths, and steps at them

    def live(loop: setpoint.Loop) -> None:
        widths = tuple(loop.widths.values())
        seen[:] = [widths, seen[1] + 1 if widths == seen[0] else 0]
        machine.factor = COLD[seen[1]] if seen[1] < len(COLD) else 1.0
        machine.live(loop)

    return live


@pytest.mark.parametrize("steps", [20, 30, 60, 120])
@pytest.mark.parametrize("fraction", [0.9, 0.7])
def test_cold_steps_are_not_cut_for(machine: Machine, steps: int, fraction: float) -> None:
    """Claim: with decisions at almost every step the model ends at its budget, and not below by what is only cold."""
    loop = train(mlp(), Budget.fraction(fraction, of="latency"), steps, cold(machine))
    share = machine.step_s(loop.widths) / machine.step_s(DENSE)
    assert 0.93 * fraction <= share <= 1.03 * fraction, share
    assert loop.summary is not None and loop.summary.budget_met, loop.summary


def test_joules_of_cold_steps_are_not_cut_for(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: the same of joules, whether a counter reads them or they are stated watts times seconds."""
    for stated in (False, True):
        if not stated:
            metered(machine, monkeypatch, lambda: machine.joules)
        else:
            monkeypatch.setattr("setpoint.resources.costing.find_energy_meter", lambda devices: (None, "none here"))
        budget = Budget.fraction(0.8, of="energy", watts=30.0 if stated else None)
        loop = train(mlp(), budget, 40, cold(machine))
        share = machine.step_s(loop.widths) / machine.step_s(DENSE)
        assert 0.93 * 0.8 <= share <= 1.03 * 0.8, (stated, share)


def test_no_decision_before_a_few_steps(machine: Machine) -> None:
    """Claim: between two cuts by seconds lie four steps at least, but before the last step of the run."""
    loop = train(mlp(), Budget.fraction(0.5, of="latency"), 40, cold(machine))
    cuts = [entry.step for entry in loop.ledger if entry.reason.startswith("dropped")]
    assert len(cuts) >= 3 and cuts[0] >= 4
    assert all(later - earlier >= 4 or later == 40 for earlier, later in zip(cuts, cuts[1:], strict=False)), cuts


def test_a_cold_meter_goes_on_in_another_process() -> None:
    """Claim: how many steps were made since the last cut is in the state, so a resumed run decides at the same step."""
    meters = [Metering({"latency"}, list, torch.device("cpu"), model=torch.nn.Identity()) for _ in range(2)]
    for _ in range(3):
        meters[0].stepped()
    meters[1].load_state_dict(meters[0].state_dict())
    assert meters[1].waits
    meters[1].stepped()
    assert not meters[1].waits
    meters[1].cut()
    assert meters[1].waits


@pytest.mark.parametrize(("steps", "slow"), [(30, 5), (60, 7)])
def test_a_dense_model_that_becomes_quicker_is_not_cut_for_it(machine: Machine, steps: int, slow: int) -> None:
    """Claim: where seconds fall to a third just before the first cut, the limit and the controller follow alike."""

    def live(loop: setpoint.Loop) -> None:
        machine.factor = 3.0 if loop.step < slow else 1.0
        machine.live(loop)

    loop = train(mlp(), Budget.fraction(0.9, of="latency"), steps, live)
    assert machine.step_s(loop.widths) / machine.step_s(DENSE) >= 0.93 * 0.9


# Prices in real units.


RESOURCES = ("latency", "energy")


def priced(machine: Machine, price: setpoint.Price) -> setpoint.Loop:
    """A run at this price, which lands."""
    loop = train(mlp(), price, 60, machine.live)
    assert loop.summary is not None and loop.summary.budget_met, loop.summary
    return loop


@pytest.fixture
def counted(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """The machine with a recorded energy meter."""
    metered(machine, monkeypatch, lambda: machine.joules)
    return machine


@pytest.mark.parametrize("resource", RESOURCES)
def test_a_price_is_for_what_the_meter_reads(counted: Machine, resource: str) -> None:
    """Where steps cost twice what is predicted, a unit of the resource buys as much loss as two predicted ones."""
    counted.factor = 1.0
    dense = counted.step_s({"a": 256, "b": 256}) * (counted.watts if resource == "energy" else 1.0)
    single, double = (
        priced(counted, setpoint.Price(rate / dense, of=resource, relative=False)) for rate in (1e-3, 2e-3)
    )
    counted.factor = 2.0
    dear = priced(counted, setpoint.Price(1e-3 / dense, of=resource, relative=False))
    assert dear.widths == double.widths
    assert sum(double.widths.values()) < sum(single.widths.values()) < 512
    assert dear.ledger[-1].price[resource] == pytest.approx(1e-3 / dense)


@pytest.mark.parametrize("resource", RESOURCES)
def test_a_relative_price_is_the_same_on_any_machine(counted: Machine, resource: str) -> None:
    """A rate for the dense cost leads to the same size, however long steps take, and is said in real units."""
    found = []
    for counted.factor in (1.0, 2.0):
        loop = priced(counted, setpoint.Price(1e-3, of=resource))
        found.append(loop.widths)
        summary = loop.summary
        assert summary is not None and summary.sources[resource].startswith("measured")
        real = counted.factor * counted.step_s(loop.widths) * (counted.watts if resource == "energy" else 1.0)
        assert summary.metered[resource] == pytest.approx(real, rel=0.02)
        decided = [entry for entry in loop.ledger if not entry.reason.startswith("no decision")]
        assert decided and all(resource in entry.metered and resource in entry.predicted for entry in decided)
    assert found[0] == found[1] and sum(found[0].values()) < 512
