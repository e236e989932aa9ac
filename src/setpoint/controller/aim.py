"""The aim of one decision: from the reference, the limit, and feedback on what a meter reads."""

from __future__ import annotations

import math
from dataclasses import dataclass

from setpoint.controller.plan import Observation
from setpoint.controller.schedule import Schedule
from setpoint.cost.cost import Cost
from setpoint.messages import plain_fields


@dataclass(frozen=True)
class Gains:
    """Gains of the PI part, per unit of relative cost error, hence without dimension.

    Every decision aims at the *predicted* cost `target = reference * exp(-u)`, with

        u = kp * e + ki * sum(e),    e = ln(metered / expected)

    where `expected` is `predicted * exp(u)` at the present widths, with u of the last decision. The logarithm makes the
    loop exactly linear, because cost and price act as factors. What a decision could not reach for reasons known to the
    controller (block size, slew limit, dwell, floors) is in the widths, so it is no error: that is the anti-windup.

    The price follows as the worth at which predicted cost meets the target. So feedback acts on the cost, and the
    plant's own slope makes a price of it: the loop gain is 1 for any model. A fixed gain on the price would be too weak
    where worths are spread over decades and unstable where they are alike.

    Derivation of the defaults. If the meter reads `factor` times the prediction, `e[k+1] = ln(factor) - u[k]`, so

        e[k+1] = (1 - kp - ki) * e[k] + kp * e[k-1].

    With kp >= 0 and kp + ki <= 1 both coefficients are non-negative, so e never changes sign: no overshoot, which
    matters because a cut cannot be taken back. `kp = 0.1, ki = 0.5` take out 60 % of a sudden change at the next
    decision, 99 % within eight (dominant root 0.57), follow a steady drift of d per decision with a lag of `d / ki = 2
    d`, and pass only about 0.4 of the variance of a noisy meter.

    Args:
        kp: proportional gain, >= 0.
        ki: integral gain per decision, > 0; `kp + ki <= 1`.

    Raises:
        ValueError: for gains that could overshoot.
    """

    kp: float = 0.1
    ki: float = 0.5

    def __post_init__(self) -> None:
        plain_fields(self)
        if not (self.kp >= 0 and self.ki > 0 and self.kp + self.ki <= 1):
            raise ValueError(
                "gains need kp >= 0, ki > 0 and kp + ki <= 1, or a cut could overshoot for good: "
                f"got kp={self.kp!r}, ki={self.ki!r}"
            )


@dataclass(frozen=True)
class Feedback:
    """What the PI part remembers."""

    integral: float = 0.0  # `ki * sum(e)`, an estimate of `ln(metered / predicted)`
    correction: float = 0.0  # u of the last decision: metered cost is expected to be `exp(u)` times the predicted

    def factor(self) -> float:
        """Expected ratio of metered to predicted cost."""
        return math.exp(self.correction)

    def error(self, metered: float, predicted: float) -> float:
        """`ln(metered / expected)` at the present widths: what prediction and feedback did not foresee."""
        return math.log(metered / predicted) - self.correction

    def updated(self, error: float, gains: Gains, deadband: float) -> Feedback:
        """Memory after one decision; inside the dead-band nothing is integrated and the price rests.

        Args:
            deadband: full width of the band around 0, relative.

        >>> feedback = Feedback()
        >>> for _ in range(20):
        ...     error = feedback.error(metered=13.0, predicted=10.0)
        ...     feedback = feedback.updated(error, Gains(), deadband=0.0)
        >>> round(feedback.factor(), 4)
        1.3
        """
        if abs(error) <= deadband / 2:
            return self
        integral = self.integral + gains.ki * error
        return Feedback(integral, integral + gains.kp * error)


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
    ceiling: float  # what a step may cost until the next decision, infinite without a budget for the whole run
    settled: bool  # whether every decision from here on tries to land
    feedback: Feedback  # memory of the PI part, this decision's error taken in

    @property
    def goal(self) -> float:
        """What a decision must not end above: the target once it is to land, and what the rest of the run allows."""
        return self.target if self.settled else self.ceiling

    @property
    def paid(self) -> float:
        """What the model may cost where units come back. A cut may stop above the target, on the way down, but what
        comes back must not make the model dearer than it is.
        """
        return min(self.target if self.settled else max(self.target, self.spent), self.ceiling)

    def rests(self, deadband: float) -> bool:
        """Whether spending is where it should be: within the limit at the end, within the dead-band on the way."""
        if self.spent > self.ceiling:
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
    `start` is the dense cost as metered, None before it is known.
    """
    resource, step, total_steps = cost.resource, observation.step, observation.planned_steps
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
    ceiling = observation.ceiling.get(resource, math.inf) / ratio
    return Aim(
        resource=resource,
        start=start,
        limit=limit,
        reference=allowed,
        metered=metered,
        spent=spent,
        target=min(target, ceiling),
        landing=limit / feedback.factor(),
        ceiling=ceiling,
        settled=settled,
        feedback=feedback,
    )
