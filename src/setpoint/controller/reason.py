"""A reason: why a decision was made, or not made, in words."""

from __future__ import annotations

import math

from setpoint.controller.offer import Offer
from setpoint.controller.selection import Selection, regained
from setpoint.cost.budget import UNIT
from setpoint.groups.group import Group
from setpoint.sensor.reading import Reading


def percent(fraction: float) -> str:
    """A signed relative difference, for people.

    >>> percent(-0.0123)
    '-1.2 %'
    """
    return f"{100 * fraction:+.1f} %"


def problem_with(reading: Reading | None, metered: float | None, groups: tuple[Group, ...]) -> str:
    """What forbids a decision: no reading, or one that is incomplete or not finite; "" if nothing does."""
    if reading is None:
        return "no decision: there is no reading yet"
    missing = [group.name for group in groups if group.name not in reading.saliency]
    if missing:
        return f"no decision: the reading lacks {', '.join(missing)}"
    for group in groups:
        if reading.saliency[group.name].shape != (group.num_units,):
            return f"no decision: {group.name} has {group.num_units} units, its reading another number"
    if not reading.finite():
        return "no decision: the reading holds values that are not finite"
    if metered is not None and not (math.isfinite(metered) and metered > 0):
        return f"no decision: the meter reads {metered!r}"
    return ""


def explain_rest(seen: float, reference: float, limit: float, budget_met: bool) -> str:
    """Why nothing is dropped."""
    if budget_met:
        return f"budget met: nothing to drop, spending is {percent(seen / limit - 1)} from the limit"
    if seen > reference:
        return f"nothing to drop: spending is {percent(seen / reference - 1)} from the reference, correction under way"
    return f"nothing to drop: spending is {percent(seen / reference - 1)} from the reference"


def explain_cut(
    selection: Selection, price: float, resource: str, target: float, budget_met: bool, deadband: float
) -> str:
    """What is dropped, at which price, and how near it comes to the target."""
    dropped = {name: int(selection.ladders[name].edges[rung]) for name, rung in selection.rungs.items() if rung}
    off = selection.total / target - 1
    if not dropped:
        return f"nothing dropped, predicted cost stays {percent(off)} from the target{_brake(selection)}"
    words = f"dropped {sum(dropped.values())} units of {len(dropped)} groups at a price of {price:.3g} {per(resource)}"
    if off > 0:
        return f"{words}; predicted cost stays {percent(off)} from the target{_brake(selection)}"
    words = f"{'budget met: ' if budget_met else ''}{words}; predicted cost is {percent(off)} from the target"
    if -off > deadband:
        finest = min(regained(selection, name) for name in dropped)
        words += f", as the smallest block to give back costs {percent(finest / target)}"
    return words


def per(resource: str) -> str:
    """What a price of a resource is for, in words.

    >>> per("latency"), per("joint")
    ('for each s', 'for all of the leading budget')
    """
    return "for all of the leading budget" if resource == "joint" else f"for each {UNIT.get(resource, resource)}"


def explain_growth(offers: list[Offer]) -> str:
    """What comes back."""
    units, names = sum(len(offer.origins) for offer in offers), {offer.name for offer in offers}
    return f"brought back {units} units of {len(names)} groups, worth at least {offers[-1].worth:.3g} by their probe"


def _brake(selection: Selection) -> str:
    """How many groups cannot come down further at this decision."""
    at_foot = sum(ladder.num_rungs == selection.rungs[name] for name, ladder in selection.ladders.items())
    if not at_foot:
        return ""
    return f": {at_foot} of {len(selection.ladders)} groups are as low as slew limit, dwell and floors let them go"
