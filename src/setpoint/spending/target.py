"""A target: the budgets of a run, and the one cost that the controller is given to hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from setpoint.controller.reference import Reference
from setpoint.cost.budget import IN_SECONDS, METERED, MILLISECONDS, Budget, amount
from setpoint.cost.cost import Cost
from setpoint.cost.joint import JointCost, Share
from setpoint.errors import BudgetError
from setpoint.spending.run_budget import RunBudget

_WAVER = 0.003
"""Share of a run budget that is left where a meter tells what is spent."""


def check_budgets(budget: Budget | Sequence[Budget]) -> tuple[Budget, ...]:
    """The budgets of a run: at least one, each of another resource.

    Raises:
        BudgetError: for anything else, or a budget that is not available in this version.
    """
    budgets = tuple(budget) if isinstance(budget, (list, tuple)) else (budget,)
    for each in budgets:
        if not isinstance(each, Budget):
            raise BudgetError(f"budget must be a Budget, got {each!r}: write Budget.fraction(0.5, of='flops')")
        if each.per == "run" and each.resource not in ("flops", "latency", "energy"):
            raise BudgetError(
                f"a run spends 'flops', seconds ('latency') and 'energy', there is no budget per run of "
                f"{each.resource!r}: use per='step', the finished model's cost"
            )
    if not budgets or len({each.resource for each in budgets}) < len(budgets):
        raise BudgetError(f"give one budget for each resource, and at least one, got {list(budgets)}")
    if len(budgets) > 1 and any(each.per == "run" for each in budgets):
        raise BudgetError("a budget per run stands alone in this version: give it without others")
    return budgets


def check_reachable(budget: Budget, dense: float, least: float) -> None:
    """Check that a budget can be met, and that it is in the right unit.

    Args:
        budget: what is asked for.
        dense: predicted dense cost.
        least: predicted cost of the narrowest model.

    Raises:
        BudgetError: saying what the least is, or what unit is meant.
    """
    limit, resource = budget.absolute(dense), budget.resource
    if budget.per == "run":
        return  # RunBudget.check knows what a run spends
    if limit < least:
        raise BudgetError(
            f"a budget of {amount(limit, resource)} ({limit / dense:.1%} of dense) cannot be reached: with every "
            f"group at its min_units the model still needs {amount(least, resource)} ({least / dense:.1%}). Ask for "
            f"at least Budget.fraction({math.ceil(1000 * least / dense) / 1000:g}, of={resource!r})"
        )
    if resource in IN_SECONDS and limit > MILLISECONDS * dense:
        raise BudgetError(
            f"a budget of {limit:g} seconds per {'step' if resource == 'latency' else 'inference'} is "
            f"{limit / dense:,.0f} times what the dense model takes ({dense:.3g} s): {resource} is in seconds. "
            f"If you mean milliseconds, write Budget.total({limit / 1000:g}, of={resource!r})"
        )


class Target:
    """What a run is held to, by prediction alone.

    Without any budget (`Price`, `Tolerance`) the controller sees the cost of a resource and no limit. With one
    budget it sees that budget's cost; with several, the largest share of a limit that is spent (`JointCost`),
    whose limit is 1.

    Args:
        budgets: each of another resource; none where a price or a tolerance is followed.
        costs: by resource.
        dense_widths: units by group, of the dense model.
        schedule: when decisions are made, for budgets of a whole run.
        resource: what is saved where there is no budget.
    """

    def __init__(
        self,
        budgets: Sequence[Budget],
        costs: Mapping[str, Cost],
        dense_widths: Mapping[str, int],
        schedule: Reference,
        resource: str = "flops",
    ) -> None:
        self.budgets = tuple(budgets)
        self._costs, self._dense_widths = costs, dense_widths
        self._schedule, self._resource = schedule, resource
        self._dense = {name: cost.total(dense_widths) for name, cost in costs.items()}
        self._limit = {each.resource: each.absolute(self._dense[each.resource]) for each in budgets}
        self.runs = {
            each.resource: RunBudget(
                each, schedule, self._dense[each.resource], _WAVER if each.resource in METERED else 0.0
            )
            for each in budgets
            if each.per == "run"
        }
        for name in self.runs:
            self._limit[name] = self._dense[name]

    def anew(self, budgets: Sequence[Budget]) -> Target:
        """The same of other budgets, with what is known of the run."""
        return Target(budgets, self._costs, self._dense_widths, self._schedule, self._resource)

    @property
    def cost(self) -> Cost:
        """What the controller is to hold."""
        if not self.budgets:
            return self._costs[self._resource]
        if len(self.budgets) == 1:
            return self._costs[self.budgets[0].resource]
        return JointCost([Share(self._costs[name], limit, self.factor(name)) for name, limit in self._limit.items()])

    @property
    def dense(self) -> dict[str, float]:
        """Predicted dense cost by resource, with what the controller is to hold."""
        return {**self._dense, self.cost.resource: self.cost.total(self._dense_widths)}

    @property
    def limit(self) -> dict[str, float]:
        """Limit by resource of each budget, in its own unit."""
        return dict(self._limit)

    @property
    def limits(self) -> dict[str, float]:
        """What the controller is to hold."""
        return dict(self._limit) if len(self.budgets) <= 1 else {**self._limit, "joint": 1.0}

    def factor(self, name: str) -> float:
        """Cost of a resource as metered / as predicted."""
        return 1.0

    def expected(self, name: str, widths: Mapping[str, int]) -> float:
        """Cost of a step at these widths, by all that is known."""
        return self.factor(name) * self._costs[name].total(widths)

    @property
    def metered(self) -> frozenset[str]:
        """Resources that a meter has read so far."""
        return frozenset()

    def dense_cost(self, name: str) -> float:
        """Dense cost of a resource, by all that is known."""
        return self._dense[name]

    def take_in(self, widths: Mapping[str, int]) -> tuple[dict[str, float], dict[str, float]]:
        """What meters read at these widths, and what the controller is told of it."""
        return {}, {}

    def replan(self, step: int, total_steps: int, *, spent: Mapping[str, float], widths: Mapping[str, int]) -> None:
        """Find afresh what budgets of the whole run leave for each step.

        Args:
            step: optimizer steps done.
            total_steps: of the run.
            spent: so far, by resource.
            widths: present widths.
        """
        for name, run in self.runs.items():
            present = self.expected(name, widths)
            limit = run.per_step(step, total_steps, spent=spent[name], present=present)
            self._limit[name] = limit if step < total_steps else max(limit, present)  # then a cut saves nothing

    def binding(self, widths: Mapping[str, int]) -> str:
        """Resource of the budget that leads."""
        cost = self.cost
        return cost.binding(widths).cost.resource if isinstance(cost, JointCost) else cost.resource

    def references(self, values: Mapping[str, float]) -> dict[str, float]:
        """By resource of each budget what a plan's reference allows: one in shares is that share of each limit."""
        if len(self.budgets) <= 1 or "joint" not in values:
            return dict(values)
        return {name: values["joint"] * limit for name, limit in self._limit.items()}

    def prices(self, values: Mapping[str, float], widths: Mapping[str, int]) -> dict[str, float]:
        """By resource of each budget the price that a plan was made at, at these widths.

        A price per share is one per unit of the budget that binds; that of a budget with room is 0.
        """
        cost = self.cost
        if not isinstance(cost, JointCost) or "joint" not in values:
            return dict(values)
        binding = cost.binding(widths)
        per_unit = values["joint"] * binding.factor / binding.limit
        return {share.cost.resource: per_unit if share is binding else 0.0 for share in cost.shares}

    def state_dict(self) -> dict[str, Any]:
        """What the run has made of its limits, in plain numbers."""
        return {"limit": dict(self._limit)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the limits of then.

        Args:
            state: from `state_dict` of a target of the same budgets.
        """
        self._limit = {name: float(state["limit"][name]) for name in self._limit}
