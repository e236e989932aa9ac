"""A transfer: what a controller remembers, carried over to another budget or length of the run without a bump."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from setpoint.controller.gates import GatedController
from setpoint.controller.priced import PricedController
from setpoint.weights.exchanging import ExchangingController


def transfer(controller: object, state: Any, *, step: int, total_steps: int, present: float, limit: float) -> Any:
    """The state with which the controller goes on from where the plant is.

    The reference is made to pass through what a step costs now, and comes down from there to the new limit by its
    settle step, so nothing jumps at the change. The PI part and the price are kept: they are relative.

    Args:
        controller: the controller.
        state: its state; that of a controller without a reference is returned as it is.
        step: optimizer steps done.
        total_steps: of the run, as it is now.
        present: predicted cost of a step now.
        limit: the new one.
    """
    if isinstance(controller, ExchangingController):
        return transfer(controller.inner, state, step=step, total_steps=total_steps, present=present, limit=limit)
    if isinstance(controller, GatedController):
        priced = transfer(
            controller.priced, state.priced, step=step, total_steps=total_steps, present=present, limit=limit
        )
        return replace(state, priced=priced)
    if not isinstance(controller, PricedController) or state.start is None:
        return state
    value = present * state.feedback.factor()
    start = controller.reference.start_through(step, total_steps, value=value, limit=limit)
    return replace(state, start=start)
