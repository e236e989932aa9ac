"""Even cuts: what open-loop controllers share, a cut that keeps the densities of all groups alike."""

from __future__ import annotations

from collections.abc import Mapping

from setpoint.controller.ladder import Ladder, free_ladders
from setpoint.controller.plan import Observation, Plan
from setpoint.controller.selection import Selection, add_back, descend, landing_widths, start, weigh
from setpoint.cost.cost import Cost
from setpoint.groups.group import Group, keep_all, widths_of
from setpoint.messages import counted


def nothing_dropped(observation: Observation, cost: Cost, groups: tuple[Group, ...], reason: str) -> Plan:
    """The plan that keeps everything and has not met its budget."""
    keep = keep_all(groups)
    return Plan(observation.step, keep, price={cost.resource: 0.0}, reason=reason)


def even_plan(
    observation: Observation,
    cost: Cost,
    groups: tuple[Group, ...],
    target: float,
    reason: str,
    sure: Mapping[str, int] | None = None,
) -> Plan:
    """Drop the least salient units, block by block from the group of highest density, down to the target.

    At the target no single dropped block could be given back. No group goes below the width at which the budget is met,
    so that a coarse block on the way down does not cost more than the limit demands. The budget is met once the cost is
    within the limit.

    Args:
        observation: with a reading of all groups.
        cost: predicts spending.
        groups: the groups as they are now.
        target: cost to come down to, not below the limit.
        reason: why, for people.
        sure: by group, how many of its least salient units go whatever the target, until the limit is met.
    """
    assert observation.reading is not None
    limit, saliency = observation.limit[cost.resource], observation.reading.saliency
    free = free_ladders(observation.dense_widths, groups, saliency, {})
    most = {name: width - _whole(free[name], (sure or {}).get(name, 0)) for name, width in widths_of(groups).items()}
    floor = landing_widths(cost, {**observation.widths, **most}, observation.dense_widths, groups, limit)
    ladders = free_ladders(observation.dense_widths, groups, saliency, floor)
    selection = start(cost, ladders, observation.widths, "uniform")
    for name, units in (sure or {}).items():
        _drop_surely(selection, name, units, limit)
    target = max(limit, min(target, selection.total))
    descend(selection, target)
    if selection.total <= target:
        add_back(selection, target)
    budget_met = selection.total <= limit
    dropped = sum(int(ladders[name].edges[rung]) for name, rung in selection.rungs.items())
    return Plan(
        step=observation.step,
        keep={name: ladder.keep(selection.rungs[name]) for name, ladder in ladders.items()},
        price={cost.resource: 0.0},
        reference={cost.resource: target},
        budget_met=budget_met,
        reason=f"{'budget met: ' if budget_met else ''}{reason}; dropped {counted(dropped, 'unit')}",
    )


def _whole(ladder: Ladder, units: int) -> int:
    """Units in the whole blocks among the first `units`."""
    return int(ladder.edges[ladder.edges <= units][-1])


def _drop_surely(selection: Selection, name: str, units: int, limit: float) -> None:
    """Drop the whole blocks among the group's first `units`, as long as the cost is over the limit."""
    ladder = selection.ladders[name]
    while selection.total > limit and selection.rungs[name] < ladder.num_rungs:
        if ladder.edges[selection.rungs[name] + 1] > units:
            return
        weigh(selection, name, 1)
        selection.move(name, 1)
        selection.total = selection.cost.total(selection.widths)
