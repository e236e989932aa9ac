"""Selection: which blocks go so that cost comes down to a target at the least loss."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float64

from setpoint.controller.ladder import Ladder, lowest_width
from setpoint.cost.cost import Cost
from setpoint.groups.group import Group

Allocation = Literal["worth", "uniform"]
"""How a cut is split over groups: by saliency per saving, or so that all groups keep the same density."""

_MAX_PICKS = 2048
_MAX_SWAPS = 8
_SWAP_CANDIDATES = 16
_CLOSE_ENOUGH = 1e-3  # relative distance below the target that no swap is worth looking for


@dataclass(eq=False)
class Selection:
    """A place on all ladders at once, and what it costs; the functions of this file move it.

    Args:
        cost: predicts spending.
        ladders: by group name.
        allocation: what blocks are ranked by.
        widths: widths at this place, groups without a ladder included.
        rungs: rungs gone down, by group name.
        total: predicted cost at these widths.
        worth: by group name and rung, the worth at which the block was last weighed; NaN before.
        highest: highest worth among the blocks taken on the way down.
    """

    cost: Cost
    ladders: Mapping[str, Ladder]
    allocation: Allocation
    widths: dict[str, int]
    rungs: dict[str, int]
    total: float
    worth: dict[str, Float64[np.ndarray, " rungs"]]
    highest: float = 0.0

    def size(self, name: str, rung: int, count: int = 1) -> int:
        """Units in `count` blocks from this rung on."""
        edges = self.ladders[name].edges
        return int(edges[rung + count] - edges[rung])

    def salience(self, name: str, rung: int, count: int = 1) -> float:
        """Summed saliency of these blocks."""
        salience = self.ladders[name].salience
        return float(salience[rung + count] - salience[rung])

    def move(self, name: str, count: int) -> None:
        """Go down `count` rungs of a group's ladder, or up when negative. `total` is left to the caller."""
        rung = self.rungs[name]
        low, high = min(rung, rung + count), max(rung, rung + count)
        size = self.size(name, low, high - low)
        self.widths[name] -= size if count > 0 else -size
        self.rungs[name] = rung + count


def start(cost: Cost, ladders: Mapping[str, Ladder], widths: Mapping[str, int], allocation: Allocation) -> Selection:
    """The selection that drops nothing."""
    return Selection(
        cost=cost,
        ladders=ladders,
        allocation=allocation,
        widths=dict(widths),
        rungs=dict.fromkeys(ladders, 0),
        total=cost.total(widths),
        worth={name: np.full(ladder.num_rungs, np.nan) for name, ladder in ladders.items()},
    )


