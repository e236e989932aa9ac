"""Acting: a plan carried out on everything that is indexed by unit, or on the masks of single weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool

from setpoint.actuator.shrink import named_tensors, shrink
from setpoint.controller.plan import Plan
from setpoint.groups.follow import Change, follow
from setpoint.groups.group import Group
from setpoint.loop.agreement import together
from setpoint.loop.parts import Parts
from setpoint.loop.record import only_kept
from setpoint.loop.regrowth import Regrowth
from setpoint.loop.wrapper import rewrap
from setpoint.sensor.reading import Reading
from setpoint.states.turn import turned

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
    what = f"the cut after step {loop._step}"

    def agree() -> None:
        with together(parts.ranks, what):
            pass

    with account.resizing, together(parts.ranks, what) as facts:
        try:
            with in_full(parts, tensors_of(loop._groups, some), agree) as agreed:
                regrown, note = _changed(loop, plan, state, reading, agreed)
        finally:  # also after half of it, and after shapes came and went: gradients must not stay unsynchronised
            if parts.averaging is not None:
                rewrap(parts.averaging)
        loop._recompiling.follow(parts.model, [each for each in loop._groups if each.name in some])
        facts["shapes"] = [tuple(tensor.shape) for tensor in named_tensors(parts.model).values()]
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


def tensors_of(groups: Iterable[Group], names: Collection[str]) -> set[str]:
    """Names of the tensors in which units of these groups lie."""
    return {part.tensor for group in groups if group.name in names for part in group.slices}


def in_full(
    parts: Parts, names: Collection[str], agree: Callable[[], None]
) -> AbstractContextManager[Callable[[], None]]:
    """Inside, these tensors can change their shape, and do so for good when what is yielded is called."""
    if parts.sharding is None:
        return nullcontext(agree)
    return parts.sharding.gathered(names, parts.optimizers, agree)


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
        change = Change(keep=plan.keep)
        sensed, state = follow(loop._sensor_state, change), follow(state, change)
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
        change = Change(regrown=regrown)
        loop._sensor_state, loop._controller_state = (
            follow(each, change) for each in (loop._sensor_state, loop._controller_state)
        )
        loop._origin = regrowth.origin
    return regrown, note
