"""Checks of budgets: what cannot be reached is refused, and what cuts nothing is warned of."""

from __future__ import annotations

import pytest

from setpoint.cost.budget import Budget, Price, Tolerance
from setpoint.errors import BudgetError
from setpoint.spending.checks import check_budgets, check_reachable


@pytest.mark.parametrize(("resource", "limit"), [("flops", 1.1), ("params", 1.1), ("memory", 2.0), ("inference", 2.0)])
def test_a_budget_above_the_dense_model_is_warned_of(resource: str, limit: float) -> None:
    """Claim: an amount above what the dense model spends says that nothing will be cut, for every resource."""
    with pytest.warns(UserWarning, match="above the .* of the dense model, so nothing will be cut"):
        check_reachable(Budget.total(limit * 1e6, of=resource), 1e6, 1e5)


@pytest.mark.parametrize("goal", [Price(1e-9, of="flops"), Tolerance(0.1)])
def test_a_price_and_a_tolerance_stand_alone(goal: Price | Tolerance) -> None:
    """Claim: beside a budget they are refused as what they are, and not as what is no budget at all."""
    with pytest.raises(BudgetError, match=f"^{type(goal).__name__}.* stands alone: attach with it"):
        check_budgets([goal, Budget.fraction(0.5, of="flops")])


@pytest.mark.parametrize(("least", "advice"), [(0.6, "Ask for at least 63.0% latency"), (0.995, "hold the model to")])
def test_advice_is_of_use(least: float, advice: str) -> None:
    """The least is named, with room for the next fit of seconds, unless it is about all that the dense model takes."""
    with pytest.raises(BudgetError, match=f"cannot be reached.*{advice}"):
        check_reachable(Budget.fraction(0.5, of="latency"), 1.0, least)
