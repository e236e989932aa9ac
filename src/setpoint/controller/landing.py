"""The landing of an even cut: the density, the same in all groups, that meets the limit, and its whole blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from jaxtyping import Float64

from setpoint.controller.ladder import Ladder, build_ladder, lowest_width
from setpoint.controller.selection import add_back, descend, start
from setpoint.cost.cost import Cost
from setpoint.groups.group import Group, widths_of


def even_cost(
    cost: Cost, widths: Mapping[str, int], dense: Mapping[str, int], groups: tuple[Group, ...], density: float
) -> float:
    """What the model costs when every group has this density of units, and `min_units` at least.

    Args:
        widths: present widths, those of groups that are not cut included.
        density: of units, in [0, 1].
    """
    even = {group.name: max(group.min_units, round(density * dense[group.name])) for group in groups}
    return cost.total({**widths, **even})


def even_density(
    cost: Cost, widths: Mapping[str, int], dense: Mapping[str, int], groups: tuple[Group, ...], limit: float
) -> float:
    """The highest density of units, the same in all groups, at which the limit is met; 0 where none meets it.

    Args:
        widths: present widths, those of groups that are not cut included.
    """
    low, high = 0.0, 1.0
    if even_cost(cost, widths, dense, groups, high) <= limit:
        return high
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if even_cost(cost, widths, dense, groups, middle) <= limit else (low, middle)
    return low


def free_ladders(
    dense: Mapping[str, int],
    groups: tuple[Group, ...],
    saliency: Mapping[str, Float64[np.ndarray, " units"]],
    floor: Mapping[str, int],
    slew: float = 1.0,
) -> dict[str, Ladder]:
    """Ladders of all groups, by name; any unit may go, and this fraction of a group's at one decision."""
    return {
        group.name: build_ladder(
            group,
            saliency[group.name],
            dense=dense[group.name],
            floor=floor.get(group.name, 0),
            max_dropped=math.floor(slew * group.num_units),
            free=np.ones(group.num_units, dtype=bool),
        )
        for group in groups
    }


def landing_widths(
    cost: Cost, widths: Mapping[str, int], dense: Mapping[str, int], groups: tuple[Group, ...], limit: float
) -> dict[str, int]:
    """The widths at which an even cut of the dense model meets the limit, and no single block can be given back.

    No density lies further below the one that would meet the limit in single units than the coarsest block; one above
    it is what the rest of the limit pays for, often in a group that costs little. A group that is narrower already than
    it would be then stays as it is, and leaves more to the others.

    Args:
        widths: widths that no group is to exceed, those of groups that are not cut included.
    """
    narrow: set[str] = set()
    while True:
        whole = tuple(replace(group, num_units=dense[group.name]) for group in groups if group.name not in narrow)
        ladders = free_ladders(dense, whole, {group.name: np.zeros(group.num_units) for group in whole}, {})
        selection = start(cost, ladders, {**widths, **widths_of(whole)}, "uniform")
        descend(selection, limit)
        if selection.total <= limit:
            add_back(selection, limit)
        narrower = {name for name, width in selection.widths.items() if widths[name] < width}
        if not narrower:
            return {group.name: selection.widths[group.name] for group in groups}
        narrow |= narrower


def cheapest(cost: Cost, groups: tuple[Group, ...]) -> float:
    """Cost with every group as narrow as `min_units` and whole blocks allow: no budget below it can be met.

    Args:
        cost: predicts spending; every group that it follows must be among `groups`.
    """
    return cost.total({group.name: lowest_width(group) for group in groups})
