"""Selection: which blocks go so that cost comes down to a target at the least loss; and the even cut."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Float64

from setpoint.controller.ladder import Ladder, free_ladders, lowest_width
from setpoint.cost.cost import Cost, ProductCost
from setpoint.groups.group import Group, widths_of

Allocation = Literal["worth", "uniform"]
"""How a cut is split over groups: by saliency per saving, or so that all groups keep the same density."""

_MAX_PICKS = 2048
_STAIR = 4
"""Blocks beyond the next that are looked at for a step down: hardware's steps are at multiples of 16."""


@dataclass(eq=False)
class Selection:
    """A place on all ladders at once, and what it costs; the functions of this file move it."""

    cost: Cost  # predicts spending
    ladders: Mapping[str, Ladder]  # by group name
    allocation: Allocation  # what blocks are ranked by
    widths: dict[str, int]  # widths at this place, groups without a ladder included
    rungs: dict[str, int]  # rungs gone down, by group name
    total: float  # predicted cost at these widths
    # By group name and rung, the worth at which the block was last weighed; NaN before.
    worth: dict[str, Float64[np.ndarray, " rungs"]]
    # By group name and rung, what the block saved then, an even share where several were weighed together.
    saving: dict[str, Float64[np.ndarray, " rungs"]]
    highest: float = 0.0  # highest worth among the blocks taken on the way down

    def size(self, name: str, rung: int, count: int = 1) -> int:
        """Units in `count` blocks from this rung on; negative where the count is."""
        edges = self.ladders[name].edges
        return int(edges[rung + count] - edges[rung])

    def salience(self, name: str, rung: int, count: int = 1) -> float:
        salience = self.ladders[name].salience
        return float(salience[rung + count] - salience[rung])

    def move(self, name: str, count: int) -> None:
        """Go down `count` rungs, or up when negative. `total` is left to the caller."""
        rung = self.rungs[name]
        self.widths[name] -= self.size(name, rung, count)
        self.rungs[name] = rung + count


def start(cost: Cost, ladders: Mapping[str, Ladder], widths: Mapping[str, int], allocation: Allocation) -> Selection:
    return Selection(
        cost=cost,
        ladders=ladders,
        allocation=allocation,
        widths=dict(widths),
        rungs=dict.fromkeys(ladders, 0),
        total=cost.total(widths),
        worth={name: np.full(ladder.num_rungs, np.nan) for name, ladder in ladders.items()},
        saving={name: np.full(ladder.num_rungs, np.nan) for name, ladder in ladders.items()},
    )


