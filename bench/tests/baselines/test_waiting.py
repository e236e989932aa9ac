"""Cuts that wait for the loss."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import setpoint
from setpoint_bench.baselines.waiting import WaitingController

STEPS = 400


@pytest.mark.parametrize(("recovers", "until"), [(100, range(100, 240)), (STEPS, range(240, 250))])
def test_a_cut_waits_until_the_loss_is_back_or_the_run_is_far(recovers: int, until: range) -> None:
    """Claim: after a loss that rises with the first cut, nothing goes before it is back, or before 60 % of the run."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4)), torch.randn(16, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loop = setpoint.attach(model, optimizer, 0.5, total_steps=STEPS, example=(x,), controller=WaitingController())
    cuts: list[int] = []
    for step in range(1, STEPS + 1):
        model(x).square().mean().backward()
        loop.observe(loss=1.0 + 0.01 * torch.rand(()).item() + (2.0 if cuts and step <= recovers else 0.0))
        before = sum(loop.widths.values())
        optimizer.step()
        optimizer.zero_grad()
        if sum(loop.widths.values()) < before:
            cuts.append(step)
    assert loop.finish().budget_met and cuts[1] in until
    assert any("waits for the loss" in entry.reason for entry in loop.ledger)


def test_fractions_are_checked() -> None:
    """Claim: a fraction of 0, and one above 1, is refused."""
    for settings in ({"stop": 0.0}, {"step": 1.5}):
        with pytest.raises(ValueError, match="fractions of the run"):
            WaitingController(**settings)
