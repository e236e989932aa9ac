"""The first steps after a cut take longer than those that follow, and a run is not cut for them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import setpoint
from loop.test_budgets import Machine, machine, metered, mlp, train
from setpoint.resources.metering import Metering

__all__ = ["machine"]

Budget = setpoint.Budget
DENSE = {"a": 256, "b": 256}
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
