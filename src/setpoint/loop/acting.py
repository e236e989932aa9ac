"""Acting: a plan carried out on everything that is indexed by unit, or on the masks of single weights."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool

from setpoint.actuator.balance import turned
from setpoint.actuator.shrink import shrink
from setpoint.controller.plan import Plan
from setpoint.loop.record import only_kept
from setpoint.loop.regrowth import Regrowth
from setpoint.sensor.reading import Reading

if TYPE_CHECKING:
    from setpoint.loop.loop import Loop


def act(loop: Loop, plan: Plan, state: Any, reading: Reading) -> tuple[dict[str, Bool[np.ndarray, " _units"]], str]:
    """Carry a plan out; all that can fail comes before the model changes.

    Args:
        loop: whose model, optimizers and memory follow.
        plan: what goes and what comes back.
        state: the controller's next state, before the plan is carried out.
        reading: that the plan was made on.

    Returns:
        By group, which of the units active now have come back; and what is to be said.

    Raises:
        RankError: when another rank could not; this one is then as it was, too.
    """
    loop._account.resizing.last_seconds = 0.0
    if plan.empty():
        loop._controller_state = state
        return {}, ""
    if loop._weights is None:
        return _act_on_units(loop, plan, state, reading)
    with loop._account.resizing:
        held = loop._weights.acted(plan, loop._parts, loop._sensor_state, state)
    loop._groups, loop._sensor_state, loop._controller_state = held
    loop._watch.changed(loop._step, cut=plan.drops())
    return {}, ""


def _act_on_units(
    loop: Loop, plan: Plan, state: Any, reading: Reading
) -> tuple[dict[str, Bool[np.ndarray, " _units"]], str]:
    parts, account, some = loop._parts, loop._account, changing(plan)
    groups = [each for each in loop._groups if each.name in some]
    with account.resizing, parts.host.resizable(f"the cut after step {loop._step}", groups) as agreed:
        regrown, note = _changed(loop, plan, state, reading, agreed)
    loop._sensing_flops = parts.sensor.flops(loop._groups, parts.model)
    account.resized(parts.costs["flops"].total(loop.widths))
    parts.metering.cut()
    loop._watch.changed(loop._step, cut=plan.drops())
    return regrown, note


def changing(plan: Plan) -> set[str]:
    """Names of the groups that lose units or get some."""
    return {name for name, kept in plan.keep.items() if not kept.all()} | {
        n for n, units in plan.grow.items() if len(units)
    }


def _changed(
    loop: Loop, plan: Plan, state: Any, reading: Reading, agreed: Callable[[], None]
) -> tuple[dict[str, Bool[np.ndarray, " _units"]], str]:
    """Drop what is to go, and bring back what is to come back; each is undone if `agreed` raises."""
    parts, regrowth = loop._parts, loop._regrowth
    regrown: dict[str, Bool[np.ndarray, " _units"]] = {}
    note = ""
    if plan.drops():
        if regrowth is None and loop._watch.can_roll_back(parts.sensor, parts.controller, loop._account.resizes):
            regrowth = loop._regrowth = Regrowth(parts, loop._account)
        sensed, state = parts.sensor.cut(loop._sensor_state, plan.keep), parts.controller.cut(state, plan.keep)
        whole = regrowth.as_it_is(loop._groups, plan, reading.basis) if regrowth is not None else {}
        what = (parts.model, parts.optimizers, loop._groups, plan.keep)
        with (
            turned(*what, reading.basis, parts.copies, rest=regrowth is not None and regrowth.lasting),
            regrowth.resting(plan.keep) if regrowth is not None else nullcontext("") as note,
        ):
            groups = shrink(*what, parts.copies, agreed=agreed)
        if regrowth is not None:
            regrowth.last_cut(whole)
        loop._groups, loop._sensor_state, loop._origin = groups, sensed, only_kept(loop._origin, plan)
    loop._controller_state = state
    if plan.grows() and regrowth is not None:
        loop._groups, regrown = regrowth.grow(loop._groups, plan, agreed)
        loop._sensor_state = parts.sensor.grow(loop._sensor_state, regrown)  # type: ignore[attr-defined]
        loop._controller_state = parts.controller.grow(loop._controller_state, regrown)  # type: ignore[attr-defined]
        loop._origin = regrowth.origin
    return regrown, note
