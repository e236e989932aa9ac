"""Selection: which blocks of units go, so that cost comes down to a target at the least loss; and the even cut."""

import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float64, Int

from setpoint.cost.cost import Cost, ProductCost
from setpoint.groups.group import Group, widths_of

Allocation = Literal["worth", "uniform"]
"""How a cut is split over groups: by saliency per saving, or so that all groups keep the same density."""

ROUNDING = 0.05  # share of a budget that whole blocks may leave unused: kernels are fast at round widths
_MAX_PICKS = 2048
_STAIR = 4  # blocks beyond the next that are looked at for a step down: hardware's steps are at multiples of 16
_MAX_SWAPS = 8
_SWAP_CANDIDATES = 16
_MAX_TRADES = 4
_TRADE_GROUPS = 10
_PREMIUM = 3.0  # what is left of the budget after a landing counts this many times its price
_CLOSE_ENOUGH = 1e-3  # relative distance below the target that no swap is worth looking for


@dataclass(frozen=True, eq=False)
class Ladder:
    """The blocks that a group can lose at one decision, the least salient units first; it goes down rung by rung."""

    dense: int  # width of the group before any cut
    edges: Int[np.ndarray, " rungs_and_one"]  # `edges[k]` units are gone after k rungs; `edges[0] == 0`
    # `salience[k]` is the summed saliency of the units gone after k rungs.
    salience: Float64[np.ndarray, " rungs_and_one"]
    order: Int[np.ndarray, " droppable"]  # units in the order in which they go, up to the last edge
    num_units: int  # active units

    @property
    def num_rungs(self) -> int:
        return len(self.edges) - 1


def build_ladder(
    group: Group,
    saliency: Float64[np.ndarray, " units"],
    *,
    dense: int,
    floor: int = 0,
    slew: float = 1.0,
    free: Bool[np.ndarray, " units"] | None = None,
) -> Ladder:
    """The ladder of a group at one decision, in blocks of `multiple_of` units; negative saliencies count as 0.

    Where the width is no multiple, the first block is the remainder. At least `floor` units remain, and those that are
    not `free`. Of more than the share `slew` of the units only one block goes, or a group of few units never would.

    >>> group = Group("conv1", "unit", num_units=10, slices=(), multiple_of=4)
    >>> ladder = build_ladder(group, np.arange(10.0), dense=10, floor=1)
    >>> ladder.edges.tolist(), ladder.salience.tolist()
    ([0, 2, 6], [0.0, 1.0, 15.0])
    """
    width, block = group.num_units, group.multiple_of
    first = width % block or block
    num_free = width if free is None else int(free.sum())
    most = min(width - max(floor, group.min_units), num_free, max(math.floor(slew * width), first))
    edges = np.concatenate([[0], np.arange(first, most + 1, block)]).astype(np.int64)
    values = np.maximum(saliency, 0.0)
    order = _smallest(values if free is None else np.where(free, values, np.inf), int(edges[-1]))
    return Ladder(dense, edges, np.concatenate([[0.0], np.cumsum(values[order])])[edges], order, width)


def _smallest(values: Float64[np.ndarray, " units"], count: int) -> Int[np.ndarray, " count"]:
    """Indices of the `count` smallest values, ascending, ties by index."""
    order = np.argsort(values)  # and ties afterwards: NumPy's stable sort of floats takes five times as long
    ordered = values[order]
    rank = np.cumsum(np.append(False, ordered[1:] > ordered[:-1]))
    return (np.sort(rank * len(values) + order) % len(values))[:count]


