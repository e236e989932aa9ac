"""SNIP: sensitivity is the gradient of a gate, and the most sensitive weights within the limit stay."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from baselines.weights import SHAPES, counts, draw, run
from setpoint_bench.baselines.rule import Sight, Target, all_active
from setpoint_bench.baselines.snip import Snip, connection_sensitivity


def test_sensitivity_is_the_gradient_of_a_gate() -> None:
    """|w dL/dw| equals |dL/dc| for a gate c = 1 on every weight, the paper's definition."""
    model, x, y = nn.Linear(6, 3).double(), torch.randn(5, 6).double(), torch.tensor([0, 1, 2, 0, 1])
    gate = torch.ones(3, 6, dtype=torch.float64, requires_grad=True)
    F.cross_entropy(F.linear(x, gate * model.weight, model.bias), y).backward()
    model.weight.grad = None
    F.cross_entropy(model(x), y).backward()
    assert gate.grad is not None and model.weight.grad is not None
    torch.testing.assert_close(connection_sensitivity(model.weight.detach(), model.weight.grad), gate.grad.abs())


def test_the_most_sensitive_stay_within_the_limit() -> None:
    """All tensors are ranked together; what stays costs at most the limit, and one more would exceed it."""
    cost = {"conv": 100.0, "wide": 1.0, "narrow": 1.0}
    goal = Target(dict.fromkeys(SHAPES, 1), cost, 9000.0)
    weights, gradients = draw(1), draw(2)
    masks = Snip().update(Sight(0, 10, weights, gradients, all_active(weights)), goal, torch.Generator())
    spent = sum(cost[name] * count for name, count in counts(masks).items())
    assert 9000.0 - 100.0 < spent <= 9000.0
    scores = {name: connection_sensitivity(weights[name], gradients[name]) for name in weights}
    kept = torch.cat([scores[name][masks[name]] for name in weights])
    gone = torch.cat([scores[name][~masks[name]] for name in weights])
    assert kept.min() >= gone.max()


def test_once_before_training() -> None:
    """There is one update, ahead of the first step; until then all weights are active."""
    goal = Target(dict.fromkeys(SHAPES, 1), dict.fromkeys(SHAPES, 1.0), 50.0)
    history = run(Snip(), goal, 30)
    assert [step for step, _ in history] == [-1, 0]
    assert all(bool(mask.all()) for mask in history[0][1].values())
    assert sum(counts(history[1][1]).values()) == 50
