"""The penalty controller: drops what earns less than the user's price, and lets the size follow."""

from dataclasses import dataclass, field
from typing import final

from setpoint.controller.plan import Conduct, Controller, Observation, Plan, per, problem_with, these
from setpoint.controller.schedule import Schedule
from setpoint.controller.selection import descend, start
from setpoint.cost.budget import Price
from setpoint.cost.cost import Cost
from setpoint.groups.group import Group, keep_all
from setpoint.messages import plain_fields


@final
@dataclass(frozen=True)
class PenaltyController(Controller[None]):
    """Minimises `loss + price * cost` over the widths: units worth less than the price go.

    A block's worth is its saliency / its saving, as in `PricedController`; here the price is given and the
    cost follows. Blocks go in the order of worth while `worth < price * (1 - hysteresis)`, savings weighed again after
    each pick. Since savings only shrink as other groups do, that is where no single block is left that costs more
    than it earns.

    The price rises to its full value between the schedule's warm-up and its settle step, in proportion to time:

        price(step) = rate * clip((step - warmup) / (settle - warmup), 0, 1).

    A rate for a unit of the resource is one for a unit as metered: where a meter reads `m` and the prediction is `p`,
    it is set against predicted savings as `price * m / p`. A rate for the dense cost needs no such correction.

    From settle on the first decision that finds nothing to drop is the last one; the one at `land` is in any case.

    A reading that is not in the unit of the loss cannot be set against a price: it makes no decision.

    Args:
        price: the exchange rate.
        schedule: times of decisions.
        hysteresis: relative distance between the price and the worth of what is dropped, in [0, 1).
        slew: largest fraction of a group's units to go at one decision, in (0, 1]; one block always may.

    Raises:
        ValueError: for a setting out of range.

    References:
        Gordon et al.: "MorphNet: Fast & Simple Resource-Constrained Structure Learning of Deep Networks", CVPR 2018,
        for the penalty on a resource.
    """

    price: Price
    schedule: Schedule = field(default_factory=Schedule)
    hysteresis: float = 0.1
    slew: float = 0.5

    def __post_init__(self) -> None:
        plain_fields(self)
        if not 0 <= self.hysteresis < 1:
            raise ValueError(f"hysteresis is a fraction in [0, 1), got {self.hysteresis!r}")
        if not 0 < self.slew <= 1:
            raise ValueError(f"slew is a fraction in (0, 1], got {self.slew!r}")

    @property
    def conduct(self) -> Conduct:
        return Conduct(self.schedule, self.price, yields=False)

    def init(self, groups: tuple[Group, ...]) -> None:
        """Nothing is remembered between decisions."""

    def decide(self, state: None, observation: Observation, cost: Cost, groups: tuple[Group, ...]) -> tuple[None, Plan]:
        resource, reading = cost.resource, observation.reading
        step, total_steps = observation.step, observation.planned_steps
        rate = self.price.absolute(observation.dense[resource])
        price = rate * self.schedule.progress(step, total_steps)
        problem = problem_with(reading, groups)
        if reading is None or problem or not (reading.calibrated and reading.in_loss):
            why = problem or "no decision: the reading is not in units of the loss, so no price can be set against it"
            return state, Plan(step, keep_all(groups), price={resource: price}, reason=why)
        widths = observation.widths, observation.dense_widths
        selection = start(cost, groups, reading.saliency, *widths, slew=self.slew)
        metered = None if self.price.relative else observation.metered.get(resource)
        correction = 1.0 if metered is None else metered / selection.total
        descend(selection, 0.0, ceiling=correction * price * (1 - self.hysteresis))
        dropped = selection.dropped()
        budget_met = self.schedule.settled(step, total_steps) and (
            not dropped or self.schedule.final(step, total_steps) or step == total_steps
        )
        less = f"dropped {these(sum(dropped.values()), len(dropped))}, each earning" if dropped else "nothing earns"
        return state, Plan(
            step=step,
            keep=selection.keep(),
            worth=selection.unit_worth(),
            price={resource: price},
            budget_met=budget_met,
            reason=f"{'done: ' if budget_met else ''}{less} less than the price of {price:.3g} {per(resource)}",
        )
