"""Checks of budgets: whether they go together, and whether any model meets them."""

import math
from collections.abc import Callable
from typing import Any

from setpoint.controller.selection import cheapest
from setpoint.cost.budget import IN_SECONDS, MILLISECONDS, Budget, Price, Tolerance, amount
from setpoint.errors import BudgetError
from setpoint.groups.group import Group, widths_of
from setpoint.messages import warn
from setpoint.spending.spending import Spending


def check_budgets(goals: Any) -> tuple[Budget, ...]:
    """The budgets of a run: at least one, each of another resource; anything else is refused."""
    budgets = tuple(goals) if isinstance(goals, (list, tuple)) else (goals,)
    for budget in budgets:
        if isinstance(budget, (Price, Tolerance)):
            raise BudgetError(f"{budget!r} stands alone: attach with it, and with no other budget")
        if not isinstance(budget, Budget):
            raise BudgetError(f"budget must be a number, a text or a Budget, got {budget!r}: write 0.5 or '50% flops'")
        if budget.per == "run" and budget.resource not in ("flops", "latency", "energy"):
            raise BudgetError(
                f"a run spends 'flops', seconds ('latency') and 'energy', there is no budget per run of "
                f"{budget.named!r}: use per='step', the finished model's cost"
            )
    if not budgets or len({(budget.resource, budget.per) for budget in budgets}) < len(budgets):
        one = "; one run has one runtime" if [each.resource for each in budgets].count("inference") > 1 else ""
        named = ", ".join(each.named for each in budgets) or "none"
        raise BudgetError(f"give one budget for each resource, and at least one, got {named}{one}")
    runs = [budget.resource for budget in budgets if budget.per == "run"]
    if len(budgets) > 1 and runs and runs != ["flops"]:
        raise BudgetError(
            f"together with budgets per step a budget per run is of 'flops' in this version, got {' and '.join(runs)}"
        )
    return budgets


def split_bill(budgets: tuple[Budget, ...]) -> tuple[tuple[Budget, ...], Budget | None]:
    """The budgets that the controller is held to, and the bill that decides the run's length, if there is one."""
    per_step = tuple(budget for budget in budgets if budget.per == "step")
    if not per_step or len(per_step) == len(budgets):
        return budgets, None
    return per_step, next(budget for budget in budgets if budget.per == "run")


def check_reachable(budget: Budget, dense: float, lowest: float, unpruned: Callable[[], str] = str) -> None:
    """Refuse a budget that cannot be met or is in a wrong unit; `unpruned` says what makes the lowest cost so high."""
    limit, resource = budget.absolute(dense), budget.resource
    if budget.per == "run":
        return  # `check_run` knows what a run spends
    if limit < lowest:
        why = unpruned()
        share = min(1.0, lowest / dense * (1.05 if resource in IN_SECONDS else 1.0))  # the next fit is another one
        advice = f"Ask for at least {_percent(share, math.ceil).replace(' ', '')} {budget.named}"
        if share >= 0.99:
            advice = "Narrower layers save next to nothing of it"
            if resource not in ("flops", "params") and not why:  # layers that stay cost FLOPs as well
                advice += ": hold the model to a budget of 'flops' or 'params'"
        raise BudgetError(
            f"a budget of {amount(limit, resource)} ({_percent(limit / dense)} of dense) cannot be reached: with every "
            f"layer at its narrowest the model still needs {amount(lowest, resource)} ({_percent(lowest / dense)})"
            f"{why}. {advice}"
        )
    if resource in IN_SECONDS and limit > MILLISECONDS * dense:
        raise BudgetError(
            f"a budget of {amount(limit, resource)} per {'step' if resource == 'latency' else 'inference'} is "
            f"{limit / dense:,.0f} times what the dense model takes, so nothing would be cut: ask for less than "
            f"{amount(dense, resource)}. A number without a unit is in seconds"
        )
    if limit > dense * (1.0 if resource in ("flops", "params") else 1.5):  # seconds and bytes are measured
        warn(
            f"the budget of {amount(limit, resource)} is above the {amount(dense, resource)} of the dense model, so "
            "nothing will be cut: ask for less than the dense model takes"
        )


def check_run(spending: Spending, step: int, total_steps: int, groups: tuple[Group, ...]) -> None:
    """Refuse budgets of the run that cannot be met from here, with these groups at their present widths."""
    if spending.bill is not None:
        spending.bill.check(spending.account)
    widths = widths_of(groups)
    spending.read_joules(widths)
    for name, run in spending.runs(step, widths, total_steps).items():
        cost = spending.costs[name]
        run.check(run.present * cheapest(cost, groups) / cost.total(widths))


def run_facts(spending: Spending) -> dict[str, Any]:
    """What a run that is resumed must share with the one before, and all ranks with each other."""
    dense, bills = spending.limits.dense, () if spending.bill is None else (spending.bill.budget,)
    return {
        "dense": {name: dense[name] for name in ("flops", "params")},  # others are fitted to this machine
        "budgets": [(b.resource, float(b.limit), b.per, b.relative) for b in (*spending.budgets, *bills)],
        "total_steps": spending.total_steps,
    }


def _percent(share: float, rounded: Callable[[float], float] = round) -> str:
    """A share in percent with at least two significant digits: 0.000135 is "0.014 %"."""
    decimals = max(1, 1 - math.floor(math.log10(100 * share)))
    return f"{rounded(100 * share * 10**decimals) / 10**decimals:.{decimals}f} %"
