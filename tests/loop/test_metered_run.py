"""Budgets of a whole run in seconds and joules, on a recorded clock and meter."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

import setpoint
from loop.test_budgets import Machine, machine, metered, mlp, train
from setpoint.errors import BudgetError
from setpoint.resources import costing

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


def test_stated_watts(machine: Machine) -> None:
    """Without a meter a run is held to joules as predicted from the user's figure, and says that they are modelled."""
    if costing.find_energy_meter([torch.device("cpu")])[0] is not None:
        pytest.skip("this machine has a meter")
    loop = train(mlp(), Budget.fraction(0.6, of="energy", per="run", watts=25.0), STEPS, machine.live)
    assert ended(loop, "energy") > 0.99
    assert loop.summary is not None and loop.summary.sources["energy"].startswith("modelled: stated watts")


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
