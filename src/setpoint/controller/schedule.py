"""The schedule: the reference, which falls from the dense cost to the limit, and the steps at which to decide."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from setpoint.messages import plain_fields


@dataclass(frozen=True)
class Schedule:
    """Dense until the warm-up ends, then a first cut, then down to the limit by `settle`, constant from there on.

    With `s = (step - warmup) / (settle - warmup)`, clipped to [0, 1], and both ends in whole steps,

        reference = start * (limit / start) ** p,    p = first + (1 - first) * s from the end of the warm-up on, else 0,

    where `1 - (1 - s) ** 2` stands for s after a first cut: what a meter reads there corrects ever smaller cuts.

    *At once* (`Schedule.at_once()`, with which `attach` begins where costs are counted) the first cut is the whole way:
    a step of the small model costs less and improves it as much. *Gradually* (the fields' defaults) every decision
    removes the same fraction of the present cost: on the way to a quarter of the cost in eight cuts each takes 16 %,
    while the last of equal steps would take 27 % in one go. The mean cost of the way down is then `(1 - f) / ln(1 / f)`
    of dense (0.54 for f = 1/4), against `(1 + f) / 2` of a straight line.

    Decisions are few, because each costs a resize: `num_cuts` are evenly spread over the ramp, the last one exactly
    at `settle`. Checks follow at the same spacing until `land`, where a late or metered run still meets the budget,
    and three more chances are spread over the rest of the run.

    Args:
        warmup: fraction of the run that stays dense, so that readings mean something; at least one step where there is
            a first cut.
        settle: fraction of the run by which the reference has come down to the limit.
        land: fraction of the run by which the budget must be met.
        num_cuts: decisions on the way down; in runs too short for that, one per step.
        first: share of the way down, in the logarithm of the cost, that the cut at the end of the warm-up goes; 0 for
            no such cut.

    Raises:
        ValueError: unless `0 <= warmup < settle <= land <= 1`, `num_cuts >= 1` and `0 <= first <= 1`.

    >>> schedule = Schedule.gradual()
    >>> [schedule.at(step, 1000, start=4.0, limit=1.0) for step in (50, 175, 300, 900)]
    [4.0, 2.0, 1.0, 1.0]
    >>> [step for step in range(1, 301) if schedule.due(step, 1000)]
    [81, 112, 144, 175, 206, 238, 269, 300]
    >>> schedule = Schedule.at_once()
    >>> [schedule.at(step, 1000, start=4.0, limit=1.0) for step in (9, 10, 900)]
    [4.0, 1.0, 1.0]
    """

    warmup: float = 0.05
    settle: float = 0.30
    land: float = 0.70
    num_cuts: int = 8
    first: float = 0.0

    def __post_init__(self) -> None:
        plain_fields(self)
        numbers = all(isinstance(share, (int, float)) for share in (self.warmup, self.settle, self.land))
        if not numbers or not 0 <= self.warmup < self.settle <= self.land <= 1:
            raise ValueError(
                "a schedule needs 0 <= warmup < settle <= land <= 1, "
                f"got warmup={self.warmup!r}, settle={self.settle!r}, land={self.land!r}"
            )
        if not isinstance(self.first, (int, float)) or not 0 <= self.first <= 1:
            raise ValueError(f"first is a share of the way down, in [0, 1], got {self.first!r}")
        if type(self.num_cuts) is not int or self.num_cuts < 1:
            raise ValueError(f"num_cuts must be an integer of at least 1, got {self.num_cuts!r}")

    @classmethod
    def gradual(cls) -> Schedule:
        """Down to the limit in eight cuts, from 5 % to 30 % of the run."""
        return cls()

    @classmethod
    def at_once(cls, warmup: float = 0.01) -> Schedule:
        """Down to the limit in one cut."""
        return cls(warmup, first=1.0)

    @classmethod
    def measured(cls) -> Schedule:
        """Four fifths of the way in one cut, and the rest in three by a twentieth of the run, as is then measured."""
        return cls(warmup=0.01, settle=0.05, num_cuts=3, first=0.8)

    def at(self, step: int, total_steps: int, *, start: float, limit: float) -> float:
        """Cost that is allowed at this step; a `start` within the limit has nothing to come down from."""
        progress = self.progress(step, total_steps)
        if start <= limit or progress == 1.0:
            return limit
        return float(start * (limit / start) ** progress)

    def start_through(self, step: int, total_steps: int, *, value: float, limit: float) -> float:
        """The start from which the reference passes through a value at this step: the inverse of `at`.

        For bumpless transfer. Where the way down is all but over, or the value is within the limit, the value itself.

        >>> schedule = Schedule()
        >>> start = schedule.start_through(175, 1000, value=2.0, limit=0.5)
        >>> [schedule.at(step, 1000, start=start, limit=0.5) for step in (175, 300)]
        [2.0, 0.5]
        """
        progress = self.progress(step, total_steps)
        if progress > 0.99 or value <= limit:  # a power of over a hundred leaves the range of floats
            return value
        return float(limit * (value / limit) ** (1 / (1 - progress)))

    def progress(self, step: int, total_steps: int) -> float:
        """How much of the way down is done by this step, from 0 until warm-up ends to 1 from settle on."""
        warmup, settle, _ = self._stages(total_steps)
        if step < warmup or step >= settle:
            return float(step >= settle)
        done = (step - warmup) / (settle - warmup)
        return self.first + (1.0 - self.first) * (1.0 - (1.0 - done) ** 2 if self.first else done)

    def due(self, step: int, total_steps: int) -> bool:
        """Whether a decision is to be made after this step; never after the end of the run."""
        return step in self.decisions(total_steps)

    def decisions(self, total_steps: int) -> tuple[int, ...]:
        """The steps of all decisions, in order."""
        return _decisions(self, total_steps)

    def settled(self, step: int, total_steps: int) -> bool:
        """Whether the reference has come down to the limit: from here on every decision tries to meet it."""
        return step >= self._stages(total_steps)[1]

    def final(self, step: int, total_steps: int) -> bool:
        """Whether the budget must be met by now: from here on nothing comes back."""
        return step >= self._stages(total_steps)[2]

    def _stages(self, total_steps: int) -> tuple[int, int, int]:
        """The steps at which warm-up ends, the reference has settled, and the budget must be met."""
        settle, land = max(1, round(self.settle * total_steps)), round(self.land * total_steps)
        warmup = min(round(self.warmup * total_steps), settle - 1)
        if self.first:
            warmup = max(1, warmup)
            settle = warmup if self.first == 1 else max(settle, min(warmup + self.num_cuts, land), warmup + 1)
        return warmup, settle, max(settle, land)


@lru_cache(maxsize=64)  # it is asked after every step
def _decisions(schedule: Schedule, total_steps: int) -> tuple[int, ...]:
    warmup, settle, land = schedule._stages(total_steps)
    first = [warmup] if schedule.first else []
    spacing = max((max(settle, round(schedule.settle * total_steps)) - warmup) / schedule.num_cuts, 1.0)
    num_cuts = schedule.num_cuts if settle > warmup else 0
    ramp = (round(warmup + (settle - warmup) / schedule.num_cuts * i) for i in range(1, num_cuts + 1))
    num_checks = round((land - settle) / spacing)
    checks = (round(settle + (land - settle) * i / num_checks) for i in range(1, num_checks + 1))
    late = (round(land + (total_steps - land) * i / 3) for i in range(1, 4))
    return tuple(sorted({*first, *(step for step in (*ramp, *checks, *late) if warmup < step <= total_steps)}))
