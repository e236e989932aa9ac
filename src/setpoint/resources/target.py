"""A target: the budgets of a run, and the one cost that the controller is given to hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from setpoint.controller.plan import Observation, Plan
from setpoint.controller.reference import Reference
from setpoint.cost.budget import IN_SECONDS, MILLISECONDS, Budget, amount
from setpoint.cost.cost import Cost
from setpoint.cost.joint import JointCost, Share
from setpoint.errors import BudgetError
from setpoint.loop.metering import METERED
from setpoint.loop.run_budget import RunBudget

_TRUST = 0.6
"""How far the factor of a joint cost follows a new reading, as far as the controller's PI part does."""
_SLACK = 0.03
"""How far a reading may rise above what is held in place of a limit out of reach, before anything is cut for it."""
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
    """What a run is held to.

    Without any budget (`Price`, `Tolerance`) the controller sees the cost of a resource and no limit. With one
    budget it sees that budget's cost; with several, the largest share of a limit that is spent (`JointCost`),
    whose limit is 1. A fraction is one of the dense cost as predicted until a meter has read the dense model,
    and of the last reading of that model from there on.

    Args:
        budgets: at least one, each of another resource.
        costs: by resource.
        dense_widths: units by group, of the dense model.
        reference: the controller's, for budgets of a whole run.
        resource: what is saved where there is no budget.
    """

    def __init__(
        self,
        budgets: Sequence[Budget],
        costs: Mapping[str, Cost],
        dense_widths: Mapping[str, int],
        *,
        reference: Reference | None = None,
        resource: str = "flops",
    ) -> None:
        self.budgets = tuple(budgets)
        self._resource = resource
        self._costs = costs
        self._dense_widths = dense_widths
        self._dense = {name: cost.total(dense_widths) for name, cost in costs.items()}
        self._limit = {each.resource: each.absolute(self._dense[each.resource]) for each in budgets}
        times = reference or Reference()
        self.runs = {
            each.resource: RunBudget(
                each, times, self._dense[each.resource], _WAVER if each.resource in METERED else 0.0
            )
            for each in budgets
            if each.per == "run"
        }
        for name in self.runs:
            self._limit[name] = self._dense[name]
        self._factor = dict.fromkeys([each.resource for each in budgets] or [resource], 1.0)
        self._metered_dense: dict[str, float] = {}
        self._first: dict[str, tuple[float, float]] = {}
        self._doubts: dict[str, int] = {}
        self._asked: dict[str, float] = {}
        self._whole = {each.resource for each in budgets if each.relative and each.limit == 1 and each.per == "step"}

    @property
    def cost(self) -> Cost:
        """What the controller is to hold."""
        if not self.budgets:
            return self._costs[self._resource]
        if len(self.budgets) == 1:
            return self._costs[self.budgets[0].resource]
        return JointCost([Share(self._costs[name], self._limit[name], self._factor[name]) for name in self._limit])

    @property
    def dense(self) -> dict[str, float]:
        """Predicted dense cost by resource, with what the controller is to hold."""
        return {**self._dense, self.cost.resource: self.cost.total(self._dense_widths)}

    @property
    def metered(self) -> frozenset[str]:
        """Resources that a meter has read so far."""
        return frozenset(self._metered_dense)

    @property
    def limit(self) -> dict[str, float]:
        """Limit by resource of each budget, in its own unit."""
        return {**self._limit, **self._asked}

    @property
    def limits(self) -> dict[str, float]:
        """What the controller is to hold: the limits, but what is there where one is out of reach."""
        return dict(self._limit) if len(self.budgets) <= 1 else {**self._limit, "joint": 1.0}

    def dense_cost(self, name: str) -> float:
        """Dense cost of a resource, by the last reading of the dense model where a meter has read it."""
        return self._metered_dense.get(name, self._dense[name])

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

    def most(
        self, step: int, total_steps: int, *, spent: Mapping[str, float], narrowest: Mapping[str, int], besides: float
    ) -> dict[str, float]:
        """By resource of budgets of the whole run, the most that a step may cost until the next decision.

        Args:
            step: optimizer steps done.
            total_steps: of the run.
            spent: so far, by resource.
            narrowest: widths of the narrowest model.
            besides: FLOPs that are spent besides steps from here on; what a meter reads has them in it.
        """
        return {
            name: run.most(
                step,
                total_steps,
                spent=spent[name],
                cheapest=self.expected(name, narrowest),
                besides=besides if name == "flops" else 0.0,
            )
            for name, run in self.runs.items()
        }

    def wait(
        self,
        plan: Plan,
        observation: Observation,
        *,
        spent: Mapping[str, float],
        sensing: float,
        deciding: float = 0.0,
    ) -> int:
        """Steps by which the last cut had better wait, so that the budget of the run is used up; 0 for none.

        Args:
            plan: that may be the last cut: one that lands, and any from the settle step on.
            observation: that it was made on.
            spent: so far, by resource.
            sensing: FLOPs of sensing per step; what a meter reads has it in it.
            deciding: FLOPs of each further decision, likewise.
        """
        if not plan.drops():
            return 0
        widths = dict(observation.widths)
        after = widths | {name: int(keep.sum()) for name, keep in plan.keep.items()}
        for name, units in plan.grow.items():
            after[name] += len(units)
        step, total_steps = observation.step, observation.total_steps
        waits = (
            run.wait(
                step,
                total_steps,
                spent=spent[name],
                present=self.expected(name, widths),
                after=self.expected(name, after),
                sensing=sensing if name == "flops" else 0.0,
                deciding=deciding if name == "flops" else 0.0,
            )
            for name, run in self.runs.items()
            if plan.landed or run.reference.settled(step, total_steps)
        )
        return min(waits, default=0)

    def binding(self, widths: Mapping[str, int]) -> str:
        """Resource of the budget that leads."""
        cost = self.cost
        return cost.binding(widths).cost.resource if isinstance(cost, JointCost) else cost.resource

    def read(self, metered: Mapping[str, float], widths: Mapping[str, int]) -> dict[str, float]:
        """Take meter readings at these widths in; returns them with that of what the controller is to hold.

        Args:
            metered: by resource; only those of a budget, price or tolerance count. All of the dense cost is what the
                dense model spends, however a meter wavers: a fraction of 1 is left to the prediction.
            widths: that were metered.
        """
        held = self._factor.keys() - self._whole
        seen = {name: value for name, value in metered.items() if name in held and value > 0}
        for name, value in seen.items():
            first, ratio = name not in self._metered_dense, value / self._costs[name].total(widths)
            at_dense = widths == self._dense_widths
            if first or at_dense:  # the first steps of a run are slow, so the last reading of the dense model counts
                self._first[name] = (self._costs[name].total(widths), value)
                self._anchor(name, ratio * self._dense[name], at_dense=at_dense)
            trust = 1.0 if first or name in self.runs else _TRUST
            self._factor[name] *= math.exp(trust * math.log(ratio / self._factor[name]))
        if len(self.budgets) > 1 and self._metered_dense:  # what no meter reads now is as the readings so far foretell
            shares = [
                seen.get(name, self._factor[name] * self._costs[name].total(widths)) / limit
                for name, limit in self._limit.items()
            ]
            return {**seen, "joint": max(shares)}
        return seen

    def least(self, name: str, seen: float, widths: Mapping[str, int], narrowest: Mapping[str, int]) -> float:
        """What the narrowest model would take by what cuts have saved, if anything that they have not saved stays.

        With the first reading `m0` at the predicted cost `p0` and the present `m` at `p`, what shrinks does so by
        `(m0 - m) / (p0 - p)` for each unit of predicted cost.

        Args:
            name: of the resource.
            seen: the present reading.
            widths: that it was read at.
            narrowest: widths of the narrowest model.
        """
        (predicted, first), now = self._first[name], self._costs[name].total(widths)
        slope = max(0.0, first - seen) / (predicted - now)
        return seen - slope * (now - self._costs[name].total(narrowest))

    def out_of_reach(
        self, metered: Mapping[str, float], widths: Mapping[str, int], narrowest: Mapping[str, int]
    ) -> list[str]:
        """Resources whose budget, as two readings in a row tell, no cut can meet.

        That is so where cuts that should have saved a tenth or more have saved less than half of that, and what is
        left to save (`least`) does not lead down to the limit.

        Args:
            metered: the present readings, none of them longer than it has to be.
            widths: that they were read at.
            narrowest: widths of the narrowest model.
        """
        found = []
        for name, limit in self._limit.items():
            if name not in metered or name not in self._first or name in self.runs or name in self._asked:
                continue
            (predicted, first), now = self._first[name], self._costs[name].total(widths)
            doubtful = (
                metered[name] > limit
                and now <= 0.9 * predicted
                and 1 - metered[name] / first < 0.5 * (1 - now / predicted)
                and self.least(name, metered[name], widths, narrowest) > limit
            )
            self._doubts[name] = self._doubts.get(name, 0) + 1 if doubtful else 0
            if self._doubts[name] >= 2:
                found.append(name)
        return found

    def hold(self, name: str, seen: float) -> None:
        """Have the controller hold what a meter reads now, since the limit is out of reach; it stays the one asked for.

        Args:
            name: of the resource.
            seen: the reading.
        """
        self._asked[name] = self._limit[name]
        self._limit[name] = seen * (1 + _SLACK)

    def _anchor(self, name: str, dense: float, *, at_dense: bool) -> None:
        """From here on the dense cost is what a meter has told of it; a fraction only once it has read that model."""
        self._metered_dense[name] = dense
        if name in self.runs:
            self.runs[name] = replace(self.runs[name], dense=dense)
        for each in self.budgets:
            if each.resource == name and each.relative and each.per == "step" and at_dense:
                self._limit[name] = each.absolute(dense)

    def learn(self, other: Target) -> None:
        """Go on with what meters have told another target of the same run.

        Args:
            other: of other budgets.
        """
        for name in (self._factor.keys() & other._metered_dense.keys()) - self._whole:
            self._factor[name] = other._factor[name]
            self._first[name] = other._first[name]
            self._anchor(name, other._metered_dense[name], at_dense=True)

    def state_dict(self) -> dict[str, Any]:
        """What meters have told so far, in plain numbers."""
        return {
            "limit": dict(self._limit),
            "factor": dict(self._factor),
            "dense": dict(self._metered_dense),
            "first": {name: list(pair) for name, pair in self._first.items()},
            "doubts": dict(self._doubts),
            "asked": dict(self._asked),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with what meters had told by then.

        Args:
            state: from `state_dict` of a target of the same budgets.
        """
        self._limit = {name: float(state["limit"][name]) for name in self._limit}
        self._factor = {name: float(state["factor"][name]) for name in self._factor}
        self._metered_dense = {str(name): float(value) for name, value in state["dense"].items()}
        self._first = {str(name): (float(p), float(m)) for name, (p, m) in state.get("first", {}).items()}
        self._doubts = {str(name): int(count) for name, count in state.get("doubts", {}).items()}
        self._asked = {str(name): float(value) for name, value in state.get("asked", {}).items()}
        self.runs = {
            name: replace(run, dense=self._metered_dense.get(name, run.dense)) for name, run in self.runs.items()
        }

    def expected(self, name: str, widths: Mapping[str, int]) -> float:
        """Cost that a meter is expected to read at these widths, by the readings so far."""
        return self._factor.get(name, 1.0) * self._costs[name].total(widths)

    def spread(
        self, values: Mapping[str, float], widths: Mapping[str, int], *, price: bool = False
    ) -> dict[str, float]:
        """By resource of each budget what a plan says of the joint cost; with one budget, as it is.

        A reference in shares is that share of each limit. A price per share is one per unit of the
        budget that binds; that of a budget with room is 0.

        Args:
            values: the plan's, by resource.
            widths: at which the price was found.
            price: whether they are prices.
        """
        cost = self.cost
        if not isinstance(cost, JointCost) or "joint" not in values:
            return dict(values)
        joint = values["joint"]
        if not price:
            return {name: joint * limit for name, limit in self._limit.items()}
        binding = cost.binding(widths)
        per_unit = joint * binding.factor / binding.limit
        return {share.cost.resource: per_unit if share is binding else 0.0 for share in cost.shares}
