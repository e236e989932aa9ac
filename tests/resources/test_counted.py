"""Steps on copies of a model are counted, by what they take."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import pytest
import torch
from torch import nn

import setpoint
from setpoint.cost.flops import flops_cost
from setpoint.groups.group import widths_of
from setpoint.groups.trace import trace
from setpoint.resources.counted import Tally
from setpoint.resources.replica import replica


def test_steps_count_by_the_widths_that_they_are_made_at() -> None:
    """Claim: each step counts as its share of a dense one; the one made before a copy is given out counts as well."""
    model, x = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)), torch.randn(4, 8)
    optimizer, found = torch.optim.AdamW(model.parameters()), trace(model, (x,))
    cost, dense = flops_cost(found), widths_of(found.groups)
    tally, made = Tally(), partial(replica, model, (optimizer,), (x,), found.groups)

    def share(widths: Mapping[str, int]) -> float:
        return cost.total(widths) / cost.total(dense)

    make = tally.over(made, share, begun=1)
    with make(dense, data=True) as copy:
        assert tally.steps == 1
        copy.step()
        copy.narrow(found.groups, {"0": 16})
        copy.step()
    assert tally.steps == pytest.approx(2 + share({"0": 16})) and share({"0": 16}) < 0.6
    with make(dense, data=False) as copy:
        copy.step()
    assert tally.steps == pytest.approx(2 + share({"0": 16}))


def test_a_run_pays_for_what_it_learns_on_copies() -> None:
    """Claim: the overhead of a budget of memory holds the steps that are made on copies; one of FLOPs makes none."""

    def overhead(budget: str) -> float:
        model, x = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 4)), torch.randn(32, 64)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        loop = setpoint.attach(model, optimizer, budget, total_steps=40, example=(x,))
        summary = loop.finish()
        return summary.overhead_flops / summary.dense_flops

    assert overhead("60% flops") < 1 and overhead("60% memory") > 1.5
