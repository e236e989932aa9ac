"""An offer: a block of resting units that may come back, and what it is worth by the last probe."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from setpoint.controller.plan import Probe
from setpoint.controller.selection import Selection
from setpoint.cost.cost import Cost
from setpoint.groups.group import Group


@dataclass(frozen=True, eq=False)
class Offer:
    """One block of a group."""

    name: str  # of the group
    origins: Int[np.ndarray, " _block"]  # the units
    worth: float  # summed sure gain of the block / what it costs, at the widths with the group's better blocks back


def offers_of(
    probe: Probe,
    cost: Cost,
    widths: Mapping[str, int],
    groups: tuple[Group, ...],
    *,
    dwell: int,
    returns: int,
    slew: float,
    num_samples: int = 1,
) -> list[Offer]:
    """Whole blocks of resting units that are sure to gain and to stay, the worthiest first.

    A unit's sure gain is its gain less the standard error, and at most the saliency that it will be read to have: one
    that gained more would go again for want of it. Where the error is unknown it is not offered. Within a group
    units come in the order of their sure gain. A unit is left out that has rested for fewer decisions
    than `dwell`, or has come back `returns` times before.

    Args:
        probe: what resting units would contribute.
        dwell: decisions that a unit rests at least.
        returns: how often a unit may come back in a run.
        slew: largest fraction of a group's units to come back at one decision; one block always may.
        num_samples: independent samples behind the gradient of a step.

    >>> from setpoint.cost.cost import ProductCost, Term
    >>> from setpoint.groups.group import Size
    >>> group, some = Group("a", "unit", num_units=4, slices=()), np.arange(3)
    >>> cost = ProductCost("flops", (Term(2.0, (Size(0, (("a", 1),)),)),))
    >>> gain, error = {"a": np.array([1.0, -1.0, 3.0])}, {"a": np.zeros(3)}
    >>> probe = Probe(9, {"a": np.array([5, 6, 7])}, gain, error, {"a": some + 2}, {"a": some})
    >>> offers = offers_of(probe, cost, {"a": 4}, (group,), dwell=2, returns=2, slew=0.5)
    >>> [(offer.origins.tolist(), offer.worth) for offer in offers]
    [([7], 1.5), ([5], 0.5)]
    """
    found: list[tuple[float, str, int, Offer]] = []
    for group in groups:
        name, block = group.name, group.multiple_of
        if name not in probe.gain or group.num_units % block:
            continue
        gain, origins = probe.gain[name] - probe.error[name], probe.origins[name]
        gain = np.minimum(gain, probe.foretold(name, num_samples))
        may = (gain > 0) & (probe.rested[name] >= dwell) & (probe.drops[name] <= returns)
        order = [int(at) for at in np.argsort(-gain, kind="stable") if may[at]]
        most = max(1, math.floor(slew * group.num_units) // block)
        worth = math.inf
        for number in range(min(len(order) // block, most)):
            chosen = np.array(order[number * block : (number + 1) * block])
            wider = {**widths, name: group.num_units + (number + 1) * block}
            saving = cost.saving(wider, name, block)
            if saving <= 0 or gain[chosen].sum() <= 0:
                break
            worth = min(worth, float(gain[chosen].sum()) / saving)
            found.append((-worth, name, number, Offer(name, np.sort(origins[chosen]), worth)))
    return [offer for *_, offer in sorted(found, key=lambda each: each[:3])]


Choice = tuple[Selection, str, list[Offer]]
"""What goes, a note on it, and the blocks that come back for it."""


def most_that_pay(
    offers: list[Offer], select: Callable[[list[Offer]], Choice], pays: Callable[[Choice], bool]
) -> Choice | None:
    """The largest number of offers, the worthiest first, that still pay; None where none does.

    The more blocks come back, the higher the price that pays for them and the lower the worth of the last one, so
    the number is found by bisection.
    """
    best, low, high = None, 0, len(offers)
    while low < high:
        middle = (low + high + 1) // 2
        tried = select(offers[:middle])
        if pays(tried):
            best, low = tried, middle
        else:
            high = middle - 1
    return best


def widened(widths: Mapping[str, int], offers: list[Offer]) -> dict[str, int]:
    """Widths once these blocks are back."""
    wider = dict(widths)
    for offer in offers:
        wider[offer.name] += len(offer.origins)
    return wider


def together(offers: list[Offer]) -> dict[str, Int[np.ndarray, " units"]]:
    """By group, origins of all units of these offers, ascending."""
    by_group: dict[str, list[Int[np.ndarray, " _block"]]] = {}
    for offer in offers:
        by_group.setdefault(offer.name, []).append(offer.origins)
    return {name: np.sort(np.concatenate(blocks)) for name, blocks in by_group.items()}
