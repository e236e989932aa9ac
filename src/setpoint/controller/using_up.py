"""Using up: another controller decides, and its last cut waits where a budget of the whole run would be left unused."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, final

import numpy as np

from setpoint.controller.plan import Controller, Observation, Plan, Transferring
from setpoint.cost.cost import Cost
from setpoint.groups.group import Group


@final
@dataclass(frozen=True)
class UsingUp:
    """A cut that would leave a good part of the run's budget unused is put off until what is left is used up.

    Its state is the inner controller's; while the cut waits, it is the one from before the decision.

    Args:
        inner: decides.
    """

    inner: Controller[Any]

    def init(self, groups: tuple[Group, ...]) -> Any:
        return self.inner.init(groups)

    def due(self, step: int, total_steps: int) -> bool:
        return self.inner.due(step, total_steps)

    def transferred(self, state: Any, *, step: int, total_steps: int, present: float, limit: float) -> Any:
        if not isinstance(self.inner, Transferring):
            return state
        return self.inner.transferred(state, step=step, total_steps=total_steps, present=present, limit=limit)

    def decide(self, state: Any, observation: Observation, cost: Cost, groups: tuple[Group, ...]) -> tuple[Any, Plan]:
        """The inner controller's plan, or one that drops nothing and names the step of the next decision."""
        after, plan = self.inner.decide(state, observation, cost, groups)
        wait = _wait(observation, cost, plan)
        if not wait:
            return after, plan
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


def _wait(observation: Observation, cost: Cost, plan: Plan) -> int:
    """Steps by which the cut had better wait; 0 for none."""
    if not plan.drops():
        return 0
    after = dict(observation.widths) | {name: int(keep.sum()) for name, keep in plan.keep.items()}
    for name, units in plan.grow.items():
        after[name] += len(units)
    waits = (
        rest.wait(
            observation.step,
            observation.planned_steps,
            lands=plan.budget_met,
            present=rest.factor * cost.total(observation.widths),
            after=rest.factor * cost.total(after),
        )
        for rest in observation.remaining.values()
    )
    return min(waits, default=0)
