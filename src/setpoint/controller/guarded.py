"""Guarded: the controller of a run, whose last cut may be taken back, or wait."""

from dataclasses import dataclass, replace
from typing import Any, final

import numpy as np

from setpoint.controller.plan import Observation, Plan, Wrapper
from setpoint.cost.cost import Cost
from setpoint.groups.group import Group, keep_all

_DECISIONS_LEFT = 2  # that must be to come, so that the budget can still be met


@dataclass(frozen=True, eq=False)
class GuardedState:
    """The inner controller's state, and whether a cut has been taken back, or the reference has paused, already."""

    inner: Any
    gave_way: bool = False


@final
@dataclass(frozen=True)
class Guarded(Wrapper):
    """Another controller decides, with two exceptions.

    *Rolling back.* When the loss has left its trend, the last cut comes back and nothing is dropped until the next
    decision. This happens once in a run, and only while decisions are still to come: the budget has the last word.
    Where the last cut's units are not all in the reserve, the reference pauses, and nothing comes back.

    *Using up.* A cut that would leave a good part of the run's budget unused is put off until what is left is used up,
    unless it is a first cut, with which a run begins.
    While it waits, the state is the one from before the decision.
    """

    def init(self, groups: tuple[Group, ...]) -> GuardedState:
        return GuardedState(self.inner.init(groups))

    def transferred(
        self, state: GuardedState, *, step: int, total_steps: int, present: float, limit: float
    ) -> GuardedState:
        at = {"step": step, "total_steps": total_steps}
        return replace(state, inner=self.inner.transferred(state.inner, **at, present=present, limit=limit))

    def decide(
        self, state: GuardedState, observation: Observation, cost: Cost, groups: tuple[Group, ...]
    ) -> tuple[GuardedState, Plan]:
        """The inner controller's plan, the one that takes the last cut back, or one that names the next decision."""
        if not state.gave_way and (back := self._back(observation, cost, groups)):
            return replace(state, gave_way=True), back
        inner, plan = self.inner.decide(state.inner, observation, cost, groups)
        first = self.conduct.schedule.first and observation.widths == observation.dense_widths
        wait = _wait(observation, cost, plan) if plan.drops() and not first else 0
        if not wait:
            return replace(state, inner=inner), plan
        again = observation.step + wait
        return state, replace(
            plan,
            keep={name: np.ones_like(keep) for name, keep in plan.keep.items()},
            grow={},
            grow_worth={},
            budget_met=False,
            reason=f"the last cut waits until step {again}, so that the budget of the run is used up",
            again=again,
        )

    def _back(self, observation: Observation, cost: Cost, groups: tuple[Group, ...]) -> Plan | None:
        excess, step, total_steps = observation.excess, observation.step, observation.planned_steps
        if excess is None or not self.conduct.yields or not excess.significant():
            return None
        if sum(self.due(later, total_steps) for later in range(step + 1, total_steps)) < _DECISIONS_LEFT:
            return None
        back, widths = observation.last_dropped, observation.widths
        wider = {name: width + len(back.get(name, ())) for name, width in widths.items()}
        expected = {name: left.factor * cost.total(wider) for name, left in observation.remaining.items()}
        if any(expected[name] > ceiling for name, ceiling in observation.ceiling.items()):
            return None
        done = f"so the cut was taken back at step {step}"
        why = (
            f"after the cut of step {excess.cut} the loss lay {excess.value:.3g} over its trend of "
            f"{excess.foretold:.3g} (standard error {excess.error:.2g}), "
            f"{done if back else 'and what was dropped does not rest in full in a reserve'}"
        )
        reason = f"{'rolled back' if back else 'paused'}: {why}"
        return Plan(step, keep_all(groups), reason=reason, grow=back, undoes=bool(back), gave_way=why)


def _wait(observation: Observation, cost: Cost, plan: Plan) -> int:
    """Steps by which the cut had better wait; 0 for none."""
    after = dict(observation.widths) | {name: int(keep.sum()) for name, keep in plan.keep.items()}
    for name, units in plan.grow.items():
        after[name] += len(units)
    present, cut = cost.total(observation.widths), cost.total(after)
    at, lands = (observation.step, observation.planned_steps), plan.budget_met
    waits = (
        left.wait(*at, lands=lands, present=left.factor * present, after=left.factor * cut)
        for left in observation.remaining.values()
    )
    return min(waits, default=0)
