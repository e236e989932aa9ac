"""Waiting: a controller whose next cut comes only once the loss has recovered from the last one."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import final

from setpoint.controller.plan import Observation, Plan
from setpoint.controller.priced import PricedController, PricedState
from setpoint.cost.cost import Cost
from setpoint.groups.group import Group, keep_all


@final
@dataclass(frozen=True)
class WaitingController:
    """Setpoint's controller, fed back by the loss: a cut waits while the last one still shows.

    The loss has recovered when it lies no further above the trend that it had before the last cut than the standard
    error of that distance (`excess_after`). While too few losses are known to say so, cuts wait as well. After `stop`
    of the run nothing waits any more.

    Args:
        inner: decides what goes.
        stop: fraction of the run after which cuts no longer wait.
        step: fraction of the run after which the loss is looked at again.

    Raises:
        ValueError: unless both fractions are above 0 and at most 1.
    """

    inner: PricedController = field(default_factory=PricedController)
    stop: float = 0.6
    step: float = 0.01

    def __post_init__(self) -> None:
        if not (0 < self.stop <= 1 and 0 < self.step <= 1):
            raise ValueError(f"stop and step are fractions of the run, above 0 and at most 1, got {self!r}")

    def init(self, groups: tuple[Group, ...]) -> PricedState:
        """State of the inner controller."""
        return self.inner.init(groups)

    def due(self, step: int, total_steps: int) -> bool:
        """Whether the inner controller decides after this step."""
        return self.inner.due(step, total_steps)

    def decide(
        self, state: PricedState, observation: Observation, cost: Cost, groups: tuple[Group, ...]
    ) -> tuple[PricedState, Plan]:
        """The inner controller's plan, or one that drops nothing and names the step of the next decision."""
        after, plan = self.inner.decide(state, observation, cost, groups)
        excess, whole = observation.excess, observation.widths == observation.dense_widths
        recovered = whole or (excess is not None and excess.value <= excess.error)
        if not plan.drops() or recovered or observation.step >= self.stop * observation.planned_steps:
            return after, plan
        again = observation.step + math.ceil(self.step * observation.planned_steps)
        known = "unknown" if excess is None else f"{excess.value:+.3g}"
        reason = f"waits for the loss, whose distance from its trend before the last cut is {known}"
        return state, replace(plan, keep=keep_all(groups), worth={}, budget_met=False, reason=reason, again=again)