def descend(selection: Selection, target: float) -> None:
    """Take the block of least worth, again and again, until predicted cost is at or below the target.

    `worth = saliency of the block / cost.saving(widths, group, units of the block)`, at the widths
    reached so far: savings shrink as other groups shrink, so a block is weighed again before it is
    taken. As savings only shrink, a stale worth is a lower bound and weighing just the top of the heap
    finds the true minimum. Blocks of equal worth go so that densities stay alike, then by name.

    With more blocks than can be weighed one by one in a few milliseconds, several are weighed at
    once, and the last stretch before the target is gone down in ever smaller steps, to single blocks.

    Args:
        selection: moved in place; where the ladders end above the target it stays above.
        target: cost in the resource's own unit.
    """
    num_blocks = sum(ladder.num_rungs for ladder in selection.ladders.values())
    stride = max(1, -(-num_blocks // _MAX_PICKS))
    while True:
        _descend(selection, target, stride)
        selection.total = selection.cost.total(selection.widths)
        if stride == 1:
            break
        stride = max(1, stride // 16)
    while selection.total > target and _descend(selection, target, 1):  # rounding of the running total
        selection.total = selection.cost.total(selection.widths)


def _descend(selection: Selection, target: float, stride: int) -> bool:
    """Descend by `stride` blocks at a time, short of the target unless stride is 1; True if anything moved."""
    heap = [key for name in selection.ladders if (key := _weigh(selection, name, stride)) is not None]
    heapq.heapify(heap)
    moved = False
    while heap and selection.total > target:
        _, _, name, _, _ = heapq.heappop(heap)
        key = _weigh(selection, name, stride)
        if key is None:
            continue
        if heap and key > heap[0]:
            heapq.heappush(heap, key)
            continue
        worth, _, _, count, saving = key
        if stride > 1 and selection.total - saving < target:
            break
        if worth == np.inf:
            break
        selection.worth[name][selection.rungs[name] : selection.rungs[name] + count] = worth
        selection.highest = max(selection.highest, worth)
        selection.move(name, count)
        selection.total -= saving
        moved = True
        following = _weigh(selection, name, stride)
        if following is not None:
            heapq.heappush(heap, following)
    return moved


def _weigh(selection: Selection, name: str, stride: int) -> tuple[float, float, str, int, float] | None:
    """(worth, share of the group gone afterwards, name, blocks, saving) of the group's next blocks."""
    ladder, rung = selection.ladders[name], selection.rungs[name]
    count = min(stride, ladder.num_rungs - rung)
    if count == 0:
        return None
    size = selection.size(name, rung, count)
    saving = selection.cost.saving(selection.widths, name, size)
    gone = 1.0 - (selection.widths[name] - size) / ladder.dense
    if saving <= 0:
        worth = np.inf
    elif selection.allocation == "uniform":
        worth = gone
    else:
        worth = selection.salience(name, rung, count) / saving
    selection.worth[name][rung] = worth
    return worth, gone, name, count, saving


def add_back(selection: Selection, target: float) -> None:
    """Give back blocks, the worthiest first, until no single one fits under the target any more.

    What remains below the target is then less than the saving of every block that was dropped and
    could be given back: the undershoot is bounded by the cheapest of them.
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


def _give_back(selection: Selection, name: str, target: float) -> bool:
    """Give back the last block of a group if the cost stays within the target."""
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


def swap(selection: Selection, target: float, deadband: float) -> None:
    """Give back one block and drop another in its place, while that gets nearer to the target cheaply.

    A greedy descent stops at the first block that crosses the target, often a coarse one; a finer block
    elsewhere may do. Each swap raises the cost and keeps it within the target. Inside the dead-band it
    must not raise the summed saliency of what is dropped; below it, it may by as much as the cost won
    back is worth at the price. At most a few are made; afterwards no single block fits back.

    Args:
        selection: at or below the target, after `add_back`; moved in place.
        target: cost in the resource's own unit.
        deadband: relative distance below the target that is near enough not to pay for.
    """
    for _ in range(_MAX_SWAPS):
        gap = target - selection.total
        if gap <= _CLOSE_ENOUGH * target:
            return
        if not _swap_once(selection, target, selection.highest if gap > deadband * target else 0.0):
            return
        add_back(selection, target)


def _swap_once(selection: Selection, target: float, price: float) -> bool:
    """Make the swap that ends nearest to the target; False if none passes the exact check."""
    back = [name for name, rung in selection.rungs.items() if rung]
    out = [name for name, rung in selection.rungs.items() if rung < selection.ladders[name].num_rungs]
    if not back or not out:
        return False
    gains = np.array([regained(selection, name) for name in back])
    losses = np.array([selection.cost.saving(selection.widths, n, selection.size(n, selection.rungs[n])) for n in out])
    rise = gains[:, None] - losses[None, :]
    allowed = (rise > 0) & (rise <= (target - selection.total) * (1 + 1e-9))
    allowed &= np.array(back)[:, None] != np.array(out)[None, :]
    if selection.allocation == "worth":
        kept = np.array([selection.salience(name, selection.rungs[name] - 1) for name in back])
        lost = np.array([selection.salience(name, selection.rungs[name]) for name in out])
        allowed &= lost[None, :] - kept[:, None] <= price * rise
    pairs = sorted(
        np.argwhere(allowed).tolist(), key=lambda pair: (-rise[pair[0], pair[1]], back[pair[0]], out[pair[1]])
    )
    return any(_exchange(selection, back[i], out[j], target) for i, j in pairs[:_SWAP_CANDIDATES])


def _exchange(selection: Selection, back: str, out: str, target: float) -> bool:
    """Give back a block of one group for a block of another; undone unless the cost rises within the target."""
    selection.move(back, -1)
    selection.move(out, 1)
    total = selection.cost.total(selection.widths)
    if selection.total < total <= target:
        selection.total = total
        return True
    selection.move(out, -1)
    selection.move(back, 1)
    return False


def cheapest(cost: Cost, groups: tuple[Group, ...]) -> float:
    """Cost with every group as narrow as `min_units` and whole blocks allow: no budget below it can be met.

    Args:
        cost: predicts spending; every group that it follows must be among `groups`.
        groups: groups that may be cut.
    """
    return cost.total({group.name: lowest_width(group) for group in groups})
