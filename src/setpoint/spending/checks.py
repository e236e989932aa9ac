"""Checks of budgets: whether they go together, and whether any model meets them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

from setpoint.cost.budget import IN_SECONDS, METERED, MILLISECONDS, Budget, amount
from setpoint.cost.price import Price
from setpoint.cost.tolerance import Tolerance
from setpoint.errors import BudgetError
from setpoint.messages import warn


def check_budgets(budget: Any) -> tuple[Budget, ...]:
    """The budgets of a run: at least one, each of another resource.

    Raises:
        BudgetError: for anything else, or a budget that is not available in this version.
    """
    budgets = tuple(budget) if isinstance(budget, (list, tuple)) else (budget,)
    for each in budgets:
        if isinstance(each, (Price, Tolerance)):
            raise BudgetError(f"{each!r} stands alone: attach with it, and with no budget beside it")
        if not isinstance(each, Budget):
            raise BudgetError(f"budget must be a number, a text or a Budget, got {each!r}: write 0.5 or '50% flops'")
        if each.per == "run" and each.resource not in ("flops", "latency", "energy"):
            raise BudgetError(
                f"a run spends 'flops', seconds ('latency') and 'energy', there is no budget per run of "
                f"{each.resource!r}: use per='step', the finished model's cost"
            )
    if not budgets or len({(each.resource, each.per) for each in budgets}) < len(budgets):
        raise BudgetError(f"give one budget for each resource, and at least one, got {list(budgets)}")
    runs = [each.resource for each in budgets if each.per == "run"]
    if len(budgets) > 1 and runs and runs != ["flops"]:
        raise BudgetError(
            f"beside budgets per step a budget per run is one of 'flops' in this version, got {' and '.join(runs)}"
        )
    return budgets


def with_bill(budgets: tuple[Budget, ...]) -> tuple[tuple[Budget, ...], Budget | None]:
    """The budgets that the controller is held to, and the bill that decides the run's length, if there is one.

    Raises:
        BudgetError: for a bill beside a budget for which decisions spend what is not known before.
    """
    per_step = tuple(each for each in budgets if each.per == "step")
    if not per_step or len(per_step) == len(budgets):
        return budgets, None
    if any(each.resource == "inference" for each in per_step):
        raise BudgetError(
            "a bill cannot be kept beside a budget of inference: each decision times forward passes, as many as the "
            "clock asks for. Leave the bill out, and give the number of steps"
        )
    return per_step, next(each for each in budgets if each.per == "run")


def check_costed(budgets: Sequence[Budget], resources: Collection[str], before: Sequence[Budget]) -> None:
    """Check that budgets that replace those of `before` are on resources that the run can predict and meter.

    Raises:
        BudgetError: for one that was not costed out at attach.
    """
    metered = {each.resource for each in before} & set(METERED)
    for each in budgets:
        if each.resource not in resources or (each.resource in METERED and each.resource not in metered):
            raise BudgetError(
                f"{each.resource!r} was not costed out when this loop was attached: "
                "change to a budget of 'flops', 'params', or a resource that attach was given"
            )


def _percent(share: float, rounded: Callable[[float], float] = round) -> str:
    """A share in percent with at least two significant digits.

    >>> _percent(0.3641), _percent(0.000135, math.ceil)
    ('36.4 %', '0.014 %')
    """
    decimals = max(1, 1 - math.floor(math.log10(100 * share)))
    return f"{rounded(100 * share * 10**decimals) / 10**decimals:.{decimals}f} %"


_NOTHING_TO_SAVE = 0.99


def check_reachable(budget: Budget, dense: float, least: float) -> None:
    """Check that a budget can be met and is in the right unit, given predicted costs, dense and of the narrowest model.

    Raises:
        BudgetError: saying what the least is, or what unit is meant.
    """
    limit, resource = budget.absolute(dense), budget.resource
    if budget.per == "run":
        return  # RunBudget.check knows what a run spends
    if limit < least:
        advice = f"Ask for at least '{_percent(least / dense, math.ceil).replace(' ', '')} {resource}'"
        if least >= _NOTHING_TO_SAVE * dense:
            advice = (
                "Narrower layers save next to nothing of it here: hold the model to a budget of 'flops' or 'params'"
            )
        raise BudgetError(
            f"a budget of {amount(limit, resource)} ({_percent(limit / dense)} of dense) cannot be reached: with every "
            f"layer at its narrowest the model still needs {amount(least, resource)} ({_percent(least / dense)}). "
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
