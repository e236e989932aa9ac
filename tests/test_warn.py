"""Warnings point at the line of the user that led to them."""

from __future__ import annotations

import sys
import warnings

import torch
from torch import nn

import setpoint


def test_a_warning_points_at_the_users_line() -> None:
    """Claim: a budget above the dense model, and a step after the last one, are warned of in this file."""
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        line = sys._getframe().f_lineno + 1
        loop = setpoint.attach(model, optimizer, "4 M parameters", total_steps=1, example=(torch.randn(2, 4),))
        for _ in range(2):
            model(torch.randn(2, 4)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        loop.detach()
    assert [each.filename for each in caught] == [__file__] * 2
    assert caught[0].lineno == line and caught[1].lineno == line + 3
