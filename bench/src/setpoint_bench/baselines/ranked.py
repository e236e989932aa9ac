"""Ranked cuts: blocks go in the order of their scores, wherever they are, down to a target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from setpoint.controller.ladder import free_ladders
from setpoint.controller.plan import Observation, Plan
from setpoint.controller.selection import Selection, add_back, start
from setpoint.controller.swap import swap
from setpoint.cost.cost import Cost
from setpoint.groups.group import Group
from setpoint.messages import counted


def ranked_plan(
    observation: Observation, cost: Cost, groups: tuple[Group, ...], target: float, reason: str, *, by_kind: bool
) -> Plan:
    """Drop the block of lowest mean score, again and again, down to the target; then give back what fits under it.

    Where the last block was coarse, another of no higher summed score may go in its place.

    Blocks of all groups are ranked together, or those of each kind of unit: then kinds keep the same density, and the
    groups of a kind may come to different ones. Nothing is weighed by what it saves.

    Args:
        observation: with a reading of all groups.
        cost: predicts spending.
        groups: the groups as they are now.
        target: cost to come down to, not below the limit.
        reason: why, for people.
        by_kind: whether heads, neurons and channels are each ranked among themselves.
    """
    assert observation.reading is not None
    limit = observation.limit[cost.resource]
    ladders = free_ladders(observation.dense_widths, groups, observation.reading.saliency, {})
    selection = start(cost, ladders, observation.widths, "worth")
    kinds: dict[str, list[str]] = {}
    for group in groups:
        kinds.setdefault(group.what if by_kind else "", []).append(group.name)
    while selection.total > target and (name := _next(selection, list(kinds.values()), observation.dense_widths)):
        selection.worth[name][selection.rungs[name]] = _score(selection, name)
        selection.move(name, 1)
        selection.total = cost.total(selection.widths)
    if selection.total <= target:
        add_back(selection, target)
        swap(selection, target, deadband=0.0)
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


def _next(selection: Selection, kinds: Sequence[Sequence[str]], dense: Mapping[str, int]) -> str:
    """The group whose next block goes: the lowest of the kind of highest density; "" where none can."""
    left = [
        (sum(selection.widths[name] for name in kind) / sum(dense[name] for name in kind), able)
        for kind in kinds
        if (able := [name for name in kind if selection.rungs[name] < selection.ladders[name].num_rungs])
    ]
    if not left:
        return ""
    _, able = max(left, key=lambda each: each[0])
    return min(able, key=lambda name: (_score(selection, name), name))


def _score(selection: Selection, name: str) -> float:
    """Mean score of a group's next block."""
    rung = selection.rungs[name]
    return selection.salience(name, rung) / selection.size(name, rung)
