"""An explanation: what became of one unit, and why."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from setpoint.actuator.actuator import Origins
from setpoint.errors import GroupError
from setpoint.groups.group import Group
from setpoint.ledger import Ledger
from setpoint.loop.state import RunState


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
        worth = "" if math.isnan(self.worth) else f"worth {_number(self.worth)}, "
        numbers = (
            f"dropping it costs {_number(self.saliency)} of loss; {worth}"
            f"price {_number(self.price)} (loss per unit of resource)"
        )
        fate = "is alive" if self.alive else f"was dropped at step {self.step}"
        if self.returned is not None:
            known = not math.isnan(self.gain)  # a cut that was taken back for the sake of the loss was not probed
            promise = f", promising to lower the loss by {_number(self.gain)}," if known else ""
            fate = f"came back at step {self.returned}{promise} and {fate}"
        when = f", as read at step {self.step}" if self.alive else ""
        return f"{unit} {fate}: {numbers}{when}. {self.reason}".rstrip()


def explain(
    now: RunState,
    ledger: Ledger,
    dense: tuple[Group, ...],
    origins: Origins,
    group: str,
    origin: int,
    price: float,
    resource: str,
) -> Explanation:
    """What became of a unit, and why; `price` is that of the resource at the last decision."""
    found = next((candidate for candidate in dense if candidate.name == group), None)
    if found is None:
        known = ", ".join(candidate.name for candidate in dense)
        raise GroupError(f"no group {group!r} is pruned here: use one of {known}")
    if not 0 <= origin < found.num_units:
        raise GroupError(f"group {group!r} has units 0 to {found.num_units - 1}, got {origin}")
    entries = list(reversed(ledger[:]))
    returned, gain = None, math.nan
    back = next((entry for entry in entries if origin in entry.grown.get(group, ())), None)
    if back is not None:
        returned, gain = back.step, _at(back.gain, group, back.grown[group].index(origin))
    position = np.flatnonzero(origins[group] == origin)
    drop = next((entry for entry in entries if origin in entry.dropped.get(group, ())), None)
    if drop is not None and not len(position):
        at = drop.dropped[group].index(origin)
        worth, saliency = _at(drop.worth, group, at), _at(drop.saliency, group, at)
        alive, step, reason, price = False, drop.step, drop.reason, drop.price.get(resource, math.nan)
    else:
        at = int(position[0])
        worth, saliency = _at(now.worth, group, at), _at(now.saliency, group, at)
        alive, step, reason = True, None, ""
        if now.plan is not None:
            step, reason = now.plan.step, now.plan.reason
        else:
            price = math.nan
    return Explanation(group, origin, found.what, alive, step, saliency, worth, price, reason, returned, gain)


def _at(values: Mapping[str, Any], group: str, position: int) -> float:
    own = values.get(group, ())
    return float(own[position]) if position < len(own) else math.nan


def _number(value: float) -> str:
    return "unknown" if math.isnan(value) else f"{value:.3g}"
