"""The Lagrangian holds expected FLOPs to a target, and expected FLOPs are the expectation of Setpoint's cost."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from controller.plants import chain, residual
from setpoint.groups.group import widths_of
from setpoint_bench.baselines.expected_cost import expected_cost
from setpoint_bench.baselines.hard_concrete import logit_of, probability_above
from setpoint_bench.baselines.lagrangian import Lagrangian


def test_expected_cost_at_whole_widths() -> None:
    """Claim: where all is certain it is the cost itself."""
    for groups, cost in (chain(7, 12, 5), residual(9, (4, 6))):
        widths = {group.name: torch.tensor(float(group.num_units - 1), dtype=torch.float64) for group in groups}
        whole = cost.total({group.name: group.num_units - 1 for group in groups})
        assert float(expected_cost(cost, widths)) == pytest.approx(whole)


def test_expected_cost_is_the_mean_over_draws() -> None:
    """Claim: of units drawn independently along a chain, the mean cost is that at the expected widths."""
    groups, cost = chain(20, 30, 10)
    rng = np.random.default_rng(0)
    probabilities = {group.name: rng.random(group.num_units) for group in groups}
    widths = {name: torch.tensor(each.sum()) for name, each in probabilities.items()}
    drawn = [
        cost.total({name: int((rng.random(len(each)) < each).sum()) for name, each in probabilities.items()})
        for _ in range(4000)
    ]
    assert float(expected_cost(cost, widths)) == pytest.approx(np.mean(drawn), rel=0.01)


@pytest.mark.parametrize("target", [0.5, 0.2])
def test_reaches_its_target(target: float) -> None:
    """Claim: units worth different amounts of loss come to the target's expected FLOPs, and the worthiest stay."""
    groups, cost = chain(16, 16)
    dense = cost.total(widths_of(groups))
    worth = {group.name: torch.linspace(0.001, 0.2, group.num_units) for group in groups}
    logits = {name: torch.full_like(each, logit_of(0.99)).requires_grad_() for name, each in worth.items()}
    rate, optimizer = 0.1, torch.optim.Adam(logits.values(), lr=0.1)
    lagrangian = Lagrangian(rate, torch.device("cpu"))
    for step in range(600):
        there = {name: probability_above(each) for name, each in logits.items()}
        expected = expected_cost(cost, {name: each.sum() for name, each in there.items()}) / dense
        loss = -torch.stack([(worth[name] * each).sum() for name, each in there.items()]).sum()
        now = 1.0 + (target - 1.0) * min(1.0, step / 200)
        torch.autograd.backward(loss + lagrangian.penalty(expected, now))
        optimizer.step()
        optimizer.zero_grad()
        lagrangian.rise()
    assert float(expected.detach()) == pytest.approx(target, abs=0.02)
    for name, each in there.items():
        assert bool((each.detach().diff() > -1e-3).all()), name
