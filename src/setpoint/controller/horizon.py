"""The horizon: what a step may cost from now on, so that the whole run stays within its budget."""

from __future__ import annotations

import math

from setpoint.controller.reference import Reference

_BISECTIONS = 60


def step_limit(
    reference: Reference, step: int, total_steps: int, *, rest: float, start: float, present: float
) -> float:
    """The highest limit per step that the rest of a run can be held to with what is left to spend.

    The controller comes down to the reference at each decision and stays there until the next, and a cut is not taken
    back, so a run that is held to the limit L still spends

        rest(L) = sum over the steps s to come of min(present, reference(d(s); start, L)),

    with d(s) the last decision before s. This grows with L; bisection finds the L at which it equals what is left.
    Asked again at each decision (a receding horizon) it takes in whatever came out otherwise: blocks that left a cut
    short of its target, steps that cost more or less than predicted, overhead, a run made longer or shorter.

    Args:
        reference: the trajectory, and when decisions are made.
        step: the decision that is to be made now, in optimizer steps done.
        rest: what is left to spend on the steps to come, in the resource's unit.
        start: cost of a step of the dense model.
        present: cost of a step now.

    Returns:
        At most `start`; 0 or less where nothing is left, so that no model meets it.

    >>> step_limit(Reference(), 300, 1000, rest=350.0, start=1.0, present=0.8)
    0.5
    """
    if rest <= 0:
        return min(rest, 0.0)
    edges = [step, *(s for s in range(step + 1, total_steps) if reference.due(s, total_steps)), total_steps]
    spans = [(begin, end - begin) for begin, end in zip(edges, edges[1:], strict=False)]

    def spent(limit: float) -> float:
        return sum(
            length * min(present, reference.at(begin, total_steps, start=start, limit=limit)) for begin, length in spans
        )

    low, high = 0.0, start
    if spent(start) <= rest:
        return start
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) <= rest else (low, middle)
    return low


def next_decision(reference: Reference, step: int, total_steps: int) -> int:
    """The step of the next decision, or the end of the run where none is to come."""
    return next((s for s in range(step + 1, total_steps + 1) if reference.due(s, total_steps)), total_steps)


def least_run(reference: Reference, step: int, total_steps: int, *, present: float, cheapest: float) -> float:
    """The least that the rest of a run can spend: the present model until the next decision, then the cheapest one.

    Args:
        reference: when decisions are made.
        present: cost of a step now.
        cheapest: cost of a step of the cheapest model.
    """
    coming = next_decision(reference, step, total_steps)
    return present * (coming - step) + cheapest * (total_steps - coming)


def most_per_step(reference: Reference, step: int, total_steps: int, *, rest: float, cheapest: float) -> float:
    """The most that a step may cost until the next decision, so that the cheapest model from there on spends the rest.

    Where each decision keeps to it, the next one can: a run whose rest is at least `least_run` before its first
    decision is never over its budget.

    Args:
        reference: when decisions are made.
        step: the decision that is to be made now, in optimizer steps done.
        rest: what is left to spend on the steps to come.
        cheapest: cost of a step of the cheapest model.

    >>> round(most_per_step(Reference(), 300, 1000, rest=200.0, cheapest=0.25), 3)  # decisions at 300 and 331
    1.056
    """
    coming = next_decision(reference, step, total_steps)
    if coming == step:
        return math.inf
    return (rest - cheapest * (total_steps - coming)) / (coming - step)
