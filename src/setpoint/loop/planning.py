"""Planning: what is decided at a step, once the loss and the length of the run have had their say."""

from __future__ import annotations

from typing import Any

from setpoint.controller.plan import Observation, Plan
from setpoint.controller.tolerant import TolerantController
from setpoint.errors import LoopError
from setpoint.groups.group import Group
from setpoint.loop.parts import Parts
from setpoint.loop.record import waiting
from setpoint.loop.watch import LossWatch
from setpoint.spending.spending import Spending


def planned(
    parts: Parts, spending: Spending, watch: LossWatch, groups: tuple[Group, ...], state: Any, seen: Observation
) -> tuple[Any, Plan, int | None]:
    """The controller's next state and plan, unless the loss has left its trend or the landing had better wait.

    Args:
        parts: what the loop is made of.
        spending: what it is held to.
        watch: what was observed of the loss.
        groups: as they are now.
        state: the controller's.
        seen: what is known.

    Returns:
        State, plan, and the step at which to decide again, if the last cut waits.

    Raises:
        LoopError: when a tolerance is to be held and no loss was observed.
    """
    controller = parts.controller
    if isinstance(controller, TolerantController) and not watch.watching:
        raise LoopError("a Tolerance needs the loss: call loop.observe(loss=...) before every optimizer.step()")
    wider = {name: width + len(seen.last_dropped.get(name, ())) for name, width in seen.widths.items()}
    affordable = all(spending.expected(name, wider) <= value for name, value in seen.most.items())
    back = watch.roll_back(seen, controller, groups) if affordable else None
    if back is not None:
        return state, back, None
    after, plan = controller.decide(state, seen, spending.cost, groups)
    wait = _wait(spending, seen, plan)
    if not wait:
        return after, plan, None
    again = seen.step + wait
    return state, waiting(plan, again), again


def _wait(spending: Spending, seen: Observation, plan: Plan) -> int:
    """Steps by which the last cut had better wait, so that the budget of the run is used up; 0 for none."""
    if not plan.drops():
        return 0
    after = dict(seen.widths) | {name: int(keep.sum()) for name, keep in plan.keep.items()}
    for name, units in plan.grow.items():
        after[name] += len(units)
    waits = (
        rest.wait(
            seen.step,
            seen.total_steps,
            lands=plan.landed,
            present=spending.expected(name, seen.widths),
            after=spending.expected(name, after),
        )
        for name, rest in seen.rest.items()
    )
    return min(waits, default=0)