def descend(selection: Selection, target: float, ceiling: float = np.inf) -> None:
    """Take the block of least worth, again and again, until predicted cost is at or below the target.

    `worth = saliency of the block / cost.saving(widths, group, units of the block)`, at the widths reached so far:
    savings shrink as other groups shrink, so a block is weighed again before it is taken. As savings only shrink, a
    stale worth is a lower bound and weighing just the top of the heap finds the true minimum. Blocks of equal worth go
    so that densities stay alike, then by name.

    With more blocks than can be weighed one by one in a few milliseconds, several are weighed at once, and the last
    stretch before the target is gone down in ever smaller steps, to single blocks.

    Where the ladders end above the target, the selection stays above. From the worth `ceiling` on blocks stay.
    """
    num_blocks = sum(ladder.num_rungs for ladder in selection.ladders.values())
    stride = max(1, -(-num_blocks // _MAX_PICKS))
    while True:
        _descend(selection, target, stride, ceiling)
        selection.total = selection.cost.total(selection.widths)
        if stride == 1:
            break
        stride = max(1, stride // 16)
    while selection.total > target and _descend(selection, target, 1, ceiling):  # rounding of the running total
        selection.total = selection.cost.total(selection.widths)


def _descend(selection: Selection, target: float, stride: int, ceiling: float) -> bool:
    """Descend by `stride` blocks at a time, short of the target unless stride is 1; True if anything moved."""
    heap = [key for name in selection.ladders if (key := weigh(selection, name, stride)) is not None]
    heapq.heapify(heap)
    moved = False
    while heap and selection.total > target:
        _, _, name, _, _ = heapq.heappop(heap)
        key = weigh(selection, name, stride)
        if key is None:
            continue
        if heap and key > heap[0]:
            heapq.heappush(heap, key)
            continue
        worth, _, _, count, saving = key
        if stride > 1 and selection.total - saving < target:
            break
        if worth >= ceiling:
            break
        taken = slice(selection.rungs[name], selection.rungs[name] + count)
        selection.worth[name][taken], selection.saving[name][taken] = worth, saving / count
        selection.highest = max(selection.highest, worth)
        selection.move(name, count)
        selection.total -= saving
        moved = True
        following = weigh(selection, name, stride)
        if following is not None:
            heapq.heappush(heap, following)
    return moved


def weigh(selection: Selection, name: str, stride: int) -> tuple[float, float, str, int, float] | None:
    """(worth, share of the group gone afterwards, name, blocks, saving) of the group's next blocks, noted down.

    On a staircase one block may save nothing and the next one all: there as many blocks, up to four more, are weighed
    together as are worth least.
    """
    left = selection.ladders[name].num_rungs - selection.rungs[name]
    if left == 0:
        return None
    count = min(stride, left)
    if isinstance(selection.cost, ProductCost):  # a sum of products has no stairs
        best = _weighed(selection, name, count)
    else:
        best = min(_weighed(selection, name, blocks) for blocks in range(count, min(count + _STAIR, left) + 1))
    selection.worth[name][selection.rungs[name]] = best[0]
    selection.saving[name][selection.rungs[name]] = best[4] / best[3]
    return best


def _weighed(selection: Selection, name: str, count: int) -> tuple[float, float, str, int, float]:
    ladder, rung = selection.ladders[name], selection.rungs[name]
    size = selection.size(name, rung, count)
    saving = selection.cost.saving(selection.widths, name, size)
    gone = 1.0 - (selection.widths[name] - size) / ladder.dense
    if saving <= 0:
        worth = np.inf
    elif selection.allocation == "uniform":
        worth = gone
    else:
        worth = selection.salience(name, rung, count) / saving
    return worth, gone, name, count, saving


def add_back(selection: Selection, target: float) -> None:
    """Give back blocks, the worthiest first, until no single one fits under the target any more.

    What remains below the target is then less than the saving of every block that was dropped and could be given back:
    the undershoot is bounded by the cheapest of them. With uniform allocation groups take turns, the narrowest first.
    """
    fits = True
    while fits:
        fits = False
        for name in sorted(
            (name for name, rung in selection.rungs.items() if rung),
            key=lambda name: (-selection.worth[name][selection.rungs[name] - 1], name),
        ):
            while selection.rungs[name] and _give_back(selection, name, target):
                fits = True
                if selection.allocation == "uniform":
                    break


def _give_back(selection: Selection, name: str, target: float) -> bool:
    if selection.total + regained(selection, name) > target * (1 + 1e-9):
        return False
    selection.move(name, -1)
    total = selection.cost.total(selection.widths)
    if total > target:
        selection.move(name, 1)
        return False
    selection.total = total
    return True


def regained(selection: Selection, name: str) -> float:
    """Cost of giving back the last block that a group lost."""
    size = selection.size(name, selection.rungs[name] - 1)
    wider = {**selection.widths, name: selection.widths[name] + size}
    return selection.cost.saving(wider, name, size)


def marginal_worth(selection: Selection) -> float:
    return max((float(selection.worth[n][:rung].max()) for n, rung in selection.rungs.items() if rung), default=0.0)


def worth_by(selection: Selection, name: str, saliency: Float64[np.ndarray, " units"]) -> Float64[np.ndarray, " rungs"]:
    """Worth of a group's blocks by another saliency than they were chosen by; NaN where none was weighed."""
    ladder, saving = selection.ladders[name], selection.saving[name]
    summed = np.concatenate([[0.0], np.cumsum(np.maximum(saliency[ladder.order], 0.0))])[ladder.edges]
    worth = np.full(ladder.num_rungs, np.inf)
    np.divide(np.diff(summed), saving, out=worth, where=~(saving <= 0))
    return worth


def block_savings(selection: Selection) -> float:
    """Mean saving of the next block of each group; 0 where there is none."""
    sizes = {n: selection.size(n, r) for n, r in selection.rungs.items() if r < selection.ladders[n].num_rungs}
    savings = [selection.cost.saving(selection.widths, name, size) for name, size in sizes.items()]
    return sum(savings) / len(savings) if savings else 0.0


def even_cost(
    cost: Cost, widths: Mapping[str, int], dense: Mapping[str, int], groups: tuple[Group, ...], density: float
) -> float:
    """What the model costs when every group has this density of units, and `min_units` at least."""
    even = {group.name: max(group.min_units, round(density * dense[group.name])) for group in groups}
    return cost.total({**widths, **even})


def even_density(
    cost: Cost, widths: Mapping[str, int], dense: Mapping[str, int], groups: tuple[Group, ...], limit: float
) -> float:
    """The highest density of units, the same in all groups, at which the limit is met; 0 where none meets it."""
    low, high = 0.0, 1.0
    if even_cost(cost, widths, dense, groups, high) <= limit:
        return high
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if even_cost(cost, widths, dense, groups, middle) <= limit else (low, middle)
    return low


def landing_widths(
    cost: Cost, widths: Mapping[str, int], dense: Mapping[str, int], groups: tuple[Group, ...], limit: float
) -> dict[str, int]:
    """The widths at which an even cut of the dense model meets the limit, and no single block can be given back.

    No density lies further below the one that would meet the limit in single units than the coarsest block; one above
    it is what the rest of the limit pays for, often in a group that costs little. A group that is narrower already than
    it would be then stays as it is, and leaves more to the others. No group exceeds its width in `widths`.
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
    """Cost with every group as narrow as `min_units` and whole blocks allow: no budget below it can be met."""
    return cost.total({group.name: lowest_width(group) for group in groups})
