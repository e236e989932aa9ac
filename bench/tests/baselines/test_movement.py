"""Movement: scores are those of a hand computation, and are added up over all steps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import setpoint
from setpoint_bench.baselines.movement import Movements
from setpoint_bench.baselines.scheduled import ScheduledController
from setpoint_bench.movement_scores import MovementScores
from setpoint_bench.score_sensor import ScoreSensor


def net() -> nn.Sequential:
    """Two inputs, three neurons, one output, without biases."""
    return nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 1, bias=False))


def by_hand(model: nn.Sequential) -> torch.Tensor:
    """`-sum of w dL/dw` over a neuron's two incoming weights and its outgoing one."""
    first, last = model[0].weight, model[2].weight
    rows = (first * first.grad).sum(1) + (last * last.grad).sum(0)
    return -rows.detach()


def test_one_step_by_hand() -> None:
    """Claim: a neuron's movement is minus the sum of weight x gradient over all of its weights."""
    model, x = net(), torch.randn(5, 2)
    (group,) = setpoint.find_groups(model, (x,))
    torch.autograd.backward(model(x).square().mean())
    torch.testing.assert_close(Movements.of(group, model).now(), by_hand(model))


def test_moves_away_from_zero_score_higher() -> None:
    """Claim: a step down the gradient makes the weights of a unit above 0 larger, and those of one below 0 smaller."""
    model, x = net(), torch.randn(64, 2)
    (group,) = setpoint.find_groups(model, (x,))
    torch.autograd.backward((model(x) - 3.0).square().mean())
    movement = Movements.of(group, model).now()
    before = model[0].weight.square().sum(1) + model[2].weight.square().sum(0)
    torch.optim.SGD(model.parameters(), lr=1e-4).step()
    after = model[0].weight.square().sum(1) + model[2].weight.square().sum(0)
    grown = (after - before).detach()
    assert bool((grown.sign() == movement.sign())[movement.abs() > 1e-3].all())


@pytest.mark.parametrize("total_steps", [40, 450])
def test_scores_are_sums_over_all_steps(total_steps: int) -> None:
    """Claim: every step counts, also where a loop reads every second one; a cut takes its units' sums along."""
    model = nn.Sequential(nn.Linear(4, 32, bias=False), nn.ReLU(), nn.Linear(32, 2, bias=False))
    optimizer, x = torch.optim.SGD(model.parameters(), lr=0.05), torch.randn(16, 4)
    scores = MovementScores(model, optimizer)
    controller = ScheduledController(begin=0.1, end=0.5, num_cuts=4, ranking="kind")
    loop = setpoint.attach(
        model, optimizer, 0.5, example=(x,), total_steps=total_steps, controller=controller, sensor=ScoreSensor(scores)
    )
    scores.start(loop)
    (name,) = loop.widths
    expected, last = torch.zeros(32), None
    for _ in range(total_steps):
        torch.autograd.backward((model(x) - 1.0).square().mean())
        if not loop.budget_met:
            first, out = model[0].weight, model[2].weight
            rows = (first * first.grad).sum(1) + (out * out.grad).sum(0)
            expected[torch.from_numpy(loop.origin[name])] -= rows.detach()
            last = expected.clone()
        optimizer.step()
        optimizer.zero_grad()
    kept = torch.from_numpy(loop.origin[name])
    assert last is not None and loop.budget_met and len(kept) < 32
    torch.testing.assert_close(
        torch.from_numpy(scores.scores(loop.groups)[name]).float(), last[kept], rtol=1e-4, atol=1e-6
    )
    assert float(last[kept].mean()) > float(last.mean())
    scores.remove()
    loop.finish()
    assert scores.flops > 0 and scores.seconds > 0
