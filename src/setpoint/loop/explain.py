"""An explanation: what became of one unit, and why."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from setpoint.errors import GroupError
from setpoint.groups.group import Group
from setpoint.ledger import Ledger
from setpoint.loop.cutting import Origins
from setpoint.loop.progress import Progress


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
        numbers = (
            f"dropping it costs {_number(self.saliency)} of loss; worth {_number(self.worth)}, "
            f"price {_number(self.price)} (loss per unit of resource)"
        )
        fate = "is alive" if self.alive else f"was dropped at step {self.step}"
        if self.returned is not None:
            known = not math.isnan(self.gain)  # a cut that was taken back for the sake of the loss was not probed
            promise = f", promising to lower the loss by {_number(self.gain)}," if known else ""
            fate = f"came back at step {self.returned}{promise} and {fate}"
        when = f", as read at step {self.step}" if self.alive else ""
        return f"{unit} {fate}: {numbers}{when}. {self.reason}".rstrip()


def explain_drop(ledger: Ledger, group: str, origin: int, what: str, resource: str) -> Explanation | None:
    """The last drop of a unit that the ledger tells of, or None if it was never dropped.

    Args:
        ledger: the record.
        group: name of the group.
        origin: index of the unit in the dense model.
        what: what a unit of the group is.
        resource: the budget's resource, whose price is quoted.
    """
    returned, gain = last_return(ledger, group, origin)
    for entry in reversed(ledger[:]):
        dropped = entry.dropped.get(group, [])
        if origin in dropped:
            at = dropped.index(origin)
            return Explanation(
                group=group,
                origin=origin,
                what=what,
                alive=False,
                step=entry.step,
                saliency=_at(entry.saliency.get(group, []), at),
                worth=_at(entry.worth.get(group, []), at),
                price=entry.price.get(resource, math.nan),
                reason=entry.reason,
                returned=returned,
                gain=gain,
            )
    return None


def last_return(ledger: Ledger, group: str, origin: int) -> tuple[int | None, float]:
    """The last step at which a unit came back, and the gain that its probe promised; (None, NaN) if it never did.

    Args:
        ledger: the record.
        group: name of the group.
        origin: index of the unit in the dense model.
    """
    for entry in reversed(ledger[:]):
        grown = entry.grown.get(group, [])
        if origin in grown:
            return entry.step, _at(entry.gain.get(group, []), grown.index(origin))
    return None, math.nan


def _at(values: list[float], position: int) -> float:
    return values[position] if position < len(values) else math.nan


def _number(value: float) -> str:
    return "unknown" if math.isnan(value) else f"{value:.3g}"


def explain(
    now: Progress,
    ledger: Ledger,
    dense: tuple[Group, ...],
    origins: Origins,
    group: str,
    origin: int,
    price: float,
    resource: str,
) -> Explanation:
    """What became of a unit, and why.

    Args:
        now: where the run is.
        ledger: every decision so far.
        dense: the groups at dense widths.
        origins: by group, index that each active unit has in the dense model.
        group: name of the group.
        origin: index of the unit in the dense model.
        price: at the last decision.
        resource: whose price it is.

    Raises:
        GroupError: for a group that is not pruned here, or a unit that it never had.
    """
    found = next((each for each in dense if each.name == group), None)
    if found is None:
        raise GroupError(f"no group {group!r} is pruned here: use one of {', '.join(each.name for each in dense)}")
    if not 0 <= origin < found.num_units:
        raise GroupError(f"group {group!r} has units 0 to {found.num_units - 1}, got {origin}")
    position = np.flatnonzero(origins[group] == origin)
    dropped = explain_drop(ledger, group, origin, found.what, resource) if not len(position) else None
    if dropped is not None:
        return dropped
    returned, gain = last_return(ledger, group, origin)
    at, plan = int(position[0]), now.plan
    value, read = (float(each[group][at]) if group in each else math.nan for each in (now.worth, now.saliency))
    step, reason, price = (plan.step, plan.reason, price) if plan else (None, "", math.nan)
    return Explanation(group, origin, found.what, True, step, read, value, price, reason, returned, gain)
