"""The scheduled controller: an open loop that narrows a model along a cubic schedule, by default all groups evenly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final, get_args

from setpoint.controller.plan import Observation, Plan
from setpoint.controller.reason import problem_with
from setpoint.controller.selection import even_cost, even_density
from setpoint.cost.cost import Cost
from setpoint.groups.group import Group
from setpoint_bench.baselines.even import even_plan, nothing_dropped
from setpoint_bench.baselines.ranked import ranked_plan
from setpoint_bench.baselines.schedule import cubic_density

Ranking = Literal["group", "kind", "all"]
"""Among which units the least salient go: each group's own, those of a kind in all groups, or all."""


@final
@dataclass(frozen=True)
class ScheduledController:
    """All groups keep the same density, which falls by the cubic schedule to that which meets the limit.

    Within a group the least salient units go. Nothing is read but saliencies: spending neither speeds it up nor
    slows it down. This is what schedule-driven libraries of structured pruning do, fasterai among them, with
    blocks and a last cut to the limit as everywhere in Setpoint: no group goes below the width that meets it, and
    once the budget is met no single block could be given back. With `begin = end = 0` it is a one-shot cut
    after the first step.

    Args:
        begin: fraction of the run that stays dense.
        end: fraction of the run by which the limit is reached.
        num_cuts: decisions on the way, the last one at `end`; in short runs one per step.
        ranking: units of what are compared. Unless those of a group, the model costs at each cut what it would cost
            with the schedule's density in all groups, and widths follow from the ranking.

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
    ranking: Ranking = "group"

    def __post_init__(self) -> None:
        if self.ranking not in get_args(Ranking):
            raise ValueError(f"ranking is one of {', '.join(get_args(Ranking))}, got {self.ranking!r}")
        if not 0 <= self.begin <= self.end <= 1 or self.num_cuts < 1:
            raise ValueError(f"a scheduled controller needs 0 <= begin <= end <= 1 and at least one cut, got {self!r}")

    def init(self, groups: tuple[Group, ...]) -> None:
        """State before the first decision."""

    def due(self, step: int, total_steps: int) -> bool:
        """Evenly from `begin` to `end`."""
        first, last = self._span(total_steps)
        steps = {round(first + (last - first) * cut / self.num_cuts) for cut in range(1, self.num_cuts + 1)}
        return step > 0 and step in steps

    def decide(self, state: None, observation: Observation, cost: Cost, groups: tuple[Group, ...]) -> tuple[None, Plan]:
        """Come down to what the schedule says now.

        Args:
            state: from `init`.
            observation: what is known at this step.
            cost: predicts spending; names the resource.
            groups: the groups that may be cut, as they are now.
        """
        problem = problem_with(observation.reading, None, groups)
        if problem:
            return state, nothing_dropped(observation, cost, groups, problem)
        assert observation.reading is not None
        first, last = self._span(observation.planned_steps)
        progress = (observation.step - first) / (last - first)
        limit = observation.limit[cost.resource]
        final = even_density(cost, observation.widths, observation.dense_widths, groups, limit)
        density = cubic_density(progress, final=final)
        target = limit
        if progress < 1:
            target = max(limit, even_cost(cost, observation.widths, observation.dense_widths, groups, density))
        if self.ranking != "group":
            reason = f"open loop: the cost of density {density:.3g} in all groups"
            return state, ranked_plan(observation, cost, groups, target, reason, by_kind=self.ranking == "kind")
        reason = f"open loop: density {density:.3g} in all groups"
        return state, even_plan(observation, cost, groups, target, reason)

    def _span(self, total_steps: int) -> tuple[int, int]:
        last = min(max(1, round(self.end * total_steps)), max(1, total_steps))
        return min(round(self.begin * total_steps), last - 1), last
