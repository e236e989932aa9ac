"""An empty reading: what no gradient was seen of is unknown, not worthless."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from setpoint import Budget, Loop, attach


def _probe_then_tune(frozen_until: int, detach: bool = False) -> tuple[Loop, list[str]]:
    """60 steps of a network whose middle layer has no gradient at first; the loop, and what was warned of."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 4))
    optimizer, x, y = torch.optim.AdamW(model.parameters(), 1e-2), torch.randn(64, 12), torch.randint(0, 4, (64,))
    loop = attach(model, optimizer, Budget.fraction(0.5, of="flops"), example=(x,), total_steps=60)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(60):
            hidden = model[:4](x)
            if detach and step < frozen_until:
                hidden = hidden.detach()
            elif not detach:
                model[2].requires_grad_(step >= frozen_until)
                hidden = model[:4](x)
            nn.functional.cross_entropy(model[4](hidden), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        loop.finish()
    return loop, [str(each.message) for each in caught]


@pytest.mark.parametrize("detach", [False, True])
def test_a_group_waits_until_a_gradient_is_seen(detach: bool) -> None:
    """Claim: what was frozen or detached at first is not worthless; the ledger says so, and a warning with a remedy."""
    loop, warned = _probe_then_tune(24, detach)
    early = [entry for entry in loop.ledger if entry.step < 24]
    assert early and all(entry.widths["0"] == 48 for entry in early)
    assert any("0 waits: none of the steps so far has shown a gradient there" in entry.reason for entry in early)
    assert (
        any("0 waits" in each and "Unfreeze them before" in each for each in warned)
        and loop.reading().steps_seen["2"] > loop.reading().steps_seen["0"]
    )
    assert loop.budget_met


def test_no_gradient_at_all_decides_nothing() -> None:
    """Claim: steps without a backward pass cut nothing; the ledger says why."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 48), nn.ReLU(), nn.Linear(48, 4))
    optimizer, x = torch.optim.AdamW(model.parameters(), 1e-2), torch.randn(64, 12)
    loop = attach(model, optimizer, Budget.fraction(0.5, of="flops"), example=(x,), total_steps=60)
    for _ in range(60):
        optimizer.step()
    loop.detach()
    assert loop.widths == {"0": 48} and not loop.budget_met
    assert {entry.reason for entry in loop.ledger} == {"no decision: no gradient has been seen yet"}
