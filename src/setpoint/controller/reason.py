"""A reason: why a decision was made, or not made, in words."""

from __future__ import annotations

import math

from setpoint.controller.aim import Aim
from setpoint.controller.selection import Selection, regained
from setpoint.cost.budget import DENSE, UNIT
from setpoint.groups.group import Group
from setpoint.sensor.reading import Reading


def apart(fraction: float, what: str) -> str:
    """A relative difference, for people.

    >>> apart(-0.0123, "the budget"), apart(-1e-9, "the budget")
    ('1.2 % below the budget', '0.0 % below the budget')
    """
    return f"{100 * abs(fraction):.1f} % {'above' if fraction > 0 else 'below'} {what}"


def these(units: int, groups: int) -> str:
    """So many units of so many groups."""
    return f"{units} unit{'s' * (units != 1)} of {groups} group{'s' * (groups != 1)}"


def problem_with(reading: Reading | None, metered: float | None, groups: tuple[Group, ...]) -> str:
    """What forbids a decision: no reading, or one that is incomplete or not finite; "" if nothing does."""
    if reading is None:
        return "no decision: there is no reading yet"
    if missing := [group.name for group in groups if group.name not in reading.saliency]:
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
        return f"budget met: cost is {apart(seen / limit - 1, 'the budget')}"
    return f"nothing to drop: cost is {apart(seen / reference - 1, 'the reference')}"


def explain_cut(selection: Selection, price: float, aim: Aim, dense: float, budget_met: bool, deadband: float) -> str:
    """What is left and what is dropped, up to the first semicolon; then the price and how near the reference is."""
    dropped = {name: int(selection.ladders[name].edges[rung]) for name, rung in selection.rungs.items() if rung}
    reference = "the reference" if math.isclose(aim.target, aim.reference) else "the corrected reference"
    off = selection.total / aim.target - 1
    left = f"{100 * selection.total / dense:.1f} % of the {DENSE.get(aim.resource, aim.resource)}"
    near = apart(off, reference) + (_brake(selection) if off > 0 or not dropped else "")
    if not dropped:
        return f"nothing dropped: {left}, {near}"
    what = f"dropped {these(sum(dropped.values()), len(dropped))}"
    words = f"budget met: {left}; {what}" if budget_met and off <= 0 else f"{what}, {left} are left"
    words += f"; {near}; the price is {price:.3g} of loss {per(aim.resource)}"
    if -off > deadband:
        finest = 100 * min(regained(selection, name) for name in dropped) / aim.target
        words += f"; the smallest dropped block costs {finest:.1f} % of {reference}, which is too much to bring it back"
    return words


def per(resource: str) -> str:
    """What a price of a resource is for, in words.

    >>> per("latency"), per("joint")
    ('for each s', 'for all of the leading budget')
    """
    return "for all of the leading budget" if resource == "joint" else f"for each {UNIT.get(resource, resource)}"


def _brake(selection: Selection) -> str:
    """How many groups cannot come down further at this decision."""
    feet = [ladder.num_rungs == selection.rungs[name] for name, ladder in selection.ladders.items()]
    few = f" ({sum(feet)} of {len(feet)} groups cannot be cut further at this step)"
    return few if any(feet) else ""
