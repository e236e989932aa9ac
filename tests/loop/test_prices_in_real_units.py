"""Prices of seconds and joules end to end, on a recorded clock and meter."""

from __future__ import annotations

import pytest

import setpoint
from loop.test_budgets import Machine, machine, metered, mlp, train

STEPS = 60
RESOURCES = ("latency", "energy")
__all__ = ["machine"]


def priced(machine: Machine, price: setpoint.Price) -> setpoint.Loop:
    """A run at this price, which lands."""
    loop = train(mlp(), price, STEPS, machine.live)
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
