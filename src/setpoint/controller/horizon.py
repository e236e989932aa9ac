"""The horizon: what a step may cost from now on, so that the whole run stays within its budget."""

import math
from dataclasses import dataclass

from setpoint.controller.schedule import Schedule

_BISECTIONS = 60
_UNUSED = 0.002  # share of the budget that a last cut may leave unused without waiting


@dataclass(frozen=True)
class Remaining:
    """What is left of the budget of a run when a decision is made, and what else it is spent on.

    A last cut at step s to the cost c per step leaves `unused = (1 - margin) * limit - spent - c * (total_steps - s)`.
    Where coarse blocks make that a good part of the budget, the cut had better wait, at the present cost p and with
    sensing continuing at `sensing` per step, for `floor(unused / (p + sensing - c))` steps.
    """

    limit: float  # what the whole run may spend
    spent: float  # so far, and on learning at this decision
    schedule: Schedule  # when decisions are made
    margin: float = 0.0  # share of the limit that is left for a meter that wavers
    ahead: float = 0.0  # spent besides, whatever is decided: what sensing takes beyond its share while a cut waits
    later: float = 0.0  # spent besides, if this decision is not the last: on sensing and on deciding again
    sensing: float = 0.0  # cost of sensing per step, until the last cut
    deciding: float = 0.0  # what each further decision costs
    factor: float = 1.0  # cost of a step as metered / as predicted; 1 without a meter

    def wait(self, step: int, total_steps: int, *, lands: bool, present: float, after: float) -> int:
        """Steps by which a cut that may be the last (`lands`: is the last) had better wait; costs are per step.

        >>> remaining = Remaining(limit=100.0, spent=60.0, schedule=Schedule())
        >>> remaining.wait(60, 110, lands=True, present=1.0, after=0.6)  # 30 for 50 steps, 10 left: 25 more at 1.0
        25
        """
        if not lands and not self.schedule.settled(step, total_steps):
            return 0
        limit = (1 - self.margin) * self.limit
        spent = self.spent + ((0.0 if lands else self.later) + self.ahead)
        unused = limit - spent - after * (total_steps - step)
        saving = present + self.sensing - after
        if unused <= _UNUSED * limit or present <= after:
            return 0
        most = total_steps - 1 - step

        def steps(left: float) -> int:
            return max(0, min(math.floor(left / saving), most))

        until = step + steps(unused)
        decisions = 1 + sum(self.schedule.due(later, total_steps) for later in range(step + 1, until))
        return steps(unused - self.sensing - self.deciding * decisions) if self.deciding else steps(unused)


def step_limit(schedule: Schedule, step: int, total_steps: int, *, left: float, start: float, present: float) -> float:
    """The highest limit per step that the rest of a run can be held to with what is left to spend.

    The controller comes down to the reference at each decision and stays there until the next, so a run that is held to
    the limit L still spends

        rest(L) = sum over the steps s to come of min(present, reference(d(s); start, L)),

    with d(s) the last decision before s; bisection finds the L at which it equals what is left. Asked again at each
    decision (a receding horizon) it takes in whatever came out otherwise. `start` is the cost of a step of the dense
    model and the highest answer; where nothing is left it is 0 or less.

    >>> step_limit(Schedule(), 300, 1000, left=350.0, start=1.0, present=0.8)
    0.5
    """
    if left <= 0:
        return min(left, 0.0)
    stretches = spans(schedule, step, total_steps)

    def spent(limit: float) -> float:
        return sum(
            length * min(present, schedule.at(begin, total_steps, start=start, limit=limit))
            for begin, length in stretches
        )

    low, high = 0.0, start
    if spent(start) <= left:
        return start
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) <= left else (low, middle)
    return low


def spans(schedule: Schedule, step: int, total_steps: int) -> list[tuple[int, int]]:
    """The stretches of the rest of a run between decisions: where each begins, and its number of steps."""
    edges = [step, *(at for at in schedule.decisions(total_steps) if step < at < total_steps), total_steps]
    return [(begin, end - begin) for begin, end in zip(edges, edges[1:], strict=False)]


def next_decision(schedule: Schedule, step: int, total_steps: int) -> int:
    return next((at for at in schedule.decisions(total_steps) if at > step), total_steps)


def cheapest_run(schedule: Schedule, step: int, total_steps: int, *, present: float, cheapest: float) -> float:
    """The least that the rest of a run can spend: the present model until the next decision, then the cheapest one."""
    coming = next_decision(schedule, step, total_steps)
    return present * (coming - step) + cheapest * (total_steps - coming)


def highest_step(schedule: Schedule, step: int, total_steps: int, *, left: float, cheapest: float) -> float:
    """The most that a step may cost until the next decision, if the cheapest model from there on spends the rest."""
    coming = next_decision(schedule, step, total_steps)
    if coming == step:
        return math.inf
    return (left - cheapest * (total_steps - coming)) / (coming - step)
