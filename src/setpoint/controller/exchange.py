"""Exchange: blocks given back for other blocks, so that a cut in coarse blocks comes nearer to its target."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations_with_replacement

import numpy as np

from setpoint.controller.selection import Selection, add_back, regained, weigh

_MAX_SWAPS = 8
_SWAP_CANDIDATES = 16
_MAX_TRADES = 4
_TRADE_GROUPS = 10
_CLOSE_ENOUGH = 1e-3  # relative distance below the target that no swap is worth looking for


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
    back, out = _movable(selection)
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
    pairs = sorted(np.argwhere(allowed).tolist(), key=lambda p: (-rise[p[0], p[1]], back[p[0]], out[p[1]]))
    return any(_swap_pair(selection, back[i], out[j], target) for i, j in pairs[:_SWAP_CANDIDATES])


def _movable(selection: Selection) -> tuple[list[str], list[str]]:
    """Groups that have a block to give back, and groups that have one left to drop."""
    back = [name for name, rung in selection.rungs.items() if rung]
    out = [name for name, rung in selection.rungs.items() if rung < selection.ladders[name].num_rungs]
    return back, out


def _swap_pair(selection: Selection, back: str, out: str, target: float) -> bool:
    """Give back a block of one group for a block of another; undone unless the cost rises within the target."""
    selection.move(back, -1)
    weigh(selection, out, 1)
    selection.move(out, 1)
    total = selection.cost.total(selection.widths)
    if selection.total < total <= target:
        selection.total = total
        return True
    selection.move(out, -1)
    selection.move(back, 1)
    return False


def trade(selection: Selection, target: float, deadband: float) -> None:
    """For the landing: give back one or two blocks for one or two others, until the dead-band is reached.

    Among all such trades the one is made that lowers

        summed saliency of what is dropped + price * (target - total)

    the most: what is left of the budget counts as much as the price says. Only the groups whose next
    or last block is nearest to the price take part, so that the search stays within some thousand
    costs; with many groups blocks are fine and `swap` has already come near.

    Args:
        selection: at or below the target, after `add_back`; moved in place.
        target: cost in the resource's own unit.
        deadband: relative distance below the target that is near enough.
    """
    for _ in range(_MAX_TRADES):
        if target - selection.total <= deadband * target:
            return
        best = min(_trades(selection, target), default=None)
        if best is None or best[0] >= 0:
            return
        for name, count in best[1]:
            if count > 0:
                weigh(selection, name, 1)
            selection.move(name, count)
        selection.total = selection.cost.total(selection.widths)
        add_back(selection, target)


def _trades(selection: Selection, target: float) -> Iterator[tuple[float, tuple[tuple[str, int], ...]]]:
    """Every trade that raises the cost within the target: (change of the objective, moves)."""
    back, out = _movable(selection)
    back, out = _nearest(selection, back, -1), _nearest(selection, out, 0)
    before = selection.total
    ups = [pair for count in (1, 2) for pair in combinations_with_replacement(back, count)]
    for up in ups:
        downs = [pair for count in (1, 2) for pair in combinations_with_replacement(out, count)]
        for down in downs:
            if set(up) & set(down) or not _possible(selection, up, down):
                continue
            moves = (*((name, -1) for name in up), *((name, 1) for name in down))
            change = _try(selection, moves, target, before)
            if change is not None:
                yield change, moves


def _nearest(selection: Selection, names: list[str], offset: int) -> list[str]:
    """The groups whose block at this offset from the present rung is worth most nearly the price."""

    def distance(name: str) -> tuple[float, str]:
        worth = selection.worth[name][selection.rungs[name] + offset]
        return (abs(worth - selection.highest) if np.isfinite(worth) else np.inf, name)

    return sorted(names, key=distance)[:_TRADE_GROUPS]


def _possible(selection: Selection, up: tuple[str, ...], down: tuple[str, ...]) -> bool:
    """Whether the ladders have that many rungs."""
    enough = all(selection.rungs[name] >= up.count(name) for name in up)
    return enough and all(
        selection.rungs[name] + down.count(name) <= selection.ladders[name].num_rungs for name in down
    )


def _try(selection: Selection, moves: tuple[tuple[str, int], ...], target: float, before: float) -> float | None:
    """Change of the objective if these moves were made, None where they lead over the target or not up."""
    dropped = _dropped(selection, moves)
    for name, count in moves:
        selection.move(name, count)
    total = selection.cost.total(selection.widths)
    lost = _dropped(selection, moves) - dropped if selection.allocation == "worth" else 0.0
    for name, count in moves:
        selection.move(name, -count)
    if not before < total <= target:
        return None
    price = selection.highest if selection.allocation == "worth" else 1.0
    return lost - price * (total - before)


def _dropped(selection: Selection, moves: tuple[tuple[str, int], ...]) -> float:
    """Summed saliency of what the moved groups have dropped."""
    return sum(float(selection.ladders[name].salience[selection.rungs[name]]) for name in sorted({n for n, _ in moves}))
