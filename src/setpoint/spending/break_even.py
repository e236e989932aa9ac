"""Breaking even: the step at which the seconds that smaller steps save exceed what Setpoint has taken itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Segment:
    """A stretch of the run between two cuts.

    Args:
        num_steps: optimizer steps in it.
        seconds_per_step: median duration of a step, None if no step was timed.
        overhead_seconds: Setpoint's own seconds from attach to the end of the segment.
    """

    num_steps: int
    seconds_per_step: float | None
    overhead_seconds: float


def break_even_step(segments: Iterable[Segment]) -> int | None:
    """First step at which the accumulated seconds saved exceed the overhead so far.

    With s_0 the seconds per step before the first cut and s_k those of segment k, each step of
    segment k saves `s_0 - s_k`. The overhead is taken at the end of the segment, and a segment without
    a timed step saves nothing. Segments come in order, the dense one first.

    >>> dense, small = Segment(10, 1.0, 2.0), Segment(10, 0.5, 2.0)
    >>> break_even_step([dense, small])  # each step saves half a second: 5 steps exceed 2 s
    15
    """
    steps, saved, dense = 0, 0.0, None
    for number, segment in enumerate(segments):
        if number == 0:
            dense = segment.seconds_per_step
        elif dense is not None and segment.seconds_per_step is not None:
            per_step = dense - segment.seconds_per_step
            reached = saved + per_step * segment.num_steps
            if saved > segment.overhead_seconds:
                return steps + 1
            if per_step > 0 and reached > segment.overhead_seconds:
                return steps + int((segment.overhead_seconds - saved) / per_step) + 1
            saved = reached
        steps += segment.num_steps
    return None
