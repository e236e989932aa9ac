"""A goal: the controller that pursues what the user asks for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from setpoint.controller.penalty import PenaltyController
from setpoint.controller.plan import Controller, Pursuing
from setpoint.controller.priced import PricedController
from setpoint.controller.tolerant import TolerantController
from setpoint.cost.budget import Budget, Price, Tolerance
from setpoint.errors import BudgetError
from setpoint.messages import a_type


def check_goal(goal: Price | Tolerance | None, controller: Controller[Any]) -> None:
    """Check that a controller that says what it pursues pursues this goal.

    Args:
        goal: a price or a tolerance, None for budgets.
        controller: that the user gave.

    Raises:
        BudgetError: for one that pursues another.
    """
    inner = getattr(controller, "inner", controller)
    if not isinstance(inner, Pursuing):
        return
    if inner.goal != "budget" and inner.goal != goal:
        raise BudgetError(
            f"this {type(inner).__name__} pursues {inner.goal!r}: give the same to attach, got {goal or 'budgets'}"
        )
    if inner.goal == "budget" and goal is not None:
        raise BudgetError(
            f"{type(inner).__name__} holds a budget, not {a_type(goal)}: give attach a Budget, or leave "
            "the controller to it"
        )


def controller_for(goal: Price | Tolerance | Sequence[Budget], *, regrow: bool) -> Controller[Any]:
    """The default controller of a goal.

    Args:
        goal: a price, a tolerance, or budgets.
        regrow: whether dropped units are to come back.
    """
    if isinstance(goal, Price):
        return PenaltyController(goal)
    if isinstance(goal, Tolerance):
        return TolerantController(goal)
    return PricedController(deadband=min(budget.deadband for budget in goal), regrow=regrow)
