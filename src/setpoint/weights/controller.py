"""Drop and grow (RigL): another controller says how many weights stay, some of the weakest make room for others."""

import math
from dataclasses import dataclass, field, replace
from typing import Any, final

from setpoint.controller.plan import Conduct, Controller, Observation, Plan, Wrapper
from setpoint.controller.priced import PricedController
from setpoint.cost.cost import Cost
from setpoint.groups.group import Group
from setpoint.messages import plain_fields


@final
@dataclass(frozen=True)
class DropAndGrowController(Wrapper):
    """The default for single weights. `inner` drops by worth and price; then, at the same decision,

        share = fraction / 2 * (1 + cos(pi * step / end))

    of each tensor's active weights, the least salient, go, and as many come in with the value zero: those not
    active so far whose gradients were largest in this step. That costs nothing, so price and budget do not see it.
    It lasts until `end` of the run, at the decisions of `inner`, even if the budget is met by then.

    References:
        Evci, Gale, Menick, Castro, Elsen: "Rigging the Lottery: Making All Tickets Winners", ICML 2020, for growth by
        gradient and the cosine; there magnitude says what goes, and the density is fixed from the start.
    """

    inner: Controller[Any] = field(default_factory=PricedController)
    fraction: float = 0.3
    end: float = 0.7

    def __post_init__(self) -> None:
        plain_fields(self)
        if not (0 <= self.fraction < 1 and 0 < self.end <= 1):
            raise ValueError(f"drop and grow needs 0 <= fraction < 1 and 0 < end <= 1, got {self!r}")

    @property
    def conduct(self) -> Conduct:
        # Where the loss does not stand a cut, nothing is dropped until the next decision, under a price too.
        return replace(self.inner.conduct, yields=True)

    def decide(self, state: Any, observation: Observation, cost: Cost, groups: tuple[Group, ...]) -> tuple[Any, Plan]:
        step, total_steps = observation.step, observation.planned_steps
        state, plan = self.inner.decide(state, observation, cost, groups)
        share, reading = self.share(step, total_steps), observation.reading
        # A dense tensor has no masked weight that could come in.
        dense = not plan.drops() and cost.total(observation.widths) >= observation.dense[cost.resource]
        if not share or reading is None or not reading.finite() or dense:
            return state, plan
        if not any(self.due(later, total_steps) for later in range(step + 1, total_steps + 1)):
            return state, plan  # nothing could land later
        # Masks still change, so the plan of the inner controller is not the last one.
        words = plan.reason.removeprefix("budget met: ").removeprefix("done: ")
        reason = f"{words}; drop and grow of up to {share:.1%} of the active weights"
        return state, replace(plan, drop_and_grow=share, budget_met=False, reason=reason)

    def share(self, step: int, total_steps: int) -> float:
        last = max(1, round(self.end * total_steps))
        return self.fraction / 2 * (1 + math.cos(math.pi * step / last)) if step < last else 0.0
