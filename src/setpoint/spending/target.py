"""A target: the budgets of a run, and the one cost that the controller is given to hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from setpoint.controller.schedule import Schedule
from setpoint.cost.budget import METERED, Budget
from setpoint.cost.cost import Cost
from setpoint.cost.joint import JointCost, Share
from setpoint.spending.run_budget import RunBudget

_WAVER = 0.003
"""Share of a run budget that is left where a meter tells what is spent."""


class Target:
    """What a run is held to, by prediction alone.

    Without any budget (`Price`, `Tolerance`) the controller sees the cost of a resource and no limit. With one
    budget it sees that budget's cost; with several, the largest share of a limit that is spent (`JointCost`),
    whose limit is 1.

    Args:
        costs: by resource.
        schedule: when decisions are made, for budgets of a whole run.
        resource: what is saved where there is no budget.
        original: by resource, what a step took before the model was ever cut, where an earlier run has cut it: a
            fraction is one of that.
    """

    def __init__(
        self,
        budgets: Sequence[Budget],
        costs: Mapping[str, Cost],
        dense_widths: Mapping[str, int],
        schedule: Schedule,
        resource: str = "flops",
        original: Mapping[str, float] | None = None,
    ) -> None:
        self.budgets, self.original = tuple(budgets), dict(original or {})
        self.costs, self._dense_widths = costs, dense_widths
        self._schedule, self._resource = schedule, resource
        self._dense = {name: cost.total(dense_widths) for name, cost in costs.items()} | self.original
        self._limit = {each.resource: each.absolute(self._dense[each.resource]) for each in budgets}
        self.runs = dict[str, RunBudget]()
        for name, each in ((each.resource, each) for each in budgets if each.per == "run"):
            self.runs[name] = RunBudget(each, schedule, self._dense[name], _WAVER if name in METERED else 0.0)
            self._limit[name] = self._dense[name]

    def anew(self, budgets: Sequence[Budget]) -> Target:
        """The same of other budgets, with what is known of the run."""
        return Target(budgets, self.costs, self._dense_widths, self._schedule, self._resource, self.original)

    @property
    def cost(self) -> Cost:
        """What the controller is to hold."""
        if not self.budgets:
            return self.costs[self._resource]
        if len(self.budgets) == 1:
            return self.costs[self.budgets[0].resource]
        return JointCost([Share(self.costs[name], limit, self.factor(name)) for name, limit in self._limit.items()])

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
        return self.factor(name) * self.costs[name].total(widths)

    @property
    def metered(self) -> frozenset[str]:
        """Resources that a meter has read so far."""
        return frozenset()

    def dense_cost(self, name: str) -> float:
        """Dense cost of a resource, by all that is known."""
        return self._dense[name]

    def take_in(self, widths: Mapping[str, int]) -> tuple[dict[str, float], dict[str, float]]:
        """What meters read at these widths, and what the controller learns of it."""
        return {}, {}

    def replan(self, step: int, total_steps: int, *, spent: Mapping[str, float], widths: Mapping[str, int]) -> None:
        """Find afresh what budgets of the whole run leave for each step, given what was spent by resource."""
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
        """By resource of each budget the price that a plan was made at, at these widths."""
        cost = self.cost
        if isinstance(cost, JointCost) and "joint" in values:
            return cost.prices(values["joint"], widths)
        return dict(values)

    def state_dict(self) -> dict[str, Any]:
        """What the run has made of its limits, in plain numbers."""
        return {"limit": dict(self._limit)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the limits of then."""
        self._limit = {name: float(state["limit"][name]) for name in self._limit}