def lowest_width(group: Group) -> int:
    """Width at the foot of the ladder: the smallest that whole blocks reach without passing `min_units`."""
    width, block = group.num_units, group.multiple_of
    below = width - (width % block or block)
    return width if below < group.min_units else below - (below - group.min_units) // block * block


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

    def left(self, name: str) -> int:
        """Rungs that the group can still go down."""
        return self.ladders[name].num_rungs - self.rungs[name]

    def next_saving(self, name: str) -> float:
        """Cost that the group's next block saves."""
        return self.cost.saving(self.widths, name, self.size(name, self.rungs[name]))

    def regained(self, name: str) -> float:
        """Cost of giving back the last block that a group lost."""
        size = self.size(name, self.rungs[name] - 1)
        return self.cost.saving({**self.widths, name: self.widths[name] + size}, name, size)

    def move(self, name: str, count: int) -> None:
        """Go down `count` rungs, or up when negative. `total` is left to the caller."""
        rung = self.rungs[name]
        self.widths[name] -= self.size(name, rung, count)
        self.rungs[name] = rung + count

    def dropped(self) -> dict[str, int]:
        """How many units go, of each group that loses any."""
        return {name: int(self.ladders[name].edges[rung]) for name, rung in self.rungs.items() if rung}

    def keep(self) -> dict[str, Bool[np.ndarray, " _units"]]:
        """By group, one boolean per unit, True = stays."""
        keep = {}
        for name, ladder in self.ladders.items():
            keep[name] = np.ones(ladder.num_units, dtype=bool)
            keep[name][ladder.order[: ladder.edges[self.rungs[name]]]] = False
        return keep

    def unit_worth(self) -> dict[str, Float64[np.ndarray, " _units"]]:
        """By group, the worth of each unit's block; NaN for units on no rung."""
        worth = {}
        for name, ladder in self.ladders.items():
            worth[name] = np.full(ladder.num_units, np.nan)
            worth[name][ladder.order] = np.repeat(self.worth[name], np.diff(ladder.edges))
        return worth

    def revalued(self, saliency: Mapping[str, Float64[np.ndarray, " _units"]]) -> None:
        """Give blocks the worth that they have by another saliency than they were chosen by."""
        for name, ladder in self.ladders.items():
            saving = self.saving[name]
            summed = np.concatenate([[0.0], np.cumsum(np.maximum(saliency[name][ladder.order], 0.0))])[ladder.edges]
            self.worth[name] = np.full(ladder.num_rungs, np.inf)
            np.divide(np.diff(summed), saving, out=self.worth[name], where=~(saving <= 0))

    def marginal_worth(self) -> float:
        """Highest worth among the blocks that are dropped."""
        return max((float(self.worth[n][:rung].max()) for n, rung in self.rungs.items() if rung), default=0.0)


def start(
    cost: Cost,
    groups: tuple[Group, ...],
    saliency: Mapping[str, Float64[np.ndarray, " _units"]],
    widths: Mapping[str, int],
    dense: Mapping[str, int],
    allocation: Allocation = "worth",
    *,
    floor: Mapping[str, int] | None = None,
    slew: float = 1.0,
    free: Mapping[str, Bool[np.ndarray, " _units"]] | None = None,
) -> Selection:
    """The selection that drops nothing yet; floor, slew limit and free units are those of `build_ladder`, by group.

    `widths` may exceed those of the groups where units come back that cannot go again at once.
    """
    floor, free = floor or {}, free or {}
    ladders = {
        group.name: build_ladder(
            group,
            saliency[group.name],
            dense=dense[group.name],
            floor=floor.get(group.name, 0),
            slew=slew,
            free=free.get(group.name),
        )
        for group in groups
    }
    blank = {name: np.full(ladder.num_rungs, np.nan) for name, ladder in ladders.items()}
    saving = {name: values.copy() for name, values in blank.items()}
    rungs = dict.fromkeys(ladders, 0)
    return Selection(cost, ladders, allocation, dict(widths), rungs, cost.total(widths), blank, saving)


def reach(selection: Selection, target: float, deadband: float = 0.01, *, trades: bool = True) -> bool:
    """Come down to the target as nearly as blocks allow; False, and above it, where the ladders end before."""
    descend(selection, target)
    if selection.total > target:
        return False
    add_back(selection, target)
    if selection.allocation == "worth":  # exchanges by saliency would undo an even cut
        swap(selection, target, deadband)
        if trades:
            trade(selection, target, deadband)
    return True


