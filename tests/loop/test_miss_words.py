"""Tests of the words of a missed or unreachable budget."""

import pytest
import torch
from torch import nn

import setpoint
from setpoint.cost.budget import Budget
from setpoint.errors import BudgetError
from setpoint.spending.checks import check_reachable


def test_a_diverged_run_names_its_gradients() -> None:
    """Claim: a budget missed since gradients were NaN is warned of with that reason."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x = torch.randn(8, 4)
    loop = setpoint.attach(model, optimizer, budget="50%", total_steps=20, example=(x,))
    for _ in range(20):
        optimizer.zero_grad()
        (model(x).sum() * float("nan")).backward()
        optimizer.step()
    with pytest.warns(UserWarning, match="the budget is not met: .*NaN or infinite gradients"):
        loop.finish()


def test_other_resources_are_advised_only_where_they_help() -> None:
    """Claim: where layers are not pruned, a budget of seconds is not answered by one of FLOPs."""
    budget = Budget.fraction(0.5, of="latency")
    with pytest.raises(BudgetError, match="hold the model to a budget of 'flops'"):
        check_reachable(budget, 1.0, 0.995)
    with pytest.raises(BudgetError, match="frozen") as caught:
        check_reachable(budget, 1.0, 0.995, lambda: ". Not pruned: frozen")
    assert "hold the model" not in str(caught.value)
