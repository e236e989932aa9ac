"""Limits: what a step may cost, by the budgets of a run and by what meters have read of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from setpoint.controller.selection import lowest_width
from setpoint.cost.budget import Budget
from setpoint.cost.cost import Cost, JointCost, Share
from setpoint.groups.group import Group, widths_of


@dataclass(frozen=True)
class Correction:
    """What is known of one resource by its readings."""

    factor: float  # cost as metered / as predicted
    dense: float  # cost of the dense model, by the last reading of it
    doubts: int = 0  # readings in a row by which no cut can meet the budget
    asked: float | None = None  # the limit that was asked for, where another is held since that one is out of reach


@dataclass(frozen=True, eq=False)
class Limits:
    """The budgets of a run, the limit of a step that follows from each, and what the controller is given to hold.

    Without any budget (`Price`, `Tolerance`) the controller sees the cost of a resource and no limit. With one budget
    it sees that budget's cost; with several, the largest share of a limit that is spent (`JointCost`), held to 1.

    A fraction is one of the predicted dense cost until a meter has read the dense model, then of its last reading.
    """

    budgets: tuple[Budget, ...]
    costs: Mapping[str, Cost]  # by resource; always "flops" and "params"
    groups: tuple[Group, ...]  # at dense widths
    resource: str = "flops"  # what is saved where there is no budget
    # By resource, the cost of a step before an earlier run cut the model: a fraction is one of that.
    original: Mapping[str, float] = field(default_factory=dict)
    per_step: Mapping[str, float] = field(default_factory=dict)  # by resource of each budget, as it is held
    corrections: Mapping[str, Correction] = field(default_factory=dict)  # by resource that a meter has read

    def held_to(self, budgets: Sequence[Budget]) -> Limits:
        """The limits of other budgets, by what meters have read so far; one per run has no limit of a step yet."""
        dense = {budget.resource: self.predicted(budget.resource) for budget in budgets}
        per_step = dense | {b.resource: b.absolute(dense[b.resource]) for b in budgets if b.per == "step"}
        limits = replace(self, budgets=tuple(budgets), per_step=per_step, corrections={})
        for name, known in self.corrections.items():
            if name in limits.followed:  # what was out of reach of the last budget may be in reach of this one
                limits = limits.anchored(name, replace(known, doubts=0, asked=None), at_dense=True)
        return limits

    @property
    def dense_widths(self) -> dict[str, int]:
        return widths_of(self.groups)

    @property
    def narrowest(self) -> dict[str, int]:
        return {group.name: lowest_width(group) for group in self.groups}

    # What the controller is given, and what its answers are for each budget.

    @property
    def cost(self) -> Cost:
        if len(self.budgets) > 1:
            return JointCost([Share(self.costs[name], m, self.factor(name)) for name, m in self.per_step.items()])
        return self.costs[self.budgets[0].resource if self.budgets else self.resource]

    @property
    def held(self) -> dict[str, float]:
        """The limits that the controller is to hold, by resource."""
        return dict(self.per_step) if len(self.budgets) <= 1 else {**self.per_step, "joint": 1.0}

    @property
    def dense(self) -> dict[str, float]:
        """Predicted dense cost by resource, with that of what the controller is to hold."""
        predicted = {name: self.predicted(name) for name in self.costs}
        return {**predicted, self.cost.resource: self.cost.total(self.dense_widths)}

    def references(self, values: Mapping[str, float]) -> dict[str, float]:
        """A plan's reference by resource of each budget: a joint one is the same share of each limit."""
        if len(self.budgets) <= 1 or "joint" not in values:
            return dict(values)
        return {name: values["joint"] * limit for name, limit in self.per_step.items()}

    def prices(self, values: Mapping[str, float], widths: Mapping[str, int]) -> dict[str, float]:
        cost = self.cost
        if isinstance(cost, JointCost) and "joint" in values:
            return cost.prices(values["joint"], widths)
        return dict(values)

    def binding(self, widths: Mapping[str, int]) -> str:
        """Resource of the budget of which most is spent."""
        cost = self.cost
        return cost.binding(widths).cost.resource if isinstance(cost, JointCost) else cost.resource

    # Costs by resource, as predicted and as read.

    @property
    def asked(self) -> dict[str, float]:
        """Limit of a step by resource of each budget, as it was asked for."""
        replaced = {name: known.asked for name, known in self.corrections.items() if known.asked is not None}
        return {**self.per_step, **replaced}

    def predicted(self, name: str) -> float:
        return self.original[name] if name in self.original else self.costs[name].total(self.dense_widths)

    def dense_cost(self, name: str) -> float:
        """By the last reading of the dense model where a meter has read it."""
        return self.corrections[name].dense if name in self.corrections else self.predicted(name)

    def factor(self, name: str) -> float:
        return self.corrections[name].factor if name in self.corrections else 1.0

    def expected(self, name: str, widths: Mapping[str, int]) -> float:
        return self.factor(name) * self.costs[name].total(widths)

    @property
    def followed(self) -> set[str]:
        """Resources whose readings count."""
        # A fraction of 1 is what the dense model spends, however a meter wavers: it is left to the prediction.
        whole = {b.resource for b in self.budgets if b.relative and b.limit == 1 and b.per == "step"}
        return {budget.resource for budget in self.budgets} - whole if self.budgets else {self.resource}

    def anchored(self, name: str, known: Correction, *, at_dense: bool) -> Limits:
        """The limits with this correction; a fraction is one of a reading of the dense model."""
        per_step = dict(self.per_step)
        for budget in self.budgets:
            if budget.resource == name and budget.relative and budget.per == "step" and at_dense:
                per_step[name] = budget.absolute(known.dense)
        return replace(self, per_step=per_step, corrections={**self.corrections, name: known})

    def is_per_run(self, name: str) -> bool:
        return any(budget.resource == name and budget.per == "run" for budget in self.budgets)

    def state_dict(self) -> dict[str, Any]:
        read = {name: dict(vars(known)) for name, known in self.corrections.items()}
        return {"limit": dict(self.per_step), "corrections": read}

    def restored(self, state: Mapping[str, Any]) -> Limits:
        per_step = {name: float(state["limit"][name]) for name in self.per_step}
        read = {str(name): Correction(**known) for name, known in state["corrections"].items()}
        return replace(self, per_step=per_step, corrections=read)
