"""The priced controller: one price for all units, found so that spending follows the reference to the limit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, final

import numpy as np
from jaxtyping import Float64, Int64

from setpoint.controller.aim import Aim, Feedback, Gains, take_aim
from setpoint.controller.ladder import NO_GUARDS, Guards
from setpoint.controller.plan import Goal, Observation, Plan
from setpoint.controller.reason import apart, explain_cut, explain_rest, problem_with
from setpoint.controller.schedule import Schedule
from setpoint.controller.selection import (
    Allocation,
    Selection,
    add_back,
    block_savings,
    descend,
    even_density,
    landing_widths,
    marginal_worth,
    start,
    worth_by,
)
from setpoint.controller.swap import swap, trade
from setpoint.cost.cost import Cost
from setpoint.groups.follow import ByUnit
from setpoint.groups.group import Group, keep_all
from setpoint.messages import plain_fields

if TYPE_CHECKING:
    from setpoint.controller.offer import Offers

_BLOCKS_TO_LAND = 2  # blocks of mean size that are left for the last cut to choose from


@dataclass(frozen=True, eq=False)
class PricedState:
    """What the controller remembers between decisions."""

    # By group and active unit, decisions since the unit came back; as many as the dwell demands where it never left.
    age: Mapping[str, ByUnit[Int64[np.ndarray, " units"]]]
    # Dense cost in the unit of the limit, metered where there is a meter; None before the first decision.
    start: float | None = None
    feedback: Feedback = field(default_factory=Feedback)  # memory of the PI part
    price: float = 0.0  # last price
    metered: bool = False  # whether a meter has been read


@final
@dataclass(frozen=True)
class PricedController:
    """Drops the blocks whose worth is below the price, and finds the price that meets the budget.

    A block is `multiple_of` units of a group, the least salient first, and

        worth = summed saliency of the block / (cost.total(widths) - cost.total(widths without it)),

    the loss that a unit of resource earns there. Blocks are dropped in the order of worth, with savings weighed again
    after each pick, until predicted cost meets the target: the greedy solution of `min loss + price * cost`. The price
    is the worth at which it stops, divided by `1 - hysteresis`, so that every dropped block has `worth <= price * (1 -
    hysteresis)`. The target is the reference corrected by feedback (`Gains`); without a meter the two are equal. No
    dropped block fits back at the stop: predicted cost ends below the target by less than the smallest dropped block.
    Swaps of a coarse block for a finer one come nearer still. Where blocks are coarse, cuts on the way down stop two
    blocks above the limit, so that the last cut can choose a combination that comes near. A budget of the whole run
    bounds what a step may cost until the next decision (`Observation.ceiling`); reference and guards give way to it.

    From `settle` on every decision tries to meet the budget, and never goes over. Guards in the way are lifted there,
    one after the other: first the slew limit, then the density floor and the dwell; the plan's reason says so. With a
    meter the aim is half a dead-band below the limit, and the budget is met when the metered cost is within it.

    Saliencies of different groups cannot be compared where a reading is not calibrated. There `allocation="uniform"` is
    used: blocks are ranked by the share of the group that would be gone, and within a group by saliency. The densities
    of all groups stay alike. (Dividing by a group's mean saliency instead would starve groups whose saliencies are
    alike.) Worth and price are then shares, and nothing is swapped. Unless guards are lifted, no group goes below the
    width of an even cut to the budget. So no density ends further below the even one than the coarsest block, and only
    groups that cost little lie above it.

    With `regrow=True` dropped units rest in a reserve and are probed before a decision. A block of them comes back if

        probed worth = summed min(gain - its standard error, foretold saliency) / what the block costs
                     > price * (1 + hysteresis),

    at the price of the cut that pays for it. The foretold saliency is the sensor's reading of a unit once it is back.
    The worthiest blocks come back first, while they beat the price that results. A unit rests for `dwell` decisions
    before, stays for as many after, and comes back `returns` times at most. Before `schedule.land`, from where on
    nothing comes back, the budget does not count as met. Regrowth is off by default: it was measured to be no better.

    The defaults for `slew` and `min_density` guard against a whole layer being cut on one noisy reading. A group never
    ends below `min_density` times the density that would meet the limit if all groups had the same one.

    Args:
        schedule: trajectory and times of decisions.
        gains: of the PI part.
        hysteresis: relative distance between the price and the worth of what is dropped, in [0, 1).
        deadband: relative error within which the controller rests, in [0, 1).
        slew: largest fraction of a group's units to go at one decision, in (0, 1]; one block always may.
        dwell: decisions that a unit stays after it was brought back.
        min_density: least final density of a group, as a fraction of the density of a uniform cut.
        allocation: "worth", or "uniform" for the same density in all groups.
        regrow: whether dropped units may come back; with calibrated readings and allocation by worth only.
        probe_steps: optimizer steps before a decision in which resting units are present, where regrowth is on.
        returns: how often a unit may come back in a run.

    Raises:
        ValueError: for a setting out of range.

    >>> PricedController().due(1000, 10_000), PricedController().due(812, 10_000)
    (False, True)
    """

    schedule: Schedule = field(default_factory=Schedule)
    gains: Gains = field(default_factory=Gains)
    hysteresis: float = 0.1
    deadband: float = 0.01
    slew: float = 0.5
    dwell: int = 2
    min_density: float = 0.25
    allocation: Allocation = "worth"
    regrow: bool = False
    probe_steps: int = 4
    returns: int = 1

    def __post_init__(self) -> None:
        plain_fields(self)
        for name, good, wanted in (
            ("hysteresis", 0 <= self.hysteresis < 1, "is a fraction in [0, 1)"),
            ("deadband", 0 <= self.deadband < 1, "is a relative error in [0, 1)"),
            ("slew", 0 < self.slew <= 1, "is a fraction in (0, 1]"),
            ("dwell", self.dwell >= 0, "is a number of decisions, at least 0"),
            ("probe_steps", self.probe_steps >= 1, "is a number of optimizer steps, at least 1"),
            ("returns", self.returns >= 0, "is how often a unit may come back, at least 0"),
            ("min_density", 0 <= self.min_density <= 1, "is a fraction in [0, 1]"),
            ("allocation", self.allocation in ("worth", "uniform"), "must be 'worth' or 'uniform'"),
        ):
            if not good:
                raise ValueError(f"{name} {wanted}, got {getattr(self, name)!r}")

    @property
    def goal(self) -> Goal:
        return "budget"

    def init(self, groups: tuple[Group, ...]) -> PricedState:
        return PricedState(age={group.name: np.full(group.num_units, self.dwell, np.int64) for group in groups})

    def due(self, step: int, total_steps: int) -> bool:
        return self.schedule.due(step, total_steps)

    def probe_due(self, step: int, total_steps: int) -> bool:
        """Whether resting units should be present in the step after this one: shortly before a decision, if at all."""
        coming = range(step + 1, step + 1 + self.probe_steps)
        usable = (self.due(later, total_steps) and not self.schedule.final(later, total_steps) for later in coming)
        return self.regrow and any(usable)

    def decide(
        self, state: PricedState, observation: Observation, cost: Cost, groups: tuple[Group, ...]
    ) -> tuple[PricedState, Plan]:
        """The next state and the plan. Pure: same arguments, same answer."""
        metered = observation.metered.get(cost.resource)
        problem = problem_with(observation.reading, metered, groups)
        if metered is None and state.metered:
            problem = "no decision: the meter that was read before is missing"
        if problem:
            keep = keep_all(groups)
            return state, Plan(observation.step, keep, price={cost.resource: state.price}, reason=problem)
        assert observation.reading is not None
        aim = self._aim(state, observation, cost)
        age = {name: np.minimum(values + 1, self.dwell) for name, values in state.age.items()}
        choice = self._choose(state, observation, cost, groups, aim)
        state = replace(state, start=aim.start, feedback=aim.feedback, metered=metered is not None, age=age)
        if choice is None:
            price = 0.0 if aim.start <= aim.limit and aim.spent <= aim.target else state.price
            state = replace(state, price=price)
            return state, self._rest(state, observation, aim, groups)
        selection, note, offers = choice
        state = replace(state, price=self._price(state, selection))
        return state, self._cut(state, observation, aim, selection, note, offers)

    def transferred(
        self, state: PricedState, *, step: int, total_steps: int, present: float, limit: float
    ) -> PricedState:
        """The state whose reference passes through what a step costs now, and comes down from there to the new limit.

        The PI part and the price are kept: they are relative.
        """
        if state.start is None:
            return state
        value = present * state.feedback.factor()
        return replace(state, start=self.schedule.start_through(step, total_steps, value=value, limit=limit))

    def reordered(
        self,
        state: PricedState,
        plan: Plan,
        observation: Observation,
        cost: Cost,
        groups: tuple[Group, ...],
        saliency: Mapping[str, Float64[np.ndarray, " _units"]],
    ) -> Plan:
        """A plan with another choice of what goes: in the order of these saliencies in place of the reading's.

        Price, what comes back and where spending goes are the plan's, and so are the guards. Worth is that of the
        reading's saliencies. `state` is the one that the plan was made from, on the same observation.
        """
        reading = observation.reading
        assert reading is not None
        aim = self._aim(state, observation, cost)
        guards = self._guards(observation, cost, groups, aim)
        offers = self._offers(observation, cost, groups) if plan.grows() else None
        offers = None if offers is None else offers.among(plan.grow)
        seen = replace(observation, reading=replace(reading, saliency=saliency))
        selection, note = self._select(state, seen, cost, groups, aim, guards, offers)
        selection.worth = {name: worth_by(selection, name, reading.saliency[name]) for name in selection.ladders}
        return self._cut(replace(state, price=plan.price[cost.resource]), observation, aim, selection, note, offers)

    def _choose(
        self, state: PricedState, observation: Observation, cost: Cost, groups: tuple[Group, ...], aim: Aim
    ) -> tuple[Selection, str, Offers | None] | None:
        """What goes, a note on it, and what comes back for it; None where spending is right and nothing comes back."""
        offers = self._offers(observation, cost, groups)
        if offers is None and aim.rests(self.deadband):
            return None
        guards = self._guards(observation, cost, groups, aim)

        def select(chosen: Offers | None) -> tuple[Selection, str, Offers | None]:
            return (*self._select(state, observation, cost, groups, aim, guards, chosen), chosen)

        def pays(choice: tuple[Selection, str, Offers | None]) -> bool:
            selection, note, chosen = choice
            assert chosen is not None
            price = self._price(state, selection) * (1 + self.hysteresis)
            return selection.total <= aim.paid and chosen.blocks[-1].worth > price and not (aim.settled and note)

        best = None if offers is None else offers.most_that_pay(select, pays)
        return select(None) if best is None and not aim.rests(self.deadband) else best

    def _offers(self, observation: Observation, cost: Cost, groups: tuple[Group, ...]) -> Offers | None:
        """Blocks that may come back; none late, without a probe, or where saliencies cannot be compared with gains."""
        reading, probe = observation.reading, observation.probe
        if self._final(observation) or probe is None or reading is None or not reading.calibrated:
            return None
        if self.allocation != "worth":
            return None
        # Here, since only runs with regrowth need it.
        from setpoint.controller.offer import offers_of

        settings = {"dwell": self.dwell, "returns": self.returns, "num_samples": reading.num_samples}
        offers = offers_of(probe, cost, observation.widths, groups, slew=self.slew, **settings)
        return offers if offers.blocks else None

    def _final(self, observation: Observation) -> bool:
        return not self.regrow or self.schedule.final(observation.step, observation.planned_steps)

    def _price(self, state: PricedState, selection: Selection) -> float:
        """The worth at which dropping stops, or the last price where nothing is dropped."""
        return marginal_worth(selection) / (1 - self.hysteresis) if any(selection.rungs.values()) else state.price

    def _aim(self, state: PricedState, observation: Observation, cost: Cost) -> Aim:
        return take_aim(
            observation,
            cost,
            schedule=self.schedule,
            gains=self.gains,
            deadband=self.deadband,
            start=state.start,
            feedback=state.feedback,
        )

    def _guards(self, observation: Observation, cost: Cost, groups: tuple[Group, ...], aim: Aim) -> Guards:
        """What this decision must leave: a share of an even cut's densities, or, where cuts are even, all of them."""
        if self._allocation(observation) == "uniform":
            limit = min(aim.landing, aim.goal)
            floor = landing_widths(cost, observation.widths, observation.dense_widths, groups, limit)
        else:
            density = (
                even_density(cost, observation.widths, observation.dense_widths, groups, aim.landing) * self.min_density
            )
            floor = {name: math.ceil(density * width) for name, width in observation.dense_widths.items()}
        return Guards(self.slew, floor, self.dwell)

    def _allocation(self, observation: Observation) -> Allocation:
        calibrated = observation.reading is not None and observation.reading.calibrated
        return self.allocation if calibrated else "uniform"

    def _rest(self, state: PricedState, observation: Observation, aim: Aim, groups: tuple[Group, ...]) -> Plan:
        seen = aim.spent if aim.metered is None else aim.metered
        budget_met = self._final(observation) and seen <= aim.limit and (aim.settled or aim.metered is None)
        return Plan(
            step=observation.step,
            keep=keep_all(groups),
            price={aim.resource: state.price},
            reference={aim.resource: aim.reference},
            budget_met=budget_met,
            reason=explain_rest(seen, aim.reference, aim.limit, budget_met),
        )

    def _select(
        self,
        state: PricedState,
        observation: Observation,
        cost: Cost,
        groups: tuple[Group, ...],
        aim: Aim,
        guards: Guards,
        offers: Offers | None,
    ) -> tuple[Selection, str]:
        """Choose what goes if these come back: on the way down, or landing with guards lifted that would miss."""
        reading, allocation = observation.reading, self._allocation(observation)
        assert reading is not None
        widths = observation.widths if offers is None else offers.widened(observation.widths)

        def nothing(guards: Guards) -> Selection:
            ladders = guards.ladders(groups, reading, observation.dense_widths, state.age)
            return start(cost, ladders, widths, allocation)

        if not aim.settled:
            selection = nothing(guards)
            target = max(aim.target, aim.landing + _BLOCKS_TO_LAND * block_savings(selection))
            self._descend(selection, min(target, aim.ceiling), land=False)
            if selection.total <= aim.ceiling:
                return selection, "the last blocks are left for the last cut" if target > aim.target else ""
        selection, lifted = nothing(guards), ""
        if not self._descend(selection, aim.goal, land=True):
            selection, lifted = nothing(guards.without_slew()), "the slew limit (units per cut) was lifted"
            if not self._descend(selection, aim.goal, land=True):
                unguarded = nothing(NO_GUARDS)
                if self._descend(unguarded, aim.goal, land=True) or aim.ceiling < math.inf:
                    selection, lifted = unguarded, "slew limit, density floor and dwell were lifted"
        return selection, lifted and f"{lifted} to reach the budget"

    def _descend(self, selection: Selection, target: float, *, land: bool) -> bool:
        """Come down to the target as nearly as blocks allow; False where guards or `min_units` are in the way."""
        descend(selection, target)
        if selection.total > target:
            return False
        add_back(selection, target)
        if selection.allocation == "worth":  # exchanges by saliency would undo an even cut
            swap(selection, target, self.deadband)
            if land:
                trade(selection, target, self.deadband)
        return True

    def _cut(
        self,
        state: PricedState,
        observation: Observation,
        aim: Aim,
        selection: Selection,
        note: str,
        offers: Offers | None,
    ) -> Plan:
        ladders = selection.ladders
        budget_met = self._final(observation) and aim.metered is None and selection.total <= aim.limit
        dense = observation.dense[aim.resource]
        reason = explain_cut(selection, state.price, aim, dense, budget_met, self.deadband)
        if offers is not None:
            reason += f"; {offers.explained()}"
        if aim.metered is not None:
            reason += f"; the meter reads {apart(aim.metered / aim.spent - 1, 'the prediction')}"
        return Plan(
            step=observation.step,
            keep={name: ladder.keep(selection.rungs[name]) for name, ladder in ladders.items()},
            worth={name: ladder.per_unit(selection.worth[name]) for name, ladder in ladders.items()},
            price={aim.resource: state.price},
            reference={aim.resource: aim.reference},
            budget_met=budget_met,
            reason=f"{reason}; {note}" if note else reason,
            grow={} if offers is None else offers.grow(),
            grow_worth={} if offers is None else offers.worth(),
        )
