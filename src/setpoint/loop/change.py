"""A change: the parts of a run that is given another budget or another length while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from setpoint.controller.plan import Transferring
from setpoint.controller.reference import Reference
from setpoint.controller.selection import cheapest
from setpoint.cost.budget import Budget
from setpoint.errors import BudgetError, LoopError
from setpoint.groups.group import Group, widths_of
from setpoint.loop.accounting import Account
from setpoint.loop.granularity import check_resources
from setpoint.loop.metering import METERED
from setpoint.loop.parts import Parts
from setpoint.loop.planning import metered_at
from setpoint.loop.run_spending import (
    forecast,
    overhead_to_come,
    read_joules,
    replan,
    spent_so_far,
)
from setpoint.loop.target import Target, check_budgets, check_reachable

if TYPE_CHECKING:
    from setpoint.loop.loop import Loop

_FRESH_STEPS = 50
"""Steps that are sensed before a landing is decided again."""


def check_open(parts: Parts, step: int, *, landed: bool) -> None:
    """Check that the budget may still be changed.

    Raises:
        LoopError: after the landing or the freeze, or where there is no budget.
    """
    if not parts.target.budgets:
        raise LoopError("this loop follows a Price or a Tolerance: it has no budget to change, attach with a Budget")
    reference = reference_of(parts.controller)
    if landed or reference.final(step, parts.total_steps):
        raise LoopError(
            f"the budget is frozen at step {step}: it may be changed until the landing, "
            f"by {reference.land:.0%} of the run at the latest. Finish this loop and attach a new one"
        )


def reference_of(controller: object) -> Reference:
    """The reference that a controller follows, or the usual one where it has none."""
    reference = getattr(controller, "reference", None)
    return reference if isinstance(reference, Reference) else Reference()


def with_budget(
    parts: Parts, budget: Budget | Sequence[Budget], account: Account, groups: tuple[Group, ...], step: int
) -> Parts:
    """The parts with another budget.

    Raises:
        BudgetError: when it cannot be met, or is on a resource that this run does not know.
    """
    budgets = check_budgets(budget)
    if parts.sparsity is not None:
        check_resources(budgets)
    metered = {each.resource for each in parts.target.budgets} & set(METERED)
    for each in budgets:
        if each.resource not in parts.costs or (each.resource in METERED and each.resource not in metered):
            raise BudgetError(
                f"{each.resource!r} was not costed out when this loop was attached: "
                "change to a budget of 'flops', 'params', or a resource that attach was given"
            )
    target = Target(budgets, parts.costs, widths_of(parts.groups), reference=reference_of(parts.controller))
    target.learn(parts.target)
    for each in budgets:
        cost, widths = parts.costs[each.resource], widths_of(parts.groups)
        dense = target.expected(each.resource, widths)
        check_reachable(each, dense, cheapest(cost, groups) * dense / cost.total(widths))
    changed = replace(parts, target=target)
    check_runs(changed, account, groups, step)
    return changed


def with_total_steps(parts: Parts, total_steps: int, account: Account, groups: tuple[Group, ...], step: int) -> Parts:
    """The parts with another length of the run.

    Raises:
        BudgetError: when the budget of the run could not be met.
        ValueError: for a number that is not above the steps done.
    """
    if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps <= step:
        raise ValueError(f"total_steps must be an integer above the {step} steps done, got {total_steps!r}")
    changed = replace(parts, total_steps=total_steps)
    check_runs(changed, account, groups, step)
    return changed


def check_runs(parts: Parts, account: Account, groups: tuple[Group, ...], step: int) -> None:
    """Check that budgets of the whole run can be met from here.

    Raises:
        BudgetError: saying what is spent already, or what the least is.
    """
    widths = widths_of(groups)
    read_joules(parts, account, widths)
    spent = spent_so_far(parts, account)
    for name, run in parts.target.runs.items():
        present = parts.target.expected(name, widths)
        least = present * cheapest(parts.costs[name], groups) / parts.costs[name].total(widths)
        besides = 0.0
        if name == "flops":
            sensing = parts.sensor.flops(groups, parts.model)
            besides = overhead_to_come(parts, account, step, widths, sensing, deciding=False)
        run.check(parts.total_steps, step=step, spent=spent[name], present=present, cheapest=least, besides=besides)


def go_on_with(loop: Loop, parts: Parts) -> None:
    """Let a loop go on with these parts: without a bump, and without a landing that holds for other ones.

    Args:
        loop: that runs.
        parts: from `with_budget` or `with_total_steps`.
    """
    loop._parts = parts
    if loop._landed and parts.target.runs:
        _reopen(loop)
    replan(parts, loop._account, loop._step, loop.widths)
    cost, limit = parts.target.cost, parts.target.limits
    if parts.target.budgets and isinstance(parts.controller, Transferring):
        loop._controller_state = parts.controller.transferred(
            loop._controller_state,
            step=loop._step,
            total_steps=parts.total_steps,
            present=cost.total(loop.widths),
            limit=limit[cost.resource],
        )


def reopen_if_over(loop: Loop) -> None:
    """After a landing, where a decision would be due: decide again if meters say that the run will be over its budget.

    Args:
        loop: that has landed.
    """
    parts, account, step = loop._parts, loop._account, loop._step
    if not parts.target.runs.keys() & set(METERED) or not parts.controller.due(step, parts.total_steps):
        return
    with account.deciding:
        metered_at(parts, account, loop.widths)
        replan(parts, account, step, loop.widths)
        coming = forecast(parts, account, step, loop.widths)
    if any(coming[name] > run.limit(parts.total_steps) for name, run in parts.target.runs.items()):
        _reopen(loop)


def _reopen(loop: Loop) -> None:
    """Take a landing back, and decide again once some fresh steps have been sensed."""
    if loop._plan is not None:
        loop._landed, loop._plan = False, replace(loop._plan, landed=False)
        loop._again = loop._step + max(1, min(_FRESH_STEPS, (loop._parts.total_steps - loop._step) // 10))
