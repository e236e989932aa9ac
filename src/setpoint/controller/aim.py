"""The aim: where one decision is heading, from the reference, the feedback and the limit."""

from __future__ import annotations

import math
from dataclasses import dataclass

from setpoint.controller.plan import Observation
from setpoint.controller.price import Feedback, Gains
from setpoint.controller.schedule import Schedule
from setpoint.cost.cost import Cost


@dataclass(frozen=True)
class Aim:
    """Where one decision is heading; `start`, `limit`, `reference` and `metered` as metered, the rest as predicted."""

    resource: str  # what is spent
    start: float  # dense cost
    limit: float  # the budget
    reference: float  # what the trajectory allows now
    metered: float | None  # cost as metered, None without a meter
    spent: float  # cost as predicted
    target: float  # what the decision is to come down to
    landing: float  # what meets the limit
    most: float  # what a step may cost until the next decision, infinite without a budget for the whole run
    settled: bool  # whether every decision from here on tries to land
    feedback: Feedback  # memory of the PI part, this decision's error taken in

    @property
    def goal(self) -> float:
        """What a decision must not end above: the target once it is to land, and what the rest of the run allows."""
        return self.target if self.settled else self.most

    @property
    def paid(self) -> float:
        """What the model may cost where units come back. A cut may stop above the target, on the way down, but what
        comes back must not make the model dearer than it is.
        """
        return min(self.target if self.settled else max(self.target, self.spent), self.most)

    def rests(self, deadband: float) -> bool:
        """Whether spending is where it should be: within the limit at the end, within the dead-band on the way."""
        if self.spent > self.most:
            return False
        if self.settled and self.metered is not None:
            return self.metered <= self.limit or self.spent <= self.target
        return self.spent <= self.target * (1 if self.settled else 1 + deadband)


def take_aim(
    observation: Observation,
    cost: Cost,
    *,
    schedule: Schedule,
    gains: Gains,
    deadband: float,
    start: float | None,
    feedback: Feedback,
) -> Aim:
    """Take in the error that the meter shows, and place the target.

    Without a meter the prediction is exact. With one, what is predicted to cost x is expected to cost `x *
    feedback.factor()`, and once the reference is at the limit the aim is half a dead-band below it.

    Args:
        observation: its metered cost must belong to the present widths.
        deadband: relative error within which the controller rests.
        start: dense cost as metered, None before it is known.
        feedback: what the PI part remembers.
    """
    resource, step, total_steps = cost.resource, observation.step, observation.total_steps
    limit, metered = observation.limit[resource], observation.metered.get(resource)
    spent = cost.total(observation.widths)
    ratio = 1.0 if metered is None else metered / spent
    start = observation.dense[resource] * ratio if start is None else start
    feedback = feedback.updated(feedback.error(metered=ratio, predicted=1.0), gains, deadband)
    settled = schedule.settled(step, total_steps)
    allowed = schedule.at(step, total_steps, start=start, limit=limit)
    target = allowed / feedback.factor()
    if metered is not None and allowed == limit:
        target *= 1 - deadband / 2
    if metered is None and settled:
        target = min(target, limit)
    most = observation.most.get(resource, math.inf) / ratio
    return Aim(
        resource=resource,
        start=start,
        limit=limit,
        reference=allowed,
        metered=metered,
        spent=spent,
        target=min(target, most),
        landing=limit / feedback.factor(),
        most=most,
        settled=settled,
        feedback=feedback,
    )
