"""Limits: what a step may cost, by the budgets of a run and by what meters have read of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from setpoint.controller.ladder import lowest_width
from setpoint.controller.schedule import Schedule
from setpoint.cost.budget import Budget, amount
from setpoint.cost.cost import Cost, JointCost, Share
from setpoint.groups.group import Group, widths_of
from setpoint.messages import warn
from setpoint.spending.meter import Readings
from setpoint.spending.run_budget import RunBudget

# How far the factor of a joint cost follows a new reading, as far as the controller's PI part does.
_TRUST = 0.6
# How far a reading may rise above what is held in place of a limit out of reach, before anything is cut for it.
_SLACK = 0.03


@dataclass(frozen=True)
class Correction:
    """What readings have told of one resource.

    Args:
        factor: cost as metered / as predicted.
        dense: cost of the dense model, by the last reading of it.
        first_predicted: predicted cost at the first reading.
        first_read: the first reading.
        doubts: readings in a row by which no cut can meet the budget.
        asked: the limit that was asked for, where another is held since that one is out of reach.
    """

    factor: float
    dense: float
    first_predicted: float
    first_read: float
    doubts: int = 0
    asked: float | None = None


@dataclass(frozen=True, eq=False)
class Limits:
    """The budgets of a run, the limit of a step that follows from each, and what the controller is given to hold.

    Without any budget (`Price`, `Tolerance`) the controller sees the cost of a resource and no limit. With one budget
    it sees that budget's cost; with several, the largest share of a limit that is spent (`JointCost`), held to 1.

    A fraction is one of the dense cost as predicted until a meter has read the dense model, and of the last reading of
    that model from there on.

    Args:
        costs: by resource; always "flops" and "params".
        groups: at dense widths.
        resource: what is saved where there is no budget.
        original: by resource, what a step took before the model was ever cut, where an earlier run has cut it: a
            fraction is one of that.
        per_step: limit of a step by resource of each budget, as it is held.
        corrections: by resource that a meter has read.
    """

    budgets: tuple[Budget, ...]
    costs: Mapping[str, Cost]
    groups: tuple[Group, ...]
    resource: str = "flops"
    original: Mapping[str, float] = field(default_factory=dict)
    per_step: Mapping[str, float] = field(default_factory=dict)
    corrections: Mapping[str, Correction] = field(default_factory=dict)

    def held_to(self, budgets: Sequence[Budget]) -> Limits:
        """The same of these budgets, with what meters have read so far; one per run has no limit of a step yet."""
        dense = {budget.resource: self._predicted(budget.resource) for budget in budgets}
        per_step = {
            budget.resource: budget.absolute(dense[budget.resource]) if budget.per == "step" else dense[budget.resource]
            for budget in budgets
        }
        limits = replace(self, budgets=tuple(budgets), per_step=per_step, corrections={})
        for name, known in self.corrections.items():
            if name in limits._followed:  # what was out of reach of the last budget may be in reach of this one
                known = replace(known, doubts=0, asked=None)
                limits = limits._anchored(name, known, at_dense=True)
        return limits

    @property
    def dense_widths(self) -> dict[str, int]:
        """Units by group of the dense model."""
        return widths_of(self.groups)

    @property
    def narrowest(self) -> dict[str, int]:
        """The fewest units by group."""
        return {group.name: lowest_width(group) for group in self.groups}

    @property
    def cost(self) -> Cost:
        """What the controller is to hold."""
        if len(self.budgets) > 1:
            return JointCost([Share(self.costs[name], m, self.factor(name)) for name, m in self.per_step.items()])
        return self.costs[self.budgets[0].resource if self.budgets else self.resource]

    @property
    def held(self) -> dict[str, float]:
        """The limits that the controller is to hold."""
        return dict(self.per_step) if len(self.budgets) <= 1 else {**self.per_step, "joint": 1.0}

    @property
    def asked(self) -> dict[str, float]:
        """Limit of a step by resource of each budget, in its own unit, as it was asked for."""
        replaced = {name: known.asked for name, known in self.corrections.items() if known.asked is not None}
        return {**self.per_step, **replaced}

    @property
    def dense(self) -> dict[str, float]:
        """Predicted dense cost by resource, with that of what the controller is to hold."""
        cost = self.cost
        predicted = {name: self._predicted(name) for name in self.costs}
        return {**predicted, cost.resource: cost.total(self.dense_widths)}

    def _predicted(self, name: str) -> float:
        return self.original[name] if name in self.original else self.costs[name].total(self.dense_widths)

    def dense_cost(self, name: str) -> float:
        """Dense cost of a resource, by the last reading of the dense model where a meter has read it."""
        return self.corrections[name].dense if name in self.corrections else self._predicted(name)

    def factor(self, name: str) -> float:
        """Cost of a resource as metered / as predicted."""
        return self.corrections[name].factor if name in self.corrections else 1.0

    def expected(self, name: str, widths: Mapping[str, int]) -> float:
        """Cost of a step at these widths, by all that is known."""
        return self.factor(name) * self.costs[name].total(widths)

    def runs(self, schedule: Schedule) -> dict[str, RunBudget]:
        """By resource, the budgets of the whole run."""
        return {
            budget.resource: RunBudget(budget, schedule, self.dense_cost(budget.resource))
            for budget in self.budgets
            if budget.per == "run"
        }

    def binding(self, widths: Mapping[str, int]) -> str:
        """Resource of the budget that leads."""
        cost = self.cost
        return cost.binding(widths).cost.resource if isinstance(cost, JointCost) else cost.resource

    def references(self, values: Mapping[str, float]) -> dict[str, float]:
        """By resource of each budget what a plan's reference allows: one in shares is that share of each limit."""
        if len(self.budgets) <= 1 or "joint" not in values:
            return dict(values)
        return {name: values["joint"] * limit for name, limit in self.per_step.items()}

    def prices(self, values: Mapping[str, float], widths: Mapping[str, int]) -> dict[str, float]:
        """By resource of each budget the price that a plan was made at, at these widths."""
        cost = self.cost
        if isinstance(cost, JointCost) and "joint" in values:
            return cost.prices(values["joint"], widths)
        return dict(values)

    def price(self, values: Mapping[str, float], widths: Mapping[str, int]) -> float:
        """The price of a plan for a unit of the budget that leads; 0 without one."""
        return float(self.prices(values, widths).get(self.binding(widths), 0.0))

    # What meters read.

    @property
    def _followed(self) -> set[str]:
        """Resources whose readings count: those that are held, but for all of the dense cost.

        All of the dense cost is what the dense model spends, however a meter wavers: a fraction of 1 is left to the
        prediction.
        """
        whole = {b.resource for b in self.budgets if b.relative and b.limit == 1 and b.per == "step"}
        return {budget.resource for budget in self.budgets} - whole if self.budgets else {self.resource}

    def corrected(self, readings: Readings, widths: Mapping[str, int]) -> tuple[Limits, dict[str, float]]:
        """The limits with readings at these widths taken in, and what the controller learns of these.

        A reading that is missing, of what was read before, is replaced by what it foretold.
        """
        if not readings.learnable and not self.corrections:  # no meter: a plain run
            return self, {}
        limits, followed = self, self._followed
        seen = {name: value for name, value in readings.learnable.items() if name in followed and value > 0}
        for name, value in seen.items():
            limits = limits._with_reading(name, value, widths)
        learnt = dict(seen)
        if len(self.budgets) > 1 and limits.corrections:  # what no meter reads now is as predicted and corrected
            spent = {name: seen.get(name, limits.expected(name, widths)) for name in limits.per_step}
            learnt["joint"] = max(spent[name] / limit for name, limit in limits.per_step.items())
        for name in sorted(limits.corrections.keys() - self.corrections.keys()):
            limits._warn_if_out_of_reach(name, seen[name], widths)
        for name in limits.per_step:
            if name in readings.quickest and name in limits.corrections:
                limits = limits._doubted(name, readings.quickest[name], widths)
        missing = self.corrections.keys() - readings.learnable.keys()
        return limits, learnt | {name: limits.expected(name, widths) for name in missing}

    def _with_reading(self, name: str, value: float, widths: Mapping[str, int]) -> Limits:
        predicted, at_dense = self.costs[name].total(widths), widths == self.dense_widths
        ratio, known = value / predicted, self.corrections.get(name)
        if known is None:
            first = Correction(ratio, ratio * self._predicted(name), predicted, value)
            return self._anchored(name, first, at_dense=at_dense)
        # A run budget plans with the factor itself; per step the controller's PI part follows the rest.
        trust = 1.0 if self._per_run(name) else _TRUST
        known = replace(known, factor=known.factor * math.exp(trust * math.log(ratio / known.factor)))
        if not at_dense:
            return replace(self, corrections={**self.corrections, name: known})
        # The first steps of a run are slow, so the last reading of the dense model counts. One that falls is followed
        # as slowly as the controller does: a limit ahead of it would be cut for.
        dense = max(ratio, known.factor) * self._predicted(name)
        known = replace(known, dense=dense, first_predicted=predicted, first_read=value)
        return self._anchored(name, known, at_dense=True)

    def _anchored(self, name: str, known: Correction, *, at_dense: bool) -> Limits:
        """From here on the dense cost is what a meter reads; a fraction is one of it once that model has been read."""
        per_step = dict(self.per_step)
        for budget in self.budgets:
            if budget.resource == name and budget.relative and budget.per == "step" and at_dense:
                per_step[name] = budget.absolute(known.dense)
        return replace(self, per_step=per_step, corrections={**self.corrections, name: known})

    def _per_run(self, name: str) -> bool:
        return any(budget.resource == name and budget.per == "run" for budget in self.budgets)

    def _warn_if_out_of_reach(self, name: str, seen: float, widths: Mapping[str, int]) -> None:
        """Warn of a budget that could be met by prediction and cannot be by the first reading."""
        limit, lowest = self.asked.get(name), self.expected(name, self.narrowest)
        if limit is not None and not self._per_run(name) and limit < lowest:
            warn(
                f"the budget of {amount(limit, name)} cannot be met: the meter reads {amount(seen, name)} where "
                f"{amount(self.costs[name].total(widths), name)} was predicted, and the narrowest model would still "
                f"take about {amount(lowest, name)}"
            )

    def _doubted(self, name: str, quickest: float, widths: Mapping[str, int]) -> Limits:
        """The limits where two readings in a row tell that no cut can meet a budget: then what is there is held.

        That is so where cuts that should have saved a tenth or more have saved less than half of that, and what is
        left to save does not lead down to the limit. With the first reading `m0` at the predicted cost `p0` and the
        present `m` at `p`, what shrinks does so by `(m0 - m) / (p0 - p)` for each unit of predicted cost.
        """
        known, limit = self.corrections[name], self.per_step[name]
        if self._per_run(name) or known.asked is not None:
            return self
        cost, predicted, first = self.costs[name], known.first_predicted, known.first_read
        now, doubts, lowest = cost.total(widths), 0, 0.0
        if quickest > limit and now <= 0.9 * predicted and 1 - quickest / first < 0.5 * (1 - now / predicted):
            slope = max(0.0, first - quickest) / (predicted - now)
            lowest = quickest - slope * (now - cost.total(self.narrowest))
            doubts = known.doubts + 1 if lowest > limit else 0
        known, per_step = replace(known, doubts=doubts), dict(self.per_step)
        if doubts >= 2:  # one may be another program's doing
            known, per_step[name] = replace(known, asked=limit), quickest * (1 + _SLACK)
            warn(
                f"the budget of {amount(limit, name)} looks out of reach: the meter reads {amount(quickest, name)}, "
                f"and by what cuts have saved so far the narrowest model would still take about {amount(lowest, name)}"
                ". The rest does not shrink with the model: loading data, say, or other work of this machine. Nothing "
                "more is cut for it"
            )
        return replace(self, per_step=per_step, corrections={**self.corrections, name: known})

    # What is remembered.

    def state_dict(self) -> dict[str, Any]:
        """Limits, and what meters have read so far, in plain numbers."""
        read = {name: dict(vars(known)) for name, known in self.corrections.items()}
        return {"limit": dict(self.per_step), "corrections": read}

    def restored(self, state: Mapping[str, Any]) -> Limits:
        """The limits of a state."""
        per_step = {name: float(state["limit"][name]) for name in self.per_step}
        read = {str(name): Correction(**known) for name, known in state["corrections"].items()}
        return replace(self, per_step=per_step, corrections=read)
