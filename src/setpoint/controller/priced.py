"""The priced controller: one price for all units, found so that spending follows the reference to the limit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, final

import numpy as np
from jaxtyping import Float64, Int64

from setpoint.controller.plan import Conduct, Controller, Observation, Plan, per, problem_with, these
from setpoint.controller.schedule import Schedule
from setpoint.controller.selection import ROUNDING, Allocation, Selection, even_density, landing_widths, reach, start
from setpoint.cost.budget import DENSE
from setpoint.cost.cost import Cost
from setpoint.groups.follow import ByUnit
from setpoint.groups.group import Group, keep_all
from setpoint.messages import plain_fields
from setpoint.sensor.reading import Reading

if TYPE_CHECKING:  # only runs with regrowth load it
    from setpoint.controller.offer import Offers

_BLOCKS_TO_LAND = 2  # blocks of mean size that are left for the last cut to choose from


@dataclass(frozen=True)
class Gains:
    """Gains of the PI part, per unit of relative cost error, hence without dimension.

    Every decision aims at the *predicted* cost `target = reference * exp(-u)`, with

        u = kp * e + ki * sum(e),    e = ln(metered / expected)

    where `expected` is `predicted * exp(u)` at the present widths, with u of the last decision. Cost and price act as
    factors, so the logarithm makes the loop exactly linear, and the loop gain is 1 for any model: the price follows as
    the worth at which predicted cost meets the target. What a decision could not reach (block size, slew limit, dwell,
    floors) is in the widths, so it is no error: that is the anti-windup.

    If the meter reads `factor` times the prediction, `e[k+1] = ln(factor) - u[k]`, so

        e[k+1] = (1 - kp - ki) * e[k] + kp * e[k-1].

    With kp >= 0 and kp + ki <= 1 both coefficients are non-negative, so e never changes sign: no overshoot, which
    matters because a cut cannot be taken back. The defaults take out 60 % of a sudden change at the next decision, 99 %
    within eight, follow a drift of d per decision with a lag of `d / ki`, and pass about 0.4 of a meter's variance.

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
        """Memory after one decision; inside the dead-band, of this relative width around 0, nothing is integrated."""
        if abs(error) <= deadband / 2:
            return self
        integral = self.integral + gains.ki * error
        return Feedback(integral, integral + gains.kp * error)


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
class PricedController(Controller[PricedState]):
    """Drops the blocks whose worth is below the price, and finds the price that meets the budget.

    A block is `multiple_of` units of a group, the least salient first, and

        worth = summed saliency of the block / (cost.total(widths) - cost.total(widths without it)),

    the loss that a unit of resource earns there. Blocks are dropped in the order of worth, with savings weighed again
    after each pick, until predicted cost meets the target: the greedy solution of `min loss + price * cost`. The price
    is the worth at which it stops, divided by `1 - hysteresis`. The target is the reference corrected by feedback
    (`Gains`); without a meter the two are equal. No dropped block fits back at the stop, and swaps of a coarse block
    for a finer one come nearer still. Cuts on the way down stop two blocks above the limit, so that the last cut can
    choose a combination that comes near. Reference and guards give way to what a budget of the whole run allows a step
    (`Observation.ceiling`).

    From `settle` on every decision tries to meet the budget, and never goes over. Guards in the way are lifted there,
    one after the other: first the slew limit, then the density floor and the dwell; the plan's reason says so. With a
    meter the aim is half a dead-band and the margin below the limit, and nothing is cut for a reading that is half of
    the margin below it.

    Where a reading is not calibrated, saliencies of different groups cannot be compared, and `allocation="uniform"` is
    used: blocks are ranked by the share of the group that would be gone, and within a group by saliency. Worth and
    price are then shares, and nothing is swapped. Unless guards are lifted, no group goes below the width of an even
    cut to the budget.

    With `regrow=True` dropped units rest in a reserve and are probed before a decision. A block of them comes back if

        probed worth = summed min(gain - its standard error, foretold saliency) / what the block costs
                     > price * (1 + hysteresis),

    at the price of the cut that pays for it, the worthiest first. The foretold saliency is the sensor's reading of a
    unit once it is back. A unit rests for `dwell` decisions before, stays for as many after, and comes back `returns`
    times at most. Before `schedule.land`, from where on nothing comes back, the budget does not count as met. Regrowth
    is off by default: it was measured to be no better.

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
        margin: how far below the limit a metered cost is to land, relatively, since two readings differ; in [0, 1).

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
    margin: float = 0.0

    def __post_init__(self) -> None:
        plain_fields(self)
        for name, good, wanted in (
            ("hysteresis", 0 <= self.hysteresis < 1, "is a fraction in [0, 1)"),
            ("deadband", 0 <= self.deadband < 1, "is a relative error in [0, 1)"),
            ("margin", 0 <= self.margin < 1, "is a relative error in [0, 1)"),
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
    def conduct(self) -> Conduct:
        return Conduct(self.schedule, regrow=self.regrow, yields=not self.schedule.first)

    def init(self, groups: tuple[Group, ...]) -> PricedState:
        return PricedState(age={group.name: np.full(group.num_units, self.dwell, np.int64) for group in groups})

    def probe_due(self, step: int, total_steps: int) -> bool:
        coming = range(step + 1, step + 1 + self.probe_steps)
        usable = (self.due(later, total_steps) and not self.schedule.final(later, total_steps) for later in coming)
        return self.regrow and any(usable)

    def decide(
        self, state: PricedState, observation: Observation, cost: Cost, groups: tuple[Group, ...]
    ) -> tuple[PricedState, Plan]:
        metered = observation.metered.get(cost.resource)
        problem = problem_with(observation.reading, groups)
        if metered is None and state.metered:
            problem = "no decision: the meter that was read before is missing"
        elif metered is not None and not (math.isfinite(metered) and metered > 0):
            problem = problem or f"no decision: the meter reads {metered!r}"
        if problem:
            return state, Plan(observation.step, keep_all(groups), price={cost.resource: state.price}, reason=problem)
        decision = self._decision(state, observation, cost, groups)
        aim, choice = decision.aim, decision.choose()
        age = {name: np.minimum(values + 1, self.dwell) for name, values in state.age.items()}
        state = replace(state, start=aim.start, feedback=aim.feedback, metered=metered is not None, age=age)
        if choice is None:
            price = 0.0 if aim.start <= aim.limit and aim.spent <= aim.target else state.price
            return replace(state, price=price), decision.rest(price)
        price = decision.price(choice.selection)
        return replace(state, price=price), decision.cut(choice, price)

    def transferred(
        self, state: PricedState, *, step: int, total_steps: int, present: float, limit: float
    ) -> PricedState:
        if state.start is None:
            return state
        value = present * state.feedback.factor()
        # The reference comes down from here to the new limit; the PI part and the price are kept: they are relative.
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

        All else is the plan's, also the worth, which is that of the reading. `state` and `observation` are those that
        the plan was made from.
        """
        decision = self._decision(state, observation, cost, groups)
        offers = decision.offers() if plan.grows() else None
        choice = decision.select(None if offers is None else offers.among(plan.grow), saliency)
        choice.selection.revalued(decision.reading.saliency)
        return decision.cut(choice, plan.price[cost.resource])

    def _decision(
        self, state: PricedState, observation: Observation, cost: Cost, groups: tuple[Group, ...]
    ) -> _Decision:
        """Take in the error that the meter shows, and place the target.

        Without a meter the prediction is exact. With one, what is predicted to cost x is expected to cost `x *
        feedback.factor()`, and once the reference is at the limit the aim is half a dead-band below it.
        """
        resource, step, total_steps = cost.resource, observation.step, observation.planned_steps
        limit, metered = observation.limit[resource], observation.metered.get(resource)
        spent = cost.total(observation.widths)
        ratio = 1.0 if metered is None else metered / spent
        start = observation.dense[resource] * ratio if state.start is None else state.start
        feedback = state.feedback.updated(state.feedback.error(ratio, 1.0), self.gains, self.deadband)
        settled = self.schedule.settled(step, total_steps)
        reference = self.schedule.at(step, total_steps, start=start, limit=limit)
        target = reference / feedback.factor()
        if metered is not None and reference == limit:
            target *= 1 - self.deadband / 2 - self.margin
        if metered is None and settled:
            target = min(target, limit)
        ceiling = observation.ceiling.get(resource, math.inf) / ratio
        target, landing = min(target, ceiling), limit / feedback.factor()
        aim = Aim(start, limit, reference, metered, spent, target, landing, ceiling, settled, feedback)
        return _Decision(self, state, observation, cost, groups, aim)


