"""The hint on cuts that fall when the learning rate has fallen already."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import setpoint
from setpoint.controller.priced import PricedController
from setpoint.controller.schedule import Schedule


def trained(settle: float, falls_to: float = 0.01) -> setpoint.Loop:
    """A finished run whose learning rate stays at its peak for a fifth of the steps, and then falls geometrically."""
    model = nn.Sequential(nn.Linear(8, 48), nn.ReLU(), nn.Linear(48, 4))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: falls_to ** max(0.0, (step - 20) / 80))
    controller = PricedController(Schedule(settle=settle, land=max(0.7, settle)))
    loop = setpoint.attach(model, optimizer, 0.5, total_steps=100, controller=controller, verify=False)
    for _ in range(100):
        nn.functional.cross_entropy(model(torch.randn(16, 8)), torch.randint(4, (16,))).backward()
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
    loop.finish()
    return loop


def test_a_late_cut_is_told() -> None:
    """Claim: the summary names the step of the last cut and the share of the highest rate, and says what to do."""
    loop = trained(settle=0.8)
    assert loop.summary is not None and loop.summary.budget_met
    last = next(entry for entry in reversed(list(loop.ledger)) if entry.changed)
    share = 0.01 ** ((last.step - 21) / 80)
    assert last.learning_rate == pytest.approx(0.1 * share)
    assert f"the last cut, at step {last.step}, fell when the learning rate was {share:.0%} of" in loop.summary.note
    assert "cut earlier" in str(loop.summary)


def test_a_cut_at_a_high_rate_is_not() -> None:
    """Claim: with the default schedule, or with a rate that stays, there is no hint."""
    for loop in (trained(settle=0.3), trained(settle=0.8, falls_to=1.0)):
        assert loop.summary is not None and "learning rate" not in loop.summary.note
