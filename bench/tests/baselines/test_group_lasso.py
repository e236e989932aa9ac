"""Group lasso: its gradient is that of its norms, and reconfiguration drops what it shrank."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import setpoint
from controller.plants import chain, observe
from setpoint.controller.plan import Plan
from setpoint.groups.group import widths_of
from setpoint.sensor.reading import Reading
from setpoint_bench.baselines.group_lasso import (
    ReconfiguringController,
    add_lasso_gradient,
    lasso_norms,
    lasso_strength,
    shrink_by_lasso,
)


class Net(nn.Module):
    """Two convolutions and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.head = nn.Conv2d(2, 6, 3), nn.Conv2d(6, 4, 3), nn.Linear(4 * 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scores."""
        scores: torch.Tensor = self.head(torch.relu(self.conv2(torch.relu(self.conv1(x)))).flatten(1))
        return scores


def test_gradient_is_that_of_the_norms() -> None:
    """What is added to the gradients equals autograd's derivative of strength x the sum of norms."""
    model = Net()
    groups = setpoint.find_groups(model, (torch.randn(2, 2, 6, 6),))
    assert len(groups) == 2
    parts = [model.conv1.weight.flatten(1), model.conv2.weight.transpose(0, 1).flatten(1)]
    parts += [model.conv2.weight.flatten(1), model.head.weight.view(3, 4, 4).transpose(0, 1).flatten(1)]
    norms = torch.stack([part.norm(dim=1).sum() for part in parts]).sum()
    assert float(lasso_norms(model, groups)) == pytest.approx(float(norms.detach()), rel=1e-5)
    weights = [model.conv1.weight, model.conv2.weight, model.head.weight]
    expected = torch.autograd.grad(0.3 * norms, weights)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    add_lasso_gradient(model, groups, torch.tensor(0.3))
    for weight, gradient in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.grad, 1.0 + gradient, rtol=1e-4, atol=1e-6)
    assert torch.equal(model.conv1.bias.grad, torch.ones(6))


def test_shrinking_is_the_proximal_step() -> None:
    """Each unit's part loses learning rate x strength of its norm, and is zero where it had no more than that."""
    model = Net()
    groups = setpoint.find_groups(model, (torch.randn(2, 2, 6, 6),))
    first = {group.name: group for group in groups}["conv1"]
    with torch.no_grad():
        model.conv1.weight[2] *= 1e-3
    before, head = model.conv1.weight.detach().clone(), model.head.weight.detach().clone()
    shrink_by_lasso(model, (first,), torch.tensor(0.3), {id(model.conv1.weight): 0.1})
    norms, left = before.flatten(1).norm(dim=1), model.conv1.weight.flatten(1).norm(dim=1)
    torch.testing.assert_close(left, (norms - 0.03).clamp_min(0), atol=1e-6, rtol=1e-5)
    assert float(left[2].detach()) == 0 and bool((left[:2] > 0).all())
    torch.testing.assert_close(model.conv1.weight[0] / left[0], before[0] / norms[0])
    assert torch.equal(model.head.weight, head)


def test_strength_gives_the_ratio() -> None:
    """With it the penalty is the asked share of the whole loss."""
    strength = lasso_strength(torch.tensor(2.0), torch.tensor(50.0), 0.25)
    penalty = float(strength) * 50.0
    assert penalty / (2.0 + penalty) == pytest.approx(0.25)


def plan_at(step: int, limit: float, near_zero: int) -> Plan:
    """The plan when so many units of the second group are near zero and the others all alike."""
    groups, cost = chain(20, 30)
    saliency = {"layer0": np.full(20, 1.0), "layer1": np.full(30, 5.0)}
    saliency["layer1"][:near_zero] = 0.2
    dense = cost.total(widths_of(groups))
    reading = Reading(step, saliency, 1, calibrated=False)
    seen = observe(groups, cost, limit=limit * dense, dense=dense, reading=reading, step=step, total_steps=100)
    controller = ReconfiguringController()
    return controller.decide(controller.init(groups), seen, cost, groups)[1]


def test_units_near_zero_go_first() -> None:
    """What is near zero goes ahead of the ramp, all of it and nothing else, until the limit is met."""
    plan = plan_at(7, 0.3, near_zero=15)
    assert plan.keep["layer0"].all() and np.flatnonzero(~plan.keep["layer1"]).tolist() == list(range(15))
    assert not plan.budget_met
    plan = plan_at(7, 0.9, near_zero=15)
    assert plan.budget_met and 0 < (~plan.keep["layer1"]).sum() < 15


def test_ramp_where_nothing_is_near_zero() -> None:
    """Otherwise the density of both groups comes down in a straight line, to what meets the limit at the end."""
    half, whole = plan_at(35, 0.3, near_zero=0), plan_at(70, 0.3, near_zero=0)
    final = [float(whole.keep[name].mean()) for name in ("layer0", "layer1")]
    middle = [float(half.keep[name].mean()) for name in ("layer0", "layer1")]
    assert whole.budget_met and not half.budget_met
    assert middle == pytest.approx([(1 + each) / 2 for each in final], abs=0.06)
