"""The price: the budget's multiplier, a feedforward part from predicted cost and a PI part from metered cost."""

from __future__ import annotations

import math
from dataclasses import dataclass

from setpoint.given import plain_fields


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
