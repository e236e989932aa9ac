"""The schedule: the reference, when to decide, and what a budget of the whole run leaves for each step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from setpoint.arguments import plain_fields


@dataclass(frozen=True)
class Schedule:
    """Dense until the warm-up ends, then down to the limit by `settle`, constant from there on.

    With `s = (step - warmup) / (settle - warmup)`, clipped to [0, 1], and both ends in whole steps,

        geometric:  reference = start * (limit / start) ** s
        linear:     reference = start + (limit - start) * s

    Geometric is the default. It removes the same *fraction* of the present cost at every decision, so no decision is
    much larger than another: on the way to a quarter of the cost in eight cuts each takes 16 %, while the last linear
    cut would take 27 % in one go. It also saves more on the way down: its mean cost is `(1 - f) / ln(1 / f)` of dense
    (0.54 for f = 1/4), against `(1 + f) / 2` (0.63). A relative error means the same all along it, which keeps the
    loop gain constant.

    Decisions are few, because each costs a resize: `num_cuts` are evenly spread over the ramp, the last one exactly
    at `settle`. Checks follow at the same spacing until `land`: a late or metered run still meets the budget
    there. After `land` three more chances are spread over the rest of the run, since it is better to meet the budget
    late than to miss it.

    Args:
        warmup: fraction of the run that stays dense, so that readings mean something.
        settle: fraction of the run by which the reference has come down to the limit.
        land: fraction of the run by which the budget must be met.
        num_cuts: decisions on the way down; in runs too short for that, one per step.
        shape: "geometric" or "linear".

    Raises:
        ValueError: unless `0 <= warmup < settle <= land <= 1` and `num_cuts >= 1`.

    >>> schedule = Schedule()
    >>> [schedule.at(step, 1000, start=4.0, limit=1.0) for step in (50, 175, 300, 900)]
    [4.0, 2.0, 1.0, 1.0]
    >>> [step for step in range(1, 301) if schedule.due(step, 1000)]
    [81, 112, 144, 175, 206, 238, 269, 300]
    """

    warmup: float = 0.05
    settle: float = 0.30
    land: float = 0.70
    num_cuts: int = 8
    shape: Literal["geometric", "linear"] = "geometric"

    def __post_init__(self) -> None:
        plain_fields(self)
        numbers = all(isinstance(share, (int, float)) for share in (self.warmup, self.settle, self.land))
        if not numbers or not 0 <= self.warmup < self.settle <= self.land <= 1:
            raise ValueError(
                "a schedule needs 0 <= warmup < settle <= land <= 1, "
                f"got warmup={self.warmup!r}, settle={self.settle!r}, land={self.land!r}"
            )
        if type(self.num_cuts) is not int or self.num_cuts < 1:
            raise ValueError(f"num_cuts must be an integer of at least 1, got {self.num_cuts!r}")
        if self.shape not in ("geometric", "linear"):
            raise ValueError(f"shape must be 'geometric' or 'linear', got {self.shape!r}")

    def at(self, step: int, total_steps: int, *, start: float, limit: float) -> float:
        """Cost that is allowed at this step, in the resource's own unit.

        Args:
            start: dense cost; where it is within the limit there is nothing to come down from.
        """
        progress = self.progress(step, total_steps)
        if start <= limit or progress == 1.0:
            return limit
        if self.shape == "linear":
            return start + (limit - start) * progress
        return float(start * (limit / start) ** progress)

    def start_through(self, step: int, total_steps: int, *, value: float, limit: float) -> float:
        """The start from which the reference passes through a value at this step: the inverse of `at`.

        For bumpless transfer: with it the reference goes on from `value` down to a new limit. Where the way down is
        all but over, or the value is within the limit, the value itself.

        Args:
            value: cost to pass through.
            limit: where it comes down to.

        >>> schedule = Schedule()
        >>> start = schedule.start_through(175, 1000, value=2.0, limit=0.5)
        >>> [schedule.at(step, 1000, start=start, limit=0.5) for step in (175, 300)]
        [2.0, 0.5]
        """
        progress = self.progress(step, total_steps)
        if progress > 0.99 or value <= limit:  # a power of over a hundred leaves the range of floats
            return value
        if self.shape == "linear":
            return (value - limit * progress) / (1 - progress)
        return float(limit * (value / limit) ** (1 / (1 - progress)))

    def progress(self, step: int, total_steps: int) -> float:
        """How much of the way down is done by this step, from 0 until warm-up ends to 1 from settle on.

        >>> [Schedule().progress(step, 1000) for step in (50, 175, 300)]
        [0.0, 0.5, 1.0]
        """
        settle = self._settle_step(total_steps)
        warmup = min(round(self.warmup * total_steps), settle - 1)
        return min(1.0, max(0.0, (step - warmup) / (settle - warmup)))

    def due(self, step: int, total_steps: int) -> bool:
        """Whether a decision is to be made after this step; never after the end of the run."""
        return step in _decision_steps(self, total_steps)

    def decisions(self, total_steps: int) -> list[int]:
        """The steps of all decisions, in order."""
        return sorted(_decision_steps(self, total_steps))

    def settled(self, step: int, total_steps: int) -> bool:
        """Whether the reference has come down to the limit: from here on every decision tries to meet it."""
        return step >= self._settle_step(total_steps)

    def final(self, step: int, total_steps: int) -> bool:
        """Whether the budget must be met by now: from here on nothing comes back."""
        return step >= max(self._settle_step(total_steps), round(self.land * total_steps))

    def _settle_step(self, total_steps: int) -> int:
        return max(1, round(self.settle * total_steps))


@lru_cache(maxsize=64)
def _decision_steps(schedule: Schedule, total_steps: int) -> frozenset[int]:
    if total_steps < 1:
        return frozenset()
    settle = schedule._settle_step(total_steps)
    warmup = min(round(schedule.warmup * total_steps), settle - 1)
    land = max(settle, round(schedule.land * total_steps))
    spacing = (settle - warmup) / schedule.num_cuts
    ramp = (round(warmup + spacing * i) for i in range(1, schedule.num_cuts + 1))
    num_checks = round((land - settle) / max(spacing, 1.0))
    checks = (round(settle + (land - settle) * i / num_checks) for i in range(1, num_checks + 1))
    late = (round(land + (total_steps - land) * i / 3) for i in range(1, 4))
    return frozenset(step for step in (*ramp, *checks, *late) if warmup < step <= total_steps)


_BISECTIONS = 60
_UNUSED = 0.002
"""Share of the budget that a last cut may leave unused without waiting."""


@dataclass(frozen=True)
class Remaining:
    """What is left of the budget of a run when a decision is made, and what else it is spent on.

    A last cut at step s to the cost c per step fixes the rest of the run, and

        unused = (1 - margin) * limit - spent - c * (total_steps - s)

    is known exactly. Blocks may be so coarse that it is a good part of the budget. Then the last cut had better wait,
    at the present cost p and with sensing going on at `sensing` per step, for

        floor(unused / (p + sensing - c)) steps,

    which uses up what is left but for less than the saving of one step.
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
        """Steps by which a cut that may be the last had better wait, 0 for none.

        Args:
            step: optimizer steps done.
            total_steps: of the run.
            lands: whether the plan is the last; any may be from the settle step on.
            present: cost of a step now.
            after: cost of a step after the cut.

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

    The controller comes down to the reference at each decision and stays there until the next, and a cut is not taken
    back, so a run that is held to the limit L still spends

        rest(L) = sum over the steps s to come of min(present, reference(d(s); start, L)),

    with d(s) the last decision before s. This grows with L; bisection finds the L at which it equals what is left.
    Asked again at each decision (a receding horizon) it takes in whatever came out otherwise: blocks that left a cut
    short of its target, steps that cost more or less than predicted, overhead, a run made longer or shorter.

    Args:
        schedule: the trajectory, and when decisions are made.
        step: the decision that is to be made now, in optimizer steps done.
        left: what is left to spend on the steps to come, in the resource's unit.
        start: cost of a step of the dense model.
        present: cost of a step now.

    Returns:
        At most `start`; 0 or less where nothing is left, so that no model meets it.

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
    """The stretches of the rest of a run between decisions: where each begins, and its number of steps.

    >>> spans(Schedule(), 300, 1000)[:2]
    [(300, 31), (331, 31)]
    """
    edges = [step, *(at for at in schedule.decisions(total_steps) if step < at < total_steps), total_steps]
    return [(begin, end - begin) for begin, end in zip(edges, edges[1:], strict=False)]


def next_decision(schedule: Schedule, step: int, total_steps: int) -> int:
    """The step of the next decision, or the end of the run where none is to come."""
    return next((at for at in schedule.decisions(total_steps) if at > step), total_steps)


def cheapest_run(schedule: Schedule, step: int, total_steps: int, *, present: float, cheapest: float) -> float:
    """The least that the rest of a run can spend: the present model until the next decision, then the cheapest one."""
    coming = next_decision(schedule, step, total_steps)
    return present * (coming - step) + cheapest * (total_steps - coming)


def highest_step(schedule: Schedule, step: int, total_steps: int, *, left: float, cheapest: float) -> float:
    """The most that a step may cost until the next decision, so that the cheapest model from there on spends the rest.

    Where each decision keeps to it, the next one can: a run that has at least `cheapest_run` left before its first
    decision is never over its budget.

    Args:
        schedule: when decisions are made.
        step: the decision that is to be made now, in optimizer steps done.
        left: what is left to spend on the steps to come.
        cheapest: cost of a step of the cheapest model.

    >>> round(highest_step(Schedule(), 300, 1000, left=200.0, cheapest=0.25), 3)  # decisions at 300 and 331
    1.056
    """
    coming = next_decision(schedule, step, total_steps)
    if coming == step:
        return math.inf
    return (left - cheapest * (total_steps - coming)) / (coming - step)
