"""A metered target: what a run is held to, corrected by what meters read, and what they say is out of reach."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from setpoint.controller.ladder import lowest_width
from setpoint.controller.schedule import Schedule
from setpoint.cost.budget import Budget, amount
from setpoint.cost.cost import Cost
from setpoint.groups.group import Group, widths_of
from setpoint.messages import warn
from setpoint.resources.metering import Metering
from setpoint.spending.target import Target

_TRUST = 0.6
"""How far the factor of a joint cost follows a new reading, as far as the controller's PI part does."""
_SLACK = 0.03
"""How far a reading may rise above what is held in place of a limit out of reach, before anything is cut for it."""


class MeteredTarget(Target):
    """What a run is held to, where a meter reads some of it.

    A fraction is one of the dense cost as predicted until the meter has read the dense model, and of the last reading
    of that model from there on.
    """

    def __init__(
        self,
        groups: tuple[Group, ...],
        meter: Metering,
        budgets: Sequence[Budget],
        costs: Mapping[str, Cost],
        schedule: Schedule,
        resource: str = "flops",
        original: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(budgets, costs, widths_of(groups), schedule, resource, original)
        self._meter, self._groups = meter, groups
        self._narrowest = {group.name: lowest_width(group) for group in groups}
        self._factor = dict.fromkeys([each.resource for each in budgets] or [resource], 1.0)
        self._metered_dense: dict[str, float] = {}
        self._first: dict[str, tuple[float, float]] = {}
        self._doubts: dict[str, int] = {}
        self._asked: dict[str, float] = {}
        self._whole = {each.resource for each in budgets if each.relative and each.limit == 1 and each.per == "step"}

    def anew(self, budgets: Sequence[Budget]) -> MeteredTarget:
        """The same of other budgets, with what meters have reported so far."""
        known = (self.costs, self._schedule, self._resource, self.original)
        other = MeteredTarget(self._groups, self._meter, budgets, *known)
        for name in (other._factor.keys() & self._metered_dense.keys()) - other._whole:
            other._factor[name], other._first[name] = self._factor[name], self._first[name]
            other._anchor(name, self._metered_dense[name], at_dense=True)
        return other

    @property
    def limit(self) -> dict[str, float]:
        """Limit by resource of each budget, in its own unit, as it was asked for."""
        return {**self._limit, **self._asked}

    def factor(self, name: str) -> float:
        """Cost of a resource as metered / as predicted."""
        return self._factor.get(name, 1.0)

    @property
    def metered(self) -> frozenset[str]:
        """Resources that a meter has read so far."""
        return frozenset(self._metered_dense)

    def dense_cost(self, name: str) -> float:
        """Dense cost of a resource, by the last reading of the dense model where a meter has read it."""
        return self._metered_dense.get(name, self._dense[name])

    def take_in(self, widths: Mapping[str, int]) -> tuple[dict[str, float], dict[str, float]]:
        """What meters read at these widths, and what the controller learns of it.

        A reading that is missing, of what was read before, is replaced by what it foretold, and that is said once.
        Where joules are the user's watts times seconds, the controller learns of those seconds.
        """
        readings = self._meter.read()
        before, known = self.metered, {**readings, **self._meter.stated_j()}
        learnt = self._follow(known, widths)
        for name in sorted(self.metered - before):
            self._warn_if_out_of_reach(name, known[name], widths)
        sure = self._meter.at_best(known)
        for name in self._out_of_reach(sure, widths):
            self._warn_and_hold(name, sure[name], widths)
        missing = before - known.keys()
        self._meter.miss(missing - {"latency"})  # of which there is none before a few steps after a cut
        return readings, learnt | {name: self.expected(name, widths) for name in missing}

    def _follow(self, metered: Mapping[str, float], widths: Mapping[str, int]) -> dict[str, float]:
        """Take readings at these widths in; returns them with that of what the controller is to hold.

        Only readings of a budget, price or tolerance count. All of the dense cost is what the dense model spends,
        however a meter wavers: a fraction of 1 is left to the prediction.
        """
        held = self._factor.keys() - self._whole
        seen = {name: value for name, value in metered.items() if name in held and value > 0}
        for name, value in seen.items():
            first, ratio = name not in self._metered_dense, value / self.costs[name].total(widths)
            at_dense = widths == self._dense_widths
            trust = 1.0 if first or name in self.runs else _TRUST
            self._factor[name] *= math.exp(trust * math.log(ratio / self._factor[name]))
            if first or at_dense:  # the first steps of a run are slow, so the last reading of the dense model counts
                self._first[name] = (self.costs[name].total(widths), value)
                # One that falls is followed as slowly as the controller does: a limit ahead of it would be cut for.
                self._anchor(name, max(ratio, self._factor[name]) * self._dense[name], at_dense=at_dense)
        if len(self.budgets) > 1 and self._metered_dense:  # what no meter reads now is as the readings so far foretell
            return {**seen, "joint": max(seen.get(n, self.expected(n, widths)) / m for n, m in self._limit.items())}
        return seen

    def _anchor(self, name: str, dense: float, *, at_dense: bool) -> None:
        """From here on the dense cost is what a meter reports of it; a fraction only once it has read that model."""
        self._metered_dense[name] = dense
        if name in self.runs:
            self.runs[name] = replace(self.runs[name], dense=dense)
        for each in self.budgets:
            if each.resource == name and each.relative and each.per == "step" and at_dense:
                self._limit[name] = each.absolute(dense)

    # What is out of reach.

    def _warn_if_out_of_reach(self, name: str, seen: float, widths: Mapping[str, int]) -> None:
        """Warn of a budget that could be met by prediction and cannot be by the first reading."""
        limit, least = self.limit.get(name), self.expected(name, self._narrowest)
        if limit is not None and name not in self.runs and limit < least:
            warn(
                f"the budget of {amount(limit, name)} cannot be met: the meter reads {amount(seen, name)} where "
                f"{amount(self.costs[name].total(widths), name)} was predicted, and the narrowest model would still "
                f"take about {amount(least, name)}"
            )

    def _least(self, name: str, seen: float, widths: Mapping[str, int]) -> float:
        """What the narrowest model would take by what cuts have saved, if anything that they have not saved stays.

        With the first reading `m0` at the predicted cost `p0` and the present `m` at `p`, what shrinks does so by
        `(m0 - m) / (p0 - p)` for each unit of predicted cost.
        """
        (predicted, first), now = self._first[name], self.costs[name].total(widths)
        slope = max(0.0, first - seen) / (predicted - now)
        return seen - slope * (now - self.costs[name].total(self._narrowest))

    def _out_of_reach(self, metered: Mapping[str, float], widths: Mapping[str, int]) -> list[str]:
        """Resources whose budget, as two readings in a row tell, no cut can meet.

        That is so where cuts that should have saved a tenth or more have saved less than half of that, and what is
        left to save (`_least`) does not lead down to the limit.
        """
        found = []
        for name, limit in self._limit.items():
            if name not in metered or name not in self._first or name in self.runs or name in self._asked:
                continue
            (predicted, first), now = self._first[name], self.costs[name].total(widths)
            doubtful = (
                metered[name] > limit
                and now <= 0.9 * predicted
                and 1 - metered[name] / first < 0.5 * (1 - now / predicted)
                and self._least(name, metered[name], widths) > limit
            )
            self._doubts[name] = self._doubts.get(name, 0) + 1 if doubtful else 0
            if self._doubts[name] >= 2:
                found.append(name)
        return found

    def _warn_and_hold(self, name: str, seen: float, widths: Mapping[str, int]) -> None:
        """Have the controller hold what is there in place of a limit out of reach: more would save too little."""
        limit, least = self.limit[name], self._least(name, seen, widths)
        self._asked[name] = self._limit[name]
        self._limit[name] = seen * (1 + _SLACK)
        warn(
            f"the budget of {amount(limit, name)} looks out of reach: the meter reads {amount(seen, name)}, and by "
            f"what cuts have saved so far the narrowest model would still take about {amount(least, name)}. The "
            "rest does not shrink with the model: loading data, say, or other work of this machine. Nothing more is "
            "cut for it"
        )

    # What is remembered.

    def state_dict(self) -> dict[str, Any]:
        """Limits, and what meters have reported so far, in plain numbers."""
        return {
            **super().state_dict(),
            "factor": dict(self._factor),
            "dense": dict(self._metered_dense),
            "first": {name: list(pair) for name, pair in self._first.items()},
            "doubts": dict(self._doubts),
            "asked": dict(self._asked),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with what meters had reported by then."""
        super().load_state_dict(state)
        self._factor = {name: float(state["factor"][name]) for name in self._factor}
        self._metered_dense = {str(name): float(value) for name, value in state["dense"].items()}
        self._first = {str(name): (float(p), float(m)) for name, (p, m) in state.get("first", {}).items()}
        self._doubts = {str(name): int(count) for name, count in state.get("doubts", {}).items()}
        self._asked = {str(name): float(value) for name, value in state.get("asked", {}).items()}
        for name, run in self.runs.items():
            self.runs[name] = replace(run, dense=self._metered_dense.get(name, run.dense))
