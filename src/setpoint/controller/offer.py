"""An offer: a block of resting units that may come back, and what it is worth by the last probe."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from jaxtyping import Float64, Int

from setpoint.cost.cost import Cost
from setpoint.groups.group import Group


@dataclass(frozen=True, eq=False)
class Probe:
    """First-order gain of bringing each resting unit back, as read in a few ordinary steps.

    With its outgoing weights at zero a unit changes nothing, and the loss falls along the way to the weights
    `w` that it had when it was dropped by, to first order,

        gain = -sum over its outgoing weights of w * dL/dw, at zero.

    Whoever picks the largest of many rough numbers picks luck, so decisions go by `gain - error`. Once back, a unit
    stays or goes by its curvature: with B samples behind a step, gate gradients of mean m and deviation s foretell the
    saliency (B s^2 + m^2) / 2. Error and deviation are NaN where a unit was present in one step only.
    """

    step: int  # optimizer steps done when it was taken
    origins: Mapping[str, Int[np.ndarray, " _resting"]]
    gain: Mapping[str, Float64[np.ndarray, " _resting"]]  # in the unit of the loss, mean over the probed steps
    error: Mapping[str, Float64[np.ndarray, " _resting"]]  # standard error of that mean
    rested: Mapping[str, Int[np.ndarray, " _resting"]]  # decisions since the unit was dropped
    drops: Mapping[str, Int[np.ndarray, " _resting"]]  # how often the unit has been dropped so far
    num_steps: int = 1  # how many were probed
    deviation: Mapping[str, Float64[np.ndarray, " _resting"]] = field(default_factory=dict)  # of the gain in one step

    def foretold(self, name: str, num_samples: int) -> Float64[np.ndarray, " _resting"]:
        """Saliency that the sensor will read of the units of a group once they are back; infinite where not known."""
        gain, deviation = self.gain[name], self.deviation.get(name)
        return np.full(len(gain), np.inf) if deviation is None else 0.5 * (num_samples * deviation**2 + gain**2)


@dataclass(frozen=True, eq=False)
class Offer:
    """One block of a group."""

    name: str  # of the group
    origins: Int[np.ndarray, " _block"]  # the units
    worth: float  # summed sure gain of the block / what it costs, at the widths with the group's better blocks back


Choice = TypeVar("Choice")


@dataclass(frozen=True, eq=False)
class Offers:
    """Blocks that may come back together, the worthiest first."""

    blocks: tuple[Offer, ...]

    def among(self, grow: Mapping[str, Int[np.ndarray, " _units"]]) -> Offers:
        """The blocks of which all units are among these origins."""
        return Offers(tuple(b for b in self.blocks if np.isin(b.origins, grow.get(b.name, [])).all()))

    def widened(self, widths: Mapping[str, int]) -> dict[str, int]:
        """Widths once these blocks are back."""
        wider = dict(widths)
        for block in self.blocks:
            wider[block.name] += len(block.origins)
        return wider

    def grow(self) -> dict[str, Int[np.ndarray, " units"]]:
        """By group, origins of all units, ascending."""
        origins: dict[str, list[int]] = {}
        for block in self.blocks:
            origins.setdefault(block.name, []).extend(block.origins.tolist())
        return {name: np.sort(units) for name, units in origins.items()}

    def worth(self) -> dict[str, Float64[np.ndarray, " units"]]:
        """By group, in the order of `grow`, the worth of each unit's block."""
        worth = {(block.name, int(unit)): block.worth for block in self.blocks for unit in block.origins}
        return {name: np.array([worth[name, int(unit)] for unit in units]) for name, units in self.grow().items()}

    def most_that_pay(self, select: Callable[[Offers], Choice], pays: Callable[[Choice], bool]) -> Choice | None:
        """The choice with the most blocks that still pay; None where none does.

        With more blocks the price that pays for them rises and the worth of the last one falls: hence the bisection.
        """
        best, low, high = None, 0, len(self.blocks)
        while low < high:
            middle = (low + high + 1) // 2
            tried = select(Offers(self.blocks[:middle]))
            if pays(tried):
                best, low = tried, middle
            else:
                high = middle - 1
        return best


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
) -> Offers:
    """Whole blocks of resting units that are sure to gain and to stay, the worthiest first.

    A unit's sure gain is its gain less the standard error, and at most the saliency that it will be read to have: one
    that gained more would go again for want of it. Where the error is unknown it is not offered, nor if it has rested
    for fewer decisions than `dwell`, or has come back `returns` times before. At one decision at most the fraction
    `slew` of a group's units comes back; one block always may.
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
    return Offers(tuple(offer for *_, offer in sorted(found, key=lambda ranked: ranked[:3])))
