"""Swap: blocks given back for other blocks, so that a cut in coarse blocks comes nearer to its target.

For allocation by worth: an even cut would not stay even.
"""

from __future__ import annotations

from itertools import combinations_with_replacement

import numpy as np

from setpoint.controller.selection import Selection, add_back, regained, weigh

_MAX_SWAPS = 8
_SWAP_CANDIDATES = 16
_MAX_TRADES = 4
_TRADE_GROUPS = 10
_PREMIUM = 3.0  # what is left of the budget after a landing counts this many times its price
_CLOSE_ENOUGH = 1e-3  # relative distance below the target that no swap is worth looking for


def swap(selection: Selection, target: float, deadband: float) -> None:
    """Give back one block and drop another in its place, while that gets nearer to the target cheaply.

    A greedy descent stops at the first block that crosses the target, often a coarse one; a finer block
    elsewhere may do. Each swap raises the cost and keeps it within the target. Inside the dead-band it
    must not raise the summed saliency of what is dropped; below it, it may by as much as the cost won
    back is worth at the price. At most a few are made; afterwards no single block fits back.
    The selection is at or below the target, after `add_back`.
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
    kept = np.array([selection.salience(name, selection.rungs[name] - 1) for name in back])
    lost = np.array([selection.salience(name, selection.rungs[name]) for name in out])
    allowed &= lost[None, :] - kept[:, None] <= price * rise
    pairs = sorted(np.argwhere(allowed).tolist(), key=lambda p: (-rise[p[0], p[1]], back[p[0]], out[p[1]]))
    return any(_make(selection, (back[i],), (out[j],), target) for i, j in pairs[:_SWAP_CANDIDATES])


def _movable(selection: Selection) -> tuple[list[str], list[str]]:
    back = [name for name, rung in selection.rungs.items() if rung]
    out = [name for name, rung in selection.rungs.items() if rung < selection.ladders[name].num_rungs]
    return back, out


def trade(selection: Selection, target: float, deadband: float) -> None:
    """For the landing: give back one or two blocks for one or two others, until the dead-band is reached.

    Among all such trades the one is made that lowers

        summed saliency of what is dropped + 3 * price * (target - total)

    the most. What a landing leaves unused is lost for good, so it counts above its price. Only the
    groups whose next or last block is nearest to the price take part, so that the search stays within
    some thousand savings; with many groups blocks are fine and `swap` has already come near.
    """
    for _ in range(_MAX_TRADES):
        if target - selection.total <= deadband * target:
            return
        best = min(_trades(selection, target), default=None)
        if best is None or best[0] >= 0 or not _make(selection, best[1], best[2], target):
            return
        add_back(selection, target)


Trade = tuple[float, tuple[str, ...], tuple[str, ...]]
"""(change of the objective, groups that get a block back, groups that lose one)."""


def _make(selection: Selection, up: tuple[str, ...], down: tuple[str, ...], target: float) -> bool:
    """Make a trade; undone unless the cost, counted afresh, rises within the target."""
    for name in up:
        selection.move(name, -1)
    for name in down:
        weigh(selection, name, 1)
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
    found: list[Trade] = []
    for up in [names for count in (1, 2) for names in combinations_with_replacement(back, count)]:
        if any(selection.rungs[name] < up.count(name) for name in up):
            continue
        total, lost = selection.total, 0.0
        for name in up:
            total += regained(selection, name)
            selection.move(name, -1)
            lost -= selection.salience(name, selection.rungs[name])
        _drop_one_or_two(selection, [name for name in out if name not in up], target, (total, lost, up, ()), found)
        for name in up:
            selection.move(name, 1)
    return found


def _drop_one_or_two(
    selection: Selection,
    out: list[str],
    target: float,
    so_far: tuple[float, float, tuple[str, ...], tuple[str, ...]],
    found: list[Trade],
) -> None:
    """Complete a half-made trade (cost, saliency lost, given back, dropped) by one block or, if not enough, two."""
    total, lost, up, down = so_far
    for place, name in enumerate(out):
        rung = selection.rungs[name]
        if rung == selection.ladders[name].num_rungs:
            continue
        cost = total - selection.cost.saving(selection.widths, name, selection.size(name, rung))
        loss = lost + selection.salience(name, rung)
        if selection.total < cost <= target:
            price = _PREMIUM * selection.highest
            found.append((loss - price * (cost - selection.total), up, (*down, name)))
        elif cost > target and not down:
            selection.move(name, 1)
            _drop_one_or_two(selection, out[place:], target, (cost, loss, up, (name,)), found)
            selection.move(name, -1)


def _nearest(selection: Selection, names: list[str], offset: int) -> list[str]:
    """The groups whose block at this offset from the present rung is worth most nearly the price."""

    def distance(name: str) -> tuple[float, str]:
        worth = selection.worth[name][selection.rungs[name] + offset]
        return (abs(worth - selection.highest) if np.isfinite(worth) else np.inf, name)

    return sorted(names, key=distance)[:_TRADE_GROUPS]
