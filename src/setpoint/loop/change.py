"""A change: how a loop goes on with another budget or another length of the run."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from setpoint.controller.reference import Reference
from setpoint.controller.transfer import transfer
from setpoint.spending.spending import Spending

if TYPE_CHECKING:
    from setpoint.loop.loop import Loop

_FRESH_STEPS = 50
"""Steps that are sensed before a landing is decided again."""


def reference_of(controller: object) -> Reference:
    """The reference that a controller follows, or the usual one where it has none."""
    reference = getattr(controller, "reference", None)
    return reference if isinstance(reference, Reference) else Reference()


def go_on_with(loop: Loop, spending: Spending) -> None:
    """Let a loop go on with this: without a bump, and without a landing that holds for another budget.

    Args:
        loop: that runs.
        spending: what it is held to from here on.
    """
    loop._spending = spending
    if loop._landed and spending.target.runs:
        _reopen(loop)
    spending.replan(loop._step, loop.widths)
    cost, limit = spending.cost, spending.target.limits
    if spending.budgets:
        loop._controller_state = transfer(
            loop._parts.controller,
            loop._controller_state,
            step=loop._step,
            total_steps=spending.total_steps,
            present=cost.total(loop.widths),
            limit=limit[cost.resource],
        )


def reopen_if_over(loop: Loop) -> None:
    """After a landing, where a decision would be due: decide again if meters say that the run will be over its budget.

    Args:
        loop: that has landed.
    """
    if loop._parts.controller.due(loop._step, loop.total_steps) and loop._spending.over(loop._step, loop.widths):
        _reopen(loop)


def _reopen(loop: Loop) -> None:
    """Take a landing back, and decide again once some fresh steps have been sensed."""
    if loop._plan is not None:
        loop._landed, loop._plan = False, replace(loop._plan, landed=False)
        loop._again = loop._step + max(1, min(_FRESH_STEPS, (loop.total_steps - loop._step) // 10))
