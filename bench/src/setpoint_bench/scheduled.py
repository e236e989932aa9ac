"""The scheduled controller: it narrows a model along a fixed cubic schedule, evenly or by a ranking of all units."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from setpoint.controller.plan import Conduct, Controller, Observation, Plan, problem_with
from setpoint.controller.selection import Allocation, even_cost, even_density, landing_widths, reach, start
from setpoint.cost.cost import Cost
from setpoint.groups.group import Group, keep_all
from setpoint.messages import counted

LEAST_DENSITY = 0.25
"""Of an even cut's, that each group keeps at least: the default of `PricedController`."""


@final
@dataclass(frozen=True)
class ScheduledController(Controller[None]):
    """Cost falls by the cubic schedule of an even density, to the limit; the same for whatever widths get there.

    Evenly, all groups keep the same density, and within a group the least salient units go. Globally, the units of all
    groups are ranked together by saliency per FLOP saved, as Setpoint's own controller ranks them, and a group keeps a
    quarter of the density of an even cut, as there; saliencies that do not compare groups are divided by their group's
    mean, as Torch-Pruning's are. Nothing is read but saliencies: spending neither speeds it up nor
    slows it down. This is what schedule-driven libraries of structured pruning do, fasterai among them, with
    blocks and a last cut to the limit as everywhere in Setpoint: no group goes below the width that meets it, and
    once the budget is met no single block could be given back. With `begin = end = 0` it is a one-shot cut
    after the first step.

    Args:
        begin: fraction of the run that stays dense.
        end: fraction of the run by which the limit is reached.
        num_cuts: decisions on the way, the last one at `end`; in short runs one per step.
        allocation: "uniform" for even widths, "worth" for the global ranking.

    Raises:
        ValueError: unless `0 <= begin <= end <= 1` and there is a cut.

    References:
        Zhu, Gupta: "To prune, or not to prune: exploring the efficacy of pruning for model compression",
        ICLR workshop 2018 (the schedule). Li, Kadav, Durdanovic, Samet, Graf: "Pruning Filters for Efficient
        ConvNets", ICLR 2017 (one-shot, by filter norms).

    >>> [step for step in range(101) if ScheduledController(num_cuts=4).due(step, 100)]
    [16, 28, 39, 50]
    """

    begin: float = 0.05
    end: float = 0.5
    num_cuts: int = 8
    allocation: Allocation = "uniform"

    def __post_init__(self) -> None:
        if not 0 <= self.begin <= self.end <= 1 or self.num_cuts < 1:
            raise ValueError(f"a scheduled controller needs 0 <= begin <= end <= 1 and at least one cut, got {self!r}")

    @property
    def conduct(self) -> Conduct:
        return Conduct(yields=False)

    def init(self, groups: tuple[Group, ...]) -> None:
        """State before the first decision."""

    def due(self, step: int, total_steps: int) -> bool:
        """Evenly from `begin` to `end`."""
        first, last = self._span(total_steps)
        steps = {round(first + (last - first) * cut / self.num_cuts) for cut in range(1, self.num_cuts + 1)}
        return step > 0 and step in steps

    def decide(self, state: None, observation: Observation, cost: Cost, groups: tuple[Group, ...]) -> tuple[None, Plan]:
        """Come down to what the schedule says now."""
        problem = problem_with(observation.reading, groups)
        if problem:
            # Nothing is known of the units: everything stays, and the budget is not met yet.
            return state, Plan(observation.step, keep_all(groups), price={cost.resource: 0.0}, reason=problem)
        assert observation.reading is not None
        first, last = self._span(observation.planned_steps)
        progress = (observation.step - first) / (last - first)
        limit = observation.limit[cost.resource]
        final = even_density(cost, observation.widths, observation.dense_widths, groups, limit)
        density = cubic_density(progress, final=final)
        target = limit
        if progress < 1:
            target = max(limit, even_cost(cost, observation.widths, observation.dense_widths, groups, density))
        where = "in all groups" if self.allocation == "uniform" else "of an even cut, units ranked over all groups"
        reason = f"fixed schedule: density {density:.3g} {where}"
        return state, plan_down(observation, cost, groups, target, reason, self.allocation)

    def _span(self, total_steps: int) -> tuple[int, int]:
        last = min(max(1, round(self.end * total_steps)), max(1, total_steps))
        return min(round(self.begin * total_steps), last - 1), last


def cubic_density(progress: float, *, final: float, start: float = 1.0) -> float:
    """Density on the way down: fast at first, when there is much to spare, and slower and slower.

    `density = final + (start - final) * (1 - progress)^3`; in terms of sparsity this is equation 1 of the paper.

    Args:
        progress: share of the ramp that is done; values outside [0, 1] count as the nearer end.
        final: density at the end.
        start: density at the beginning.

    >>> [round(cubic_density(p, final=0.2), 4) for p in (0.0, 0.5, 1.0)]
    [1.0, 0.3, 0.2]
    """
    left = 1.0 - min(max(progress, 0.0), 1.0)
    return final + (start - final) * left**3


def plan_down(
    observation: Observation,
    cost: Cost,
    groups: tuple[Group, ...],
    target: float,
    reason: str,
    allocation: Allocation = "uniform",
) -> Plan:
    """Drop units down to the target: block by block from the group of highest density, or those of least worth.

    At the target no single dropped block could be given back. No group of an even cut goes below the width at which the
    budget is met, so that a coarse block on the way down does not cost more than the limit demands. The budget is met
    once the cost is within the limit.
    """
    assert observation.reading is not None
    limit, saliency = observation.limit[cost.resource], observation.reading.saliency
    widths = observation.widths, observation.dense_widths
    if allocation == "uniform":
        floor = landing_widths(cost, *widths, groups, limit)
    else:
        least = LEAST_DENSITY * even_density(cost, *widths, groups, limit)
        floor = {name: math.ceil(least * width) for name, width in observation.dense_widths.items()}
        if not observation.reading.calibrated:
            saliency = {name: values / max(float(values.mean()), 1e-30) for name, values in saliency.items()}
    selection = start(cost, groups, saliency, *widths, allocation, floor=floor)
    target = max(limit, min(target, selection.total))
    reach(selection, target)
    budget_met = selection.total <= limit
    dropped = sum(selection.dropped().values())
    return Plan(
        step=observation.step,
        keep=selection.keep(),
        price={cost.resource: 0.0},
        reference={cost.resource: target},
        budget_met=budget_met,
        reason=f"{'budget met: ' if budget_met else ''}{reason}; dropped {counted(dropped, 'unit')}",
    )