def descend(selection: Selection, target: float, ceiling: float = np.inf) -> None:
    """Take the block of least worth, again and again, until predicted cost is at or below the target.

    Savings shrink as other groups shrink, so a block is weighed again before it is taken; a stale worth is a lower
    bound, and weighing just the top of the heap finds the true minimum. Blocks of equal worth go so that densities stay
    alike, then by name. With more blocks than can be weighed one by one in a few milliseconds, several are weighed at
    once, and the last stretch before the target is gone down in ever smaller steps, to single blocks.

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
        name = heapq.heappop(heap)[2]
        if (key := weigh(selection, name, stride)) is None:
            continue
        if heap and key > heap[0]:
            heapq.heappush(heap, key)
            continue
        worth, _, _, count, saving = key
        if worth >= ceiling or (stride > 1 and selection.total - saving < target):
            break
        taken = slice(selection.rungs[name], selection.rungs[name] + count)
        selection.worth[name][taken], selection.saving[name][taken] = worth, saving / count
        selection.highest = max(selection.highest, worth)
        selection.move(name, count)
        selection.total -= saving
        moved = True
        if (following := weigh(selection, name, stride)) is not None:
            heapq.heappush(heap, following)
    return moved


Weighed = tuple[float, float, str, int, float]  # worth, share of the group gone afterwards, name, blocks, saving


def weigh(selection: Selection, name: str, stride: int = 1) -> Weighed | None:
    """The group's next blocks weighed, and noted down."""
    if not (left := selection.left(name)):
        return None
    count = min(stride, left)
    # On a staircase, which a sum of products is not, one block may save nothing and the next one all.
    stair = 0 if isinstance(selection.cost, ProductCost) else _STAIR
    best = min(_weighed(selection, name, blocks) for blocks in range(count, min(count + stair, left) + 1))
    selection.worth[name][selection.rungs[name]] = best[0]
    selection.saving[name][selection.rungs[name]] = best[4] / best[3]
    return best


def _weighed(selection: Selection, name: str, count: int) -> Weighed:
    size = selection.size(name, selection.rungs[name], count)
    saving = selection.cost.saving(selection.widths, name, size)
    gone = 1.0 - (selection.widths[name] - size) / selection.ladders[name].dense
    if saving <= 0:
        worth = np.inf
    elif selection.allocation == "uniform":
        worth = gone
    else:
        worth = selection.salience(name, selection.rungs[name], count) / saving
    return worth, gone, name, count, saving


def add_back(selection: Selection, target: float) -> None:
    """Give back blocks, the worthiest first, until no single one fits under the target any more.

    With uniform allocation groups take turns, the narrowest first.
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
    if selection.total + selection.regained(name) > target * (1 + 1e-9):
        return False
    selection.move(name, -1)
    total = selection.cost.total(selection.widths)
    if total > target:
        selection.move(name, 1)
        return False
    selection.total = total
    return True


# Blocks given back for other blocks, so that a cut in coarse blocks comes nearer to its target.


def swap(selection: Selection, target: float, deadband: float) -> None:
    """Give back one block and drop another in its place, while that gets nearer to the target cheaply.

    A greedy descent stops at the first block that crosses the target, often a coarse one; a finer block elsewhere may
    do. Inside the dead-band a swap must not raise the summed saliency of what is dropped; below it, it may by as much
    as the cost won back is worth at the price.
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
    back, out = _movable(selection)
    if not back or not out:
        return False
    gains = np.array([selection.regained(name) for name in back])
    losses = np.array([selection.next_saving(name) for name in out])
    rise = gains[:, None] - losses[None, :]
    allowed = (rise > 0) & (rise <= (target - selection.total) * (1 + 1e-9))
    allowed &= np.array(back)[:, None] != np.array(out)[None, :]
    kept = np.array([selection.salience(name, selection.rungs[name] - 1) for name in back])
    lost = np.array([selection.salience(name, selection.rungs[name]) for name in out])
    allowed &= lost[None, :] - kept[:, None] <= price * rise
    pairs = sorted(np.argwhere(allowed).tolist(), key=lambda p: (-rise[p[0], p[1]], back[p[0]], out[p[1]]))
    return any(_make(selection, (back[i],), (out[j],), target) for i, j in pairs[:_SWAP_CANDIDATES])


