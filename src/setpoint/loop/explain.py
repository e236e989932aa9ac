"""An explanation: what became of one unit, and why."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from setpoint.errors import GroupError
from setpoint.loop.control import Control


@dataclass(frozen=True)
class Explanation:
    """What became of one unit.

    Args:
        group: name of the group.
        origin: index of the unit in the dense model.
        what: what a unit is: "channel", "neuron", "head".
        alive: whether it is still part of the model.
        step: the step at which it was dropped, or that of the last reading; None if there was none.
        saliency: estimated loss increase if it is dropped, at that step; NaN if there was no reading.
        worth: saliency of its block / what the block saves, at that step; NaN where it was not evaluated.
        price: loss per unit of resource at that step; NaN if there was no decision yet.
        reason: the decision's own words.
        returned: the last step at which it came back from the reserve; None if it never did.
        gain: what its probe promised then; NaN if it never came back.
    """

    group: str
    origin: int
    what: str
    alive: bool
    step: int | None
    saliency: float
    worth: float
    price: float
    reason: str
    returned: int | None = None
    gain: float = math.nan

    def __str__(self) -> str:
        unit = f"{self.what} {self.origin} of {self.group}"
        if self.step is None:
            return f"{unit} is alive; no decision has been made yet."
        fate = "is alive" if self.alive else f"was dropped at step {self.step}"
        if self.returned is not None:
            # A cut that was taken back for the sake of the loss was not probed.
            promise = "" if math.isnan(self.gain) else f", promising to lower the loss by {self.gain:.3g},"
            fate = f"came back at step {self.returned}{promise} and {fate}"
        saliency = "unknown" if math.isnan(self.saliency) else f"{self.saliency:.3g}"
        price = "unknown" if math.isnan(self.price) else f"{self.price:.3g}"
        worth = "" if math.isnan(self.worth) else f"worth {self.worth:.3g}, "
        when = f", as read at step {self.step}" if self.alive else ""
        numbers = f"dropping it costs {saliency} of loss; {worth}price {price} (loss per unit of resource)"
        return f"{unit} {fate}: {numbers}{when}. {self.reason}".rstrip()


def explain(control: Control, group: str, origin: int, price: float, resource: str) -> Explanation:
    """What became of a unit, and why; `price` is that of the resource at the last decision."""
    dense = {candidate.name: candidate for candidate in control.dense}
    if group not in dense:
        raise GroupError(f"no group {group!r} is pruned here: use one of {', '.join(dense)}")
    if not 0 <= origin < dense[group].num_units:
        raise GroupError(f"group {group!r} has units 0 to {dense[group].num_units - 1}, got {origin}")
    what = dense[group].what
    entries = list(reversed(control.ledger[:]))
    returned, gain = None, math.nan
    back = next((entry for entry in entries if origin in entry.grown.get(group, ())), None)
    if back is not None:
        returned, gain = back.step, _at(back.gain, group, back.grown[group].index(origin))
    active = np.flatnonzero(control.actuator.origin[group] == origin)
    if not len(active):
        drop = next(entry for entry in entries if origin in entry.dropped.get(group, ()))
        at, price = drop.dropped[group].index(origin), drop.price.get(resource, math.nan)
        saliency, worth = _at(drop.saliency, group, at), _at(drop.worth, group, at)
        return Explanation(group, origin, what, False, drop.step, saliency, worth, price, drop.reason, returned, gain)
    now, at = control.state, int(active[0])
    saliency, worth = _at(now.saliency, group, at), _at(now.worth, group, at)
    step, reason, price = (now.plan.step, now.plan.reason, price) if now.plan else (None, "", math.nan)
    return Explanation(group, origin, what, True, step, saliency, worth, price, reason, returned, gain)


def _at(values: Mapping[str, Any], group: str, position: int) -> float:
    own = values.get(group, ())
    return float(own[position]) if position < len(own) else math.nan
