"""What few runs need: another budget or length on the way, and budgets of a model that was cut before."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from setpoint.actuator.model_shapes import was_cut
from setpoint.checkpoint.fit import at_dense_shapes
from setpoint.controller.selection import cheapest
from setpoint.cost.budget import METERED, Budget, parse_budget
from setpoint.cost.cost import Cost, flops_cost
from setpoint.errors import BudgetError, LoopError
from setpoint.groups.example import Example
from setpoint.groups.group import Group, widths_of
from setpoint.groups.trace import trace_step
from setpoint.messages import counted, plain_number, warn
from setpoint.spending.checks import check_budgets, check_reachable, check_run, split_bill
from setpoint.spending.spending import Spending


def change_budget(spending: Spending, wanted: Any, groups: tuple[Group, ...], step: int, *, budget_met: bool) -> None:
    if not spending.budgets:
        raise LoopError("this loop follows a Price or a Tolerance: it has no budget to change, attach with a Budget")
    # What is met by a first cut leaves most of the run for another budget.
    if (budget_met and not spending.schedule.first) or spending.schedule.final(step, spending.planned_steps):
        raise LoopError(
            f"the budget is frozen at step {step:,}: it may be changed until it is met, and before step "
            f"{max(1, round(spending.schedule.land * spending.planned_steps)):,}. Finish this loop and attach a new one"
        )
    budgets, bill = split_bill(check_budgets(parse_budget(wanted)))
    if bill:
        raise BudgetError("the run budget is fixed at attach: change the budgets per step alone")
    spending.check_kind(budgets)
    metered = {budget.resource for budget in spending.budgets} & set(METERED)
    for budget in budgets:
        name = budget.resource
        if name not in spending.costs or (name in METERED and name not in metered):
            raise BudgetError(
                f"{name!r} was not costed out when this loop was attached: "
                "change to a budget of 'flops', 'params', or a resource that attach was given"
            )
    changed = copy.copy(spending)  # so that a refused budget changes nothing
    changed.hold(budgets, groups)
    for budget in budgets:
        name = budget.resource
        lowest = cheapest(spending.costs[name], groups) * changed.limits.factor(name)
        present = changed.limits.expected(name, spending.dense_widths)
        check_reachable(budget, changed.limits.original.get(name, present), lowest)
    check_run(changed, step, changed.planned_steps, groups)
    spending.hold(budgets, groups)


def change_total_steps(spending: Spending, total_steps: int, groups: tuple[Group, ...], step: int) -> None:
    """Give the run another length, if no bill says how long it is, and its budgets can still be met."""
    if spending.bill:
        raise LoopError(
            f"the run budget decides the length of the run, {counted(spending.run_steps, 'step')} as planned now: to "
            "set it yourself, attach without the budget per run"
        )
    total_steps = plain_number(total_steps)
    if type(total_steps) is not int or total_steps <= step:
        raise ValueError(f"total_steps must be an integer above the {counted(step, 'step')} done, got {total_steps!r}")
    check_run(spending, step, total_steps, groups)
    spending.total_steps = total_steps


def original_costs(
    model: nn.Module,
    example: Example,
    budgets: Sequence[Budget],
    costs: Mapping[str, Cost],
    widths: Mapping[str, int],
    passes: int = 1,
) -> dict[str, float]:
    """FLOPs and parameters before the first cut, by resource; nothing for a model that was never cut.

    A fraction of what only a measurement of the dense model would tell is refused. An optimizer step calls the model
    `passes` times.
    """
    if not was_cut(model):
        return {}
    for budget in budgets:
        if budget.relative and budget.resource in METERED:
            raise BudgetError(
                f"the model was cut before, so the {budget.resource} of the dense model are not known, and a fraction "
                f"of {budget.limit:g} has no meaning: give Budget.total(..., of={budget.resource!r})"
            )
    with at_dense_shapes(model):
        found = trace_step(model, example, passes)
        flops = flops_cost(found).total(widths_of(found.groups))
        original = {"flops": flops, "params": float(sum(parameter.numel() for parameter in model.parameters()))}
    per_step = [budget for budget in budgets if budget.per == "step" and budget.resource in original]
    present = {budget.resource: costs[budget.resource].total(widths) for budget in per_step}
    if present and all(budget.absolute(original[budget.resource]) >= present[budget.resource] for budget in per_step):
        shares = [f"{value / original[name]:.1%} of the dense {name}" for name, value in present.items()]
        warn(
            f"the model was cut before and takes {' and '.join(shares)}, which is within the budget: nothing more is "
            "cut for it"
        )
    return original
