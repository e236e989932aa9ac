"""Changing what a run is held to in its middle: another budget, another length."""

from __future__ import annotations

import copy
from typing import Any

from setpoint.arguments import plain_number
from setpoint.controller.selection import cheapest
from setpoint.cost.parse import parse_budget
from setpoint.errors import BudgetError, LoopError
from setpoint.groups.group import Group
from setpoint.messages import counted
from setpoint.spending.checks import check_budgets, check_costed, check_reachable, with_bill
from setpoint.spending.spending import Spending


def check_open(spending: Spending, step: int, *, budget_met: bool) -> None:
    """Check that the budget may still be changed.

    Raises:
        LoopError: once the budget is met or frozen, or where there is no budget.
    """
    if not spending.budgets:
        raise LoopError("this loop follows a Price or a Tolerance: it has no budget to change, attach with a Budget")
    if budget_met or spending.schedule.final(step, spending.planned_steps):
        raise LoopError(
            f"the budget is frozen at step {step:,}: it may be changed until it is met, and before step "
            f"{max(1, round(spending.schedule.land * spending.planned_steps)):,}. Finish this loop and attach a new one"
        )


def change_budget(spending: Spending, budget: Any, groups: tuple[Group, ...], step: int) -> None:
    """Hold the run to another budget, as `attach` takes it.

    Raises:
        BudgetError: when it cannot be met, or is on a resource that this run does not know.
    """
    budgets, bill = with_bill(check_budgets(parse_budget(budget)))
    if bill:
        raise BudgetError("the bill of a run is fixed at attach: change the budgets per step alone")
    spending.check_kind(budgets)
    check_costed(budgets, spending.costs, spending.budgets)
    changed = copy.copy(spending)
    changed.hold(spending.target.anew(budgets), groups)
    for each in budgets:
        cost, present = spending.costs[each.resource], changed.expected(each.resource, spending.dense_widths)
        least = cheapest(cost, groups) * present / cost.total(spending.dense_widths)
        check_reachable(each, changed.target.original.get(each.resource, present), least)
    changed.runs.check(step, spending.planned_steps, groups)
    spending.target, spending.runs, spending.planned_steps = changed.target, changed.runs, changed.planned_steps


def change_total_steps(spending: Spending, total_steps: int, groups: tuple[Group, ...], step: int) -> None:
    """Give the run another length.

    Raises:
        BudgetError: when the budget of the run could not be met.
        LoopError: where a bill says how long the run is.
        ValueError: for a number that is not above the steps done.
    """
    if spending.bill:
        raise LoopError(
            f"the bill of the run says how long it is, {counted(spending.run_steps, 'step')} as planned now: to say it "
            "yourself, attach without the budget per run"
        )
    total_steps = plain_number(total_steps)
    if type(total_steps) is not int or total_steps <= step:
        raise ValueError(f"total_steps must be an integer above the {counted(step, 'step')} done, got {total_steps!r}")
    spending.runs.check(step, total_steps, groups)
    spending.planned_steps = total_steps
