"""A ladder: the blocks that a group can lose at one decision, in the order in which it would lose them; and guards."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float64, Int, Int64

from setpoint.groups.group import Group
from setpoint.sensor.reading import Reading


@dataclass(frozen=True, eq=False)
class Ladder:
    """Blocks of least salient units; the group goes down the ladder rung by rung."""

    name: str  # of the group
    dense: int  # width of the group before any cut
    edges: Int[np.ndarray, " rungs_and_one"]  # `edges[k]` units are gone after k rungs; `edges[0] == 0`
    # `salience[k]` is the summed saliency of the units gone after k rungs.
    salience: Float64[np.ndarray, " rungs_and_one"]
    order: Int[np.ndarray, " droppable"]  # units in the order in which they go, up to the last edge
    num_units: int  # active units

    @property
    def num_rungs(self) -> int:
        return len(self.edges) - 1

    def keep(self, rungs: int) -> Bool[np.ndarray, " units"]:
        keep = np.ones(self.num_units, dtype=bool)
        keep[self.order[: self.edges[rungs]]] = False
        return keep

    def per_unit(self, per_rung: Float64[np.ndarray, " rungs"]) -> Float64[np.ndarray, " units"]:
        """A value per rung, given to each unit of its block; NaN for units on no rung."""
        values = np.full(self.num_units, np.nan)
        values[self.order] = np.repeat(per_rung, np.diff(self.edges))
        return values


def build_ladder(
    group: Group,
    saliency: Float64[np.ndarray, " units"],
    *,
    dense: int,
    floor: int,
    max_dropped: int,
    free: Bool[np.ndarray, " units"],
) -> Ladder:
    """The ladder of a group at one decision.

    Blocks hold `multiple_of` units. Where the width is no multiple, the first block is the remainder, so that every
    width on the way is a multiple. Units of equal saliency go in the order of their index.
    Negative saliencies count as 0. At least `floor` units remain, and those that are not `free`. Of more than
    `max_dropped` (the slew limit) only one block goes, or a group of few units never would.

    >>> group = Group("conv1", "unit", num_units=10, slices=(), multiple_of=4)
    >>> ladder = build_ladder(group, np.arange(10.0), dense=10, floor=1, max_dropped=9, free=np.ones(10, bool))
    >>> ladder.edges.tolist(), ladder.salience.tolist()
    ([0, 2, 6], [0.0, 1.0, 15.0])
    """
    width, block = group.num_units, group.multiple_of
    first = width % block or block
    most = min(width - max(floor, group.min_units), int(free.sum()))
    most = min(most, max(max_dropped, first))
    edges = np.concatenate([[0], np.arange(first, most + 1, block)]).astype(np.int64)
    values = np.where(free, np.maximum(saliency, 0.0), np.inf)
    order = _smallest(values, int(edges[-1]))
    salience = np.concatenate([[0.0], np.cumsum(values[order])])[edges]
    return Ladder(group.name, dense, edges, salience, order, width)


def _smallest(values: Float64[np.ndarray, " units"], count: int) -> Int[np.ndarray, " count"]:
    """Indices of the `count` smallest values, ascending, ties by index."""
    order = np.argsort(values)  # and ties afterwards: NumPy's stable sort of floats takes five times as long
    ordered = values[order]
    rank = np.cumsum(np.append(False, ordered[1:] > ordered[:-1]))
    return (np.sort(rank * len(values) + order) % len(values))[:count]


def lowest_width(group: Group) -> int:
    """Width at the foot of the ladder: the smallest that whole blocks reach without passing `min_units`.

    >>> lowest_width(Group("conv1", "unit", num_units=20, slices=(), min_units=3, multiple_of=8))
    8
    """
    width, block = group.num_units, group.multiple_of
    first = width % block or block
    if width - first < group.min_units:
        return width
    return width - first - (width - first - group.min_units) // block * block


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


@dataclass(frozen=True, eq=False)
class Guards:
    """What keeps one noisy reading from costing a whole layer."""

    slew: float  # largest fraction of a group's units to go at one decision; one block always may
    floor: Mapping[str, int]  # by group, the width that must remain; `min_units` where there is none
    dwell: int  # decisions that a unit stays after it was brought back

    def without_slew(self) -> Guards:
        return replace(self, slew=1.0)

    def ladders(
        self,
        groups: tuple[Group, ...],
        reading: Reading,
        dense: Mapping[str, int],
        age: Mapping[str, Int64[np.ndarray, " _units"]],
    ) -> dict[str, Ladder]:
        """Ladders of all groups, by name; `age` counts decisions since a unit came back."""
        return {
            group.name: build_ladder(
                group,
                reading.saliency[group.name],
                dense=dense[group.name],
                floor=self.floor.get(group.name, 0),
                max_dropped=math.floor(self.slew * group.num_units),
                free=(age[group.name] >= self.dwell) | (group.name in reading.basis),
            )
            for group in groups
        }


NO_GUARDS = Guards(slew=1.0, floor={}, dwell=0)
"""What is left where even the floor and the dwell would make a landing miss: `min_units`."""
