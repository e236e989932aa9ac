"""The priced controller: one price for all units, found so that spending follows the reference to the limit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import final

import numpy as np
from jaxtyping import Bool, Int64

from setpoint.controller.exchange import swap, trade
from setpoint.controller.ladder import Ladder, build_ladder
from setpoint.controller.plan import Observation, Plan
from setpoint.controller.price import Feedback, Gains
from setpoint.controller.reason import explain_cut, explain_rest, percent, problem_with
from setpoint.controller.reference import Reference
from setpoint.controller.selection import (
    Allocation,
    Selection,
    add_back,
    block_savings,
    cheapest,
    descend,
    marginal_worth,
    start,
)
from setpoint.cost.cost import Cost
from setpoint.groups.group import Group
from setpoint.sensor.reading import Reading

_BLOCKS_TO_LAND = 2  # blocks of mean size that are left for the last cut to choose from

__all__ = ["PricedController", "PricedState", "cheapest"]


@dataclass(frozen=True, eq=False)
class PricedState:
    """What the controller remembers between decisions.

    Args:
        dense: width of each group before any cut.
        age: by group and active unit, decisions since the unit came back; units that never left are
            as old as the dwell demands.
        start: dense cost in the unit of the limit, metered where there is a meter; None before the
            first decision.
        feedback: memory of the PI part.
        price: last price.
        metered: whether a meter has been read.
    """

    dense: Mapping[str, int]
    age: Mapping[str, Int64[np.ndarray, " units"]]
    start: float | None = None
    feedback: Feedback = field(default_factory=Feedback)
    price: float = 0.0
    metered: bool = False


@dataclass(frozen=True)
class _Aim:
    """Where one decision is heading, all but `limit` and `reference` in predicted cost."""

    resource: str
    limit: float
    reference: float
    target: float
    spent: float
    metered: float | None
    settled: bool


@final
@dataclass(frozen=True)
class PricedController:
    """Drops the blocks whose worth is below the price, and finds the price that meets the budget.

    A block is `multiple_of` units of a group, the least salient first, and

        worth = summed saliency of the block / (cost.total(widths) - cost.total(widths without it)),

    the loss that a unit of resource earns there. Dropping in the order of worth, with savings weighed
    again after each pick, until predicted cost meets the target, is the greedy solution of
    `min loss + price * cost`; the price is the worth at which it stops, divided by `1 - hysteresis`, so
    that every dropped block has `worth <= price * (1 - hysteresis)`. The target is the reference
    corrected by feedback (`Gains`); without a meter the prediction is exact and so is the stop. At every
    stop no single dropped block can be given back within the target, and swaps of a coarse block for a
    finer one come nearer still: predicted cost ends below the target by less than the smallest block
    that was dropped. Where blocks are coarse, cuts on the way down stop two blocks above the limit, so
    that the last one can choose a combination that comes near.

    From `settle` on every decision tries to land: within the limit, never over. Guards that would make it
    miss are lifted there, one after the other: first the slew limit, then the density floor and the dwell;
    the plan's reason says so. With a meter the aim is half a dead-band below the limit, and the plan
    that finds the metered cost within the limit is the one that lands.

    With a reading that is not calibrated, saliencies of different groups cannot be compared. Then
    `allocation="uniform"` is used: blocks are ranked by the share of the group that would be gone, which
    keeps the densities of all groups alike, and within a group by saliency. (Dividing by a group's mean
    saliency instead would starve groups whose saliencies are alike.) Worth and price are then shares.

    The defaults for `slew` and `min_density` guard against a whole layer being cut on one noisy reading.
    A group never ends below `min_density` times the density that would meet the limit if all groups had
    the same one, so allocation may differ by that factor; a quarter of it leaves room for what pays.

    Args:
        reference: trajectory and times of decisions.
        gains: of the PI part.
        hysteresis: relative distance between the price and the worth of what is dropped, in [0, 1).
        deadband: relative error within which the controller rests, in [0, 1).
        slew: largest fraction of a group's units to go at one decision, in (0, 1]; one block always may.
        dwell: decisions that a unit stays after it was brought back.
        min_density: least final density of a group, as a fraction of the density of a uniform cut.
        allocation: "worth", or "uniform" for the same density in all groups.

    Raises:
        ValueError: for a setting out of range.

    >>> PricedController().due(1000, 10_000), PricedController().due(812, 10_000)
    (False, True)
    """

    reference: Reference = field(default_factory=Reference)
    gains: Gains = field(default_factory=Gains)
    hysteresis: float = 0.1
    deadband: float = 0.01
    slew: float = 0.5
    dwell: int = 2
    min_density: float = 0.25
    allocation: Allocation = "worth"

    def __post_init__(self) -> None:
        if not 0 <= self.hysteresis < 1:
            raise ValueError(f"hysteresis is a fraction in [0, 1), got {self.hysteresis!r}")
        if not 0 <= self.deadband < 1:
            raise ValueError(f"deadband is a relative error in [0, 1), got {self.deadband!r}")
        if not 0 < self.slew <= 1:
            raise ValueError(f"slew is a fraction in (0, 1], got {self.slew!r}")
        if self.dwell < 0:
            raise ValueError(f"dwell is a number of decisions, at least 0, got {self.dwell!r}")
        if not 0 <= self.min_density <= 1:
            raise ValueError(f"min_density is a fraction in [0, 1], got {self.min_density!r}")
        if self.allocation not in ("worth", "uniform"):
            raise ValueError(f"allocation must be 'worth' or 'uniform', got {self.allocation!r}")

    def init(self, groups: tuple[Group, ...]) -> PricedState:
        """State before the first decision."""
        return PricedState(
            dense={group.name: group.num_units for group in groups},
            age={group.name: np.full(group.num_units, self.dwell, dtype=np.int64) for group in groups},
        )

    def due(self, step: int, total_steps: int) -> bool:
        """Whether a decision is to be made after this step."""
        return self.reference.due(step, total_steps)

    def cut(self, state: PricedState, keep: Mapping[str, Bool[np.ndarray, " units"]]) -> PricedState:
        """State of the kept units, after the plan has been carried out."""
        age = {name: values[keep[name]] if name in keep else values for name, values in state.age.items()}
        return replace(state, age=age)

    def decide(
        self, state: PricedState, observation: Observation, cost: Cost, groups: tuple[Group, ...]
    ) -> tuple[PricedState, Plan]:
        """The next state and the plan. Pure: same arguments, same answer.

        Args:
            state: from `init` or the last decision, cut like the groups.
            observation: what is known at this step; its metered cost must belong to the present widths.
            cost: predicts spending; names the resource.
            groups: the groups that may be cut, as they are now.
        """
        metered = observation.metered.get(cost.resource)
        problem = problem_with(observation.reading, metered, groups)
        if metered is None and state.metered:
            problem = "no decision: the meter that was read before is missing"
        if problem:
            keep = {group.name: np.ones(group.num_units, dtype=bool) for group in groups}
            return state, Plan(observation.step, keep, price={cost.resource: state.price}, reason=problem)
        assert observation.reading is not None
        state, aim = self._aim(state, observation, cost, metered)
        age = {name: np.minimum(values + 1, self.dwell) for name, values in state.age.items()}
        if self._rests(aim):
            price = 0.0 if (state.start or 0.0) <= aim.limit and aim.spent <= aim.target else state.price
            state = replace(state, age=age, price=price)
            return state, self._rest(state, observation, aim, groups)
        selection, note = self._select(state, observation, cost, groups, aim)
        taken = any(selection.rungs.values())
        price = marginal_worth(selection) / (1 - self.hysteresis) if taken else state.price
        state = replace(state, age=age, price=price)
        return state, self._cut(state, observation, aim, selection, note)

    def _aim(
        self, state: PricedState, observation: Observation, cost: Cost, metered: float | None
    ) -> tuple[PricedState, _Aim]:
        """Update the feedback and place the target."""
        resource = cost.resource
        limit, spent = observation.limit[resource], cost.total(observation.widths)
        ratio = 1.0 if metered is None else metered / spent
        start = observation.dense[resource] * ratio if state.start is None else state.start
        error = state.feedback.error(metered=ratio, predicted=1.0)
        feedback = state.feedback.updated(error, self.gains, self.deadband)
        settled = self.reference.settled(observation.step, observation.total_steps)
        reference = self.reference.at(observation.step, observation.total_steps, start=start, limit=limit)
        target = reference / feedback.factor()
        if metered is not None and reference == limit:
            target *= 1 - self.deadband / 2
        if metered is None and settled:
            target = min(target, limit)
        aim = _Aim(resource, limit, reference, target, spent, metered, settled)
        return replace(state, start=start, feedback=feedback, metered=metered is not None), aim

    def _rests(self, aim: _Aim) -> bool:
        """Whether spending is where it should be: within the limit at the end, within the dead-band on the way."""
        if aim.settled and aim.metered is not None:
            return aim.metered <= aim.limit or aim.spent <= aim.target
        return aim.spent <= aim.target * (1 if aim.settled else 1 + self.deadband)

    def _rest(self, state: PricedState, observation: Observation, aim: _Aim, groups: tuple[Group, ...]) -> Plan:
        """The plan that drops nothing."""
        seen = aim.spent if aim.metered is None else aim.metered
        landed = seen <= aim.limit and (aim.settled or aim.metered is None)
        return Plan(
            step=observation.step,
            keep={group.name: np.ones(group.num_units, dtype=bool) for group in groups},
            price={aim.resource: state.price},
            reference={aim.resource: aim.reference},
            landed=landed,
            reason=explain_rest(seen, aim.reference, aim.limit, landed),
        )

    def _select(
        self, state: PricedState, observation: Observation, cost: Cost, groups: tuple[Group, ...], aim: _Aim
    ) -> tuple[Selection, str]:
        """Choose what goes: on the way down, or landing with guards lifted where they would miss the limit."""
        landing = aim.limit / state.feedback.factor()
        density = _uniform_density(cost, observation.widths, state.dense, groups, landing)

        def nothing(slew: float, min_density: float, dwell: int) -> Selection:
            reading = observation.reading
            assert reading is not None
            ladders = _ladders(state, reading, groups, slew, min_density * density, dwell)
            return start(cost, ladders, observation.widths, self.allocation if reading.calibrated else "uniform")

        if not aim.settled:
            selection = nothing(self.slew, self.min_density, self.dwell)
            target = max(aim.target, landing + _BLOCKS_TO_LAND * block_savings(selection))
            self._descend(selection, target, land=False)
            return selection, "what is left to drop is left for the landing" if target > aim.target else ""
        selection, lifted = nothing(self.slew, self.min_density, self.dwell), ""
        if not self._descend(selection, aim.target, land=True):
            selection, lifted = nothing(1.0, self.min_density, self.dwell), "slew limit lifted"
            if not self._descend(selection, aim.target, land=True):
                unguarded = nothing(1.0, 0.0, 0)
                if self._descend(unguarded, aim.target, land=True):
                    selection, lifted = unguarded, "slew limit, density floor and dwell lifted"
        return selection, lifted and f"{lifted}, or the limit would have been missed"

    def _descend(self, selection: Selection, target: float, *, land: bool) -> bool:
        """Come down to the target as nearly as blocks allow; False where guards or `min_units` are in the way."""
        descend(selection, target)
        if selection.total > target:
            return False
        add_back(selection, target)
        swap(selection, target, self.deadband)
        if land:
            trade(selection, target, self.deadband)
        return True

    def _cut(self, state: PricedState, observation: Observation, aim: _Aim, selection: Selection, note: str) -> Plan:
        """The plan that drops what was selected."""
        ladders = selection.ladders
        landed = aim.metered is None and selection.total <= aim.limit
        reason = explain_cut(selection, state.price, aim.resource, aim.target, landed, self.deadband)
        if aim.metered is not None:
            reason += f"; the meter reads {percent(aim.metered / aim.spent - 1)} against the prediction"
        return Plan(
            step=observation.step,
            keep={name: ladder.keep(selection.rungs[name]) for name, ladder in ladders.items()},
            worth={name: ladder.per_unit(selection.worth[name]) for name, ladder in ladders.items()},
            price={aim.resource: state.price},
            reference={aim.resource: aim.reference},
            landed=landed,
            reason=f"{reason}; {note}" if note else reason,
        )


def _ladders(
    state: PricedState, reading: Reading, groups: tuple[Group, ...], slew: float, floor: float, dwell: int
) -> dict[str, Ladder]:
    """Ladders of all groups, by name, at these guards."""
    return {
        group.name: build_ladder(
            group,
            reading.saliency[group.name],
            dense=state.dense[group.name],
            floor=math.ceil(floor * state.dense[group.name]),
            max_dropped=math.floor(slew * group.num_units),
            free=state.age[group.name] >= dwell,
        )
        for group in groups
    }


def _uniform_density(
    cost: Cost, widths: Mapping[str, int], dense: Mapping[str, int], groups: tuple[Group, ...], limit: float
) -> float:
    """The density of units, the same in all groups, at which the limit is met; 1 where dense fits."""
    low, high = 0.0, 1.0
    for _ in range(16):
        density = (low + high) / 2
        even = {group.name: max(group.min_units, round(density * dense[group.name])) for group in groups}
        if cost.total({**widths, **even}) <= limit:
            low = density
        else:
            high = density
    return high