def _movable(selection: Selection) -> tuple[list[str], list[str]]:
    return [name for name, rung in selection.rungs.items() if rung], list(filter(selection.left, selection.rungs))


# Change of the objective, groups that get a block back, groups that lose one.
Trade = tuple[float, tuple[str, ...], tuple[str, ...]]


def trade(selection: Selection, target: float, deadband: float) -> None:
    """For the landing: give back one or two blocks for one or two others, until the dead-band is reached.

    Among all such trades the one is made that lowers

        summed saliency of what is dropped + 3 * price * (target - total)

    the most: what a landing leaves unused is lost for good. Only the groups whose next or last block is nearest to the
    price take part, so that the search stays within some thousand savings.
    """
    for _ in range(_MAX_TRADES):
        if target - selection.total <= deadband * target:
            return
        best = min(_trades(selection, target), default=None)
        if best is None or best[0] >= 0 or not _make(selection, best[1], best[2], target):
            return
        add_back(selection, target)


def _make(selection: Selection, up: tuple[str, ...], down: tuple[str, ...], target: float) -> bool:
    """Make a trade; undone unless the cost, counted afresh, rises within the target."""
    for name in up:
        selection.move(name, -1)
    for name in down:
        weigh(selection, name)
        selection.move(name, 1)
    total = selection.cost.total(selection.widths)
    if selection.total < total <= target:
        selection.total = total
        return True
    for name in down:
        selection.move(name, -1)
    for name in up:
        selection.move(name, 1)
    return False


def _trades(selection: Selection, target: float) -> list[Trade]:
    """Every trade of one or two blocks for one or two others that raises the cost within the target."""
    back, out = _movable(selection)
    back, out = _nearest(selection, back, -1), _nearest(selection, out, 0)
    price, found = _PREMIUM * selection.highest, list[Trade]()

    def drop(names: list[str], up: tuple[str, ...], down: tuple[str, ...], total: float, lost: float) -> None:
        """Complete a half-made trade by one block or, if that is not enough, two."""
        for place, name in enumerate(names):
            if not selection.left(name):
                continue
            cost = total - selection.next_saving(name)
            loss = lost + selection.salience(name, selection.rungs[name])
            if selection.total < cost <= target:
                found.append((loss - price * (cost - selection.total), up, (*down, name)))
            elif cost > target and not down:
                selection.move(name, 1)
                drop(names[place:], up, (name,), cost, loss)
                selection.move(name, -1)

    for up in [names for count in (1, 2) for names in combinations_with_replacement(back, count)]:
        if any(selection.rungs[name] < up.count(name) for name in up):
            continue
        total, lost = selection.total, 0.0
        for name in up:
            total += selection.regained(name)
            selection.move(name, -1)
            lost -= selection.salience(name, selection.rungs[name])
        drop([name for name in out if name not in up], up, (), total, lost)
        for name in up:
            selection.move(name, 1)
    return found


def _nearest(selection: Selection, names: list[str], offset: int) -> list[str]:
    """The groups whose block at this offset from the present rung is worth most nearly the price."""

    def distance(name: str) -> tuple[float, str]:
        worth = selection.worth[name][selection.rungs[name] + offset]
        return (abs(worth - selection.highest) if np.isfinite(worth) else np.inf, name)

    return sorted(names, key=distance)[:_TRADE_GROUPS]


# The even cut: all groups at the same density.


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

    A group that is narrower already stays as it is, and leaves more to the others.
    """
    narrow: set[str] = set()
    while True:
        whole = tuple(replace(group, num_units=dense[group.name]) for group in groups if group.name not in narrow)
        zeros = {group.name: np.zeros(group.num_units) for group in whole}
        selection = start(cost, whole, zeros, {**widths, **widths_of(whole)}, dense, "uniform")
        reach(selection, limit)
        narrower = {name for name, width in selection.widths.items() if widths[name] < width}
        if not narrower:
            return {group.name: selection.widths[group.name] for group in groups}
        narrow |= narrower


def cheapest(cost: Cost, groups: tuple[Group, ...]) -> float:
    """Cost with every group as narrow as it can be: no budget below it can be met."""
    return cost.total({group.name: lowest_width(group) for group in groups})