@dataclass(frozen=True)
class Aim:
    """Where one decision is heading; `start`, `limit`, `reference` and `metered` as metered, all else as predicted."""

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
        """What a decision must not end above."""
        return self.target if self.settled else self.ceiling

    @property
    def paid(self) -> float:
        """What the model may cost where units come back: never more than now."""
        return min(self.target if self.settled else max(self.target, self.spent), self.ceiling)

    def rests(self, deadband: float, margin: float) -> bool:
        """Whether spending is where it should be: within the limit at the end, within the dead-band on the way."""
        if self.spent > self.ceiling:
            return False
        if self.settled and self.metered is not None:
            return self.metered <= self.limit * (1 - margin / 2) or self.spent <= self.target
        return self.spent <= self.target * (1 if self.settled else 1 + deadband)


@dataclass(frozen=True, eq=False)
class _Choice:
    selection: Selection  # what goes
    note: str  # on the choice, for people
    offers: Offers | None  # what comes back for it


@dataclass(frozen=True, eq=False)
class _Decision:
    """One decision: the controller with its state, what it sees, and where it is heading."""

    settings: PricedController
    state: PricedState
    seen: Observation
    cost: Cost
    groups: tuple[Group, ...]
    aim: Aim

    @property
    def reading(self) -> Reading:
        assert self.seen.reading is not None
        return self.seen.reading

    @property
    def allocation(self) -> Allocation:
        return self.settings.allocation if self.reading.calibrated else "uniform"

    @property
    def final(self) -> bool:
        """Whether nothing comes back any more."""
        schedule = self.settings.schedule
        return not self.settings.regrow or schedule.final(self.seen.step, self.seen.planned_steps)

    @cached_property
    def floor(self) -> Mapping[str, int]:
        """The widths that must remain: a share of an even cut's densities, or, where cuts are even, all of them."""
        even = self.cost, self.seen.widths, self.seen.dense_widths, self.groups
        if self.allocation == "uniform":
            return landing_widths(*even, min(self.aim.landing, self.aim.goal))
        density = even_density(*even, self.aim.landing) * self.settings.min_density
        return {name: math.ceil(density * width) for name, width in self.seen.dense_widths.items()}

    def choose(self) -> _Choice | None:
        """What goes, and what comes back for it; None where spending is right and nothing comes back."""
        offers = self.offers()
        best = None if offers is None else offers.most_that_pay(self.select, self.pays)
        if best is None and not self.aim.rests(self.settings.deadband, self.settings.margin):
            best = self.select(None)
        return best

    def offers(self) -> Offers | None:
        """Blocks that may come back; none late, without a probe, or where saliencies cannot be compared with gains."""
        settings, probe, reading = self.settings, self.seen.probe, self.reading
        if self.final or probe is None or not reading.calibrated or settings.allocation != "worth":
            return None
        # Here, since only runs with regrowth need it.
        from setpoint.controller.offer import offers_of

        bounds = {"dwell": settings.dwell, "returns": settings.returns, "num_samples": reading.num_samples}
        offers = offers_of(probe, self.cost, self.seen.widths, self.groups, slew=settings.slew, **bounds)
        return offers if offers.blocks else None

    def pays(self, choice: _Choice) -> bool:
        """Whether the least worthy block that comes back beats the price that results, and nothing is lifted for it."""
        assert choice.offers is not None
        price = self.price(choice.selection) * (1 + self.settings.hysteresis)
        held = choice.selection.total <= self.aim.paid and not (self.aim.settled and choice.note)
        return held and choice.offers.blocks[-1].worth > price

    def price(self, selection: Selection) -> float:
        """The worth at which dropping stops, or the last price where nothing is dropped."""
        dropped = any(selection.rungs.values())
        return selection.marginal_worth() / (1 - self.settings.hysteresis) if dropped else self.state.price

    def select(
        self, offers: Offers | None, saliency: Mapping[str, Float64[np.ndarray, " _units"]] | None = None
    ) -> _Choice:
        """Choose what goes if these come back: on the way down, or landing with guards lifted that would miss."""
        aim, settings, deadband = self.aim, self.settings, self.settings.deadband
        widths = self.seen.widths if offers is None else offers.widened(self.seen.widths)
        values = self.reading.saliency if saliency is None else saliency
        # Balanced states are other ones at each reading, so that none of them has an age.
        rested = {n: (age >= settings.dwell) | (n in self.reading.basis) for n, age in self.state.age.items()}

        def nothing(slew: float, *, guarded: bool = True) -> Selection:
            floor, free = (self.floor, rested) if guarded else ({}, {})
            where = widths, self.seen.dense_widths, self.allocation
            return start(self.cost, self.groups, values, *where, floor=floor, slew=slew, free=free)

        # The first cut is most of the way: a limit for each cut would make it even.
        slew = 1.0 if self.state.start is None and settings.schedule.first else settings.slew
        if not aim.settled:
            selection = nothing(slew)
            target = max(aim.target, aim.landing + _BLOCKS_TO_LAND * _mean_block(selection))
            reach(selection, min(target, aim.ceiling), deadband, trades=False)
            if selection.total <= aim.ceiling:
                note = "the last blocks are left for the last cut" if target > aim.target else ""
                return _Choice(selection, note, offers)
        selection, lifted = nothing(slew), ""
        if not reach(selection, aim.goal, deadband):
            selection, lifted = nothing(1.0), "the slew limit (units per cut) was lifted"
            if not reach(selection, aim.goal, deadband):
                unguarded = nothing(1.0, guarded=False)
                if reach(unguarded, aim.goal, deadband) or aim.ceiling < math.inf:
                    selection, lifted = unguarded, "slew limit, density floor and dwell were lifted"
        # Clocks like round widths; and what a cut leaves of the budget of a run pays for later steps.
        counted = self.seen.limit.keys() <= {"flops", "params", "joint"} and not self.seen.remaining
        if counted and self.final and selection.total < (1 - ROUNDING) * aim.goal:
            from setpoint.controller.finer import refined  # here, since most last cuts are made in whole blocks

            selection = refined(selection, self.groups, values, aim.goal)
        return _Choice(selection, lifted and f"{lifted} to reach the budget", offers)

    def rest(self, price: float) -> Plan:
        """The plan that drops nothing."""
        aim = self.aim
        seen = aim.spent if aim.metered is None else aim.metered
        budget_met = self.final and seen <= aim.limit and (aim.settled or aim.metered is None)
        reason = f"nothing to drop: cost is {_apart(seen / aim.reference - 1, 'the reference')}"
        if budget_met:
            reason = f"budget met: cost is {_apart(seen / aim.limit - 1, 'the budget')}"
        return self._plan(keep_all(self.groups), price, budget_met, reason)

    def cut(self, choice: _Choice, price: float) -> Plan:
        aim, selection, offers = self.aim, choice.selection, choice.offers
        budget_met = self.final and aim.metered is None and selection.total <= aim.limit
        reason = self._explained(selection, price, budget_met)
        plan = self._plan(selection.keep(), price, budget_met, reason)
        if offers is not None:
            grow = offers.grow()
            units, worth = sum(map(len, grow.values())), offers.blocks[-1].worth
            reason += f"; brought back {these(units, len(grow))}, worth at least {worth:.3g} by their probe"
            plan = replace(plan, grow=grow, grow_worth=offers.worth())
        if aim.metered is not None:
            reason += f"; the meter reads {_apart(aim.metered / aim.spent - 1, 'the prediction')}"
        reason = f"{reason}; {choice.note}" if choice.note else reason
        return replace(plan, worth=selection.unit_worth(), reason=reason)

    def _plan(self, keep: Mapping[str, np.ndarray], price: float, budget_met: bool, reason: str) -> Plan:
        resource, reference = self.cost.resource, {self.cost.resource: self.aim.reference}
        return Plan(
            self.seen.step, keep, price={resource: price}, reference=reference, budget_met=budget_met, reason=reason
        )

    def _explained(self, selection: Selection, price: float, budget_met: bool) -> str:
        """What is left and what is dropped, up to the first semicolon; then the price and how near the reference is."""
        aim, resource, dropped = self.aim, self.cost.resource, selection.dropped()
        reference = "the reference" if math.isclose(aim.target, aim.reference) else "the corrected reference"
        off = selection.total / aim.target - 1
        left = f"{100 * selection.total / self.seen.dense[resource]:.1f} % of the {DENSE.get(resource, resource)}"
        near = _apart(off, reference)
        feet = sum(not selection.left(name) for name in selection.ladders)
        if feet and (off > 0 or not dropped):
            near += f" ({feet} of {len(selection.ladders)} groups cannot be cut further at this step)"
        if not dropped:
            return f"nothing dropped: {left}, {near}"
        what = f"dropped {these(sum(dropped.values()), len(dropped))}"
        words = f"budget met: {left}; {what}" if budget_met and off <= 0 else f"{what}, {left} are left"
        words += f"; {near}; the price is {price:.3g}{' of loss' * self.reading.in_loss} {per(resource)}"
        if -off > self.settings.deadband:
            finest = 100 * min(selection.regained(name) for name in dropped) / aim.target
            words += (
                f"; the smallest dropped block costs {finest:.1f} % of {reference}, which is too much to bring it back"
            )
        return words


def _mean_block(selection: Selection) -> float:
    """Mean saving of the next block of each group; 0 where there is none."""
    savings = [selection.next_saving(name) for name in selection.rungs if selection.left(name)]
    return sum(savings) / len(savings) if savings else 0.0


def _apart(fraction: float, what: str) -> str:
    """A relative difference, such as "1.2 % below the budget"."""
    return f"{100 * abs(fraction):.1f} % {'above' if fraction > 0 else 'below'} {what}"
