"""Checks of budgets: whether they go together, whether any model meets them, and whether they may still be changed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from setpoint.actuator.model_shapes import was_cut
from setpoint.arguments import plain_number
from setpoint.controller.selection import cheapest
from setpoint.cost.budget import IN_SECONDS, METERED, MILLISECONDS, Budget, Price, Tolerance, amount
from setpoint.cost.cost import Cost, flops_cost
from setpoint.cost.parse import parse_budget
from setpoint.errors import BudgetError, LoopError
from setpoint.groups.example import Example
from setpoint.groups.group import Group, widths_of
from setpoint.groups.trace import repeated, trace
from setpoint.messages import counted, warn
from setpoint.spending.spending import Spending


def check_budgets(goals: Any) -> tuple[Budget, ...]:
    """The budgets of a run: at least one, each of another resource; anything else is refused."""
    budgets = tuple(goals) if isinstance(goals, (list, tuple)) else (goals,)
    for budget in budgets:
        if isinstance(budget, (Price, Tolerance)):
            raise BudgetError(f"{budget!r} stands alone: attach with it, and with no budget beside it")
        if not isinstance(budget, Budget):
            raise BudgetError(f"budget must be a number, a text or a Budget, got {budget!r}: write 0.5 or '50% flops'")
        if budget.per == "run" and budget.resource not in ("flops", "latency", "energy"):
            raise BudgetError(
                f"a run spends 'flops', seconds ('latency') and 'energy', there is no budget per run of "
                f"{budget.resource!r}: use per='step', the finished model's cost"
            )
    if not budgets or len({(budget.resource, budget.per) for budget in budgets}) < len(budgets):
        raise BudgetError(f"give one budget for each resource, and at least one, got {list(budgets)}")
    runs = [budget.resource for budget in budgets if budget.per == "run"]
    if len(budgets) > 1 and runs and runs != ["flops"]:
        raise BudgetError(
            f"beside budgets per step a budget per run is one of 'flops' in this version, got {' and '.join(runs)}"
        )
    return budgets


def split_bill(budgets: tuple[Budget, ...]) -> tuple[tuple[Budget, ...], Budget | None]:
    """The budgets that the controller is held to, and the bill that decides the run's length, if there is one."""
    per_step = tuple(budget for budget in budgets if budget.per == "step")
    if not per_step or len(per_step) == len(budgets):
        return budgets, None
    if any(budget.resource == "inference" for budget in per_step):
        raise BudgetError(
            "a bill cannot be kept beside a budget of inference: each decision times forward passes, as many as the "
            "clock asks for. Leave the bill out, and give the number of steps"
        )
    return per_step, next(budget for budget in budgets if budget.per == "run")


def _percent(share: float, rounded: Callable[[float], float] = round) -> str:
    """A share in percent with at least two significant digits.

    >>> _percent(0.3641), _percent(0.000135, math.ceil)
    ('36.4 %', '0.014 %')
    """
    decimals = max(1, 1 - math.floor(math.log10(100 * share)))
    return f"{rounded(100 * share * 10**decimals) / 10**decimals:.{decimals}f} %"


def check_reachable(budget: Budget, dense: float, lowest: float) -> None:
    """Refuse a budget that cannot be met or is in a wrong unit, given costs of the dense and of the narrowest model."""
    limit, resource = budget.absolute(dense), budget.resource
    if budget.per == "run":
        return  # RunBudget.check knows what a run spends
    if limit < lowest:
        advice = f"Ask for at least '{_percent(lowest / dense, math.ceil).replace(' ', '')} {resource}'"
        if lowest >= 0.99 * dense:
            advice = "Narrower layers save next to nothing of it: hold the model to a budget of 'flops' or 'params'"
        raise BudgetError(
            f"a budget of {amount(limit, resource)} ({_percent(limit / dense)} of dense) cannot be reached: with every "
            f"layer at its narrowest the model still needs {amount(lowest, resource)} ({_percent(lowest / dense)}). "
            f"{advice}"
        )
    if resource in IN_SECONDS and limit > MILLISECONDS * dense:
        raise BudgetError(
            f"a budget of {amount(limit, resource)} per {'step' if resource == 'latency' else 'inference'} is "
            f"{limit / dense:,.0f} times what the dense model takes, so nothing would be cut: ask for less than "
            f"{amount(dense, resource)}. If you gave a number without a unit, it is in seconds, and '8 ms {resource}' "
            "in milliseconds"
        )
    if limit > dense * (1.0 if resource in ("flops", "params") else 1.5):  # seconds and bytes are measured
        warn(
            f"the budget of {amount(limit, resource)} is above the {amount(dense, resource)} of the dense model, so "
            "nothing will be cut: ask for less than the dense model takes"
        )


def original_costs(
    model: nn.Module,
    example: Example,
    budgets: Sequence[Budget],
    costs: Mapping[str, Cost],
    widths: Mapping[str, int],
    passes: int = 1,
) -> dict[str, float]:
    """FLOPs and parameters before the first cut, by resource; nothing for a model that was never cut.

    A fraction of what only a measurement of the dense model would tell is refused.

    Args:
        costs: by resource, over the present widths.
        passes: calls of the model in one optimizer step.
    """
    if not was_cut(model):
        return {}
    for budget in budgets:
        if budget.relative and budget.resource in METERED:
            raise BudgetError(
                f"the model was cut before, so the {budget.resource} of the dense model are not known, and a fraction "
                f"of {budget.limit:g} has no meaning: give Budget.total(..., of={budget.resource!r})"
            )
    from setpoint.checkpoint.fit import at_dense_shapes  # late: few models were cut before

    with at_dense_shapes(model):
        found = repeated(trace(model, example), passes)
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


def check_open(spending: Spending, step: int, *, budget_met: bool) -> None:
    """Refuse another budget once the budget is met or frozen, or where there is none."""
    if not spending.budgets:
        raise LoopError("this loop follows a Price or a Tolerance: it has no budget to change, attach with a Budget")
    if budget_met or spending.schedule.final(step, spending.planned_steps):
        raise LoopError(
            f"the budget is frozen at step {step:,}: it may be changed until it is met, and before step "
            f"{max(1, round(spending.schedule.land * spending.planned_steps)):,}. Finish this loop and attach a new one"
        )


def change_budget(spending: Spending, wanted: Any, groups: tuple[Group, ...], step: int) -> None:
    """Hold the run to another budget, in any form that `attach` takes."""
    budgets, bill = split_bill(check_budgets(parse_budget(wanted)))
    if bill:
        raise BudgetError("the bill of a run is fixed at attach: change the budgets per step alone")
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
        cost, name = spending.costs[budget.resource], budget.resource
        present = changed.limits.expected(name, spending.dense_widths)
        lowest = cheapest(cost, groups) * present / cost.total(spending.dense_widths)
        check_reachable(budget, changed.limits.original.get(name, present), lowest)
    changed.check_run(step, changed.planned_steps, groups)
    spending.hold(budgets, groups)


def change_total_steps(spending: Spending, total_steps: int, groups: tuple[Group, ...], step: int) -> None:
    """Give the run another length, if no bill says how long it is, and its budgets can still be met."""
    if spending.bill:
        raise LoopError(
            f"the bill of the run says how long it is, {counted(spending.run_steps, 'step')} as planned now: to say it "
            "yourself, attach without the budget per run"
        )
    total_steps = plain_number(total_steps)
    if type(total_steps) is not int or total_steps <= step:
        raise ValueError(f"total_steps must be an integer above the {counted(step, 'step')} done, got {total_steps!r}")
    spending.check_run(step, total_steps, groups)
    spending.set_length(total_steps)
