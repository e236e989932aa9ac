"""The stride: which optimizer steps are sensed."""

from __future__ import annotations

_DENSELY_SENSED = 100
"""Steps of a run whose every step is worth a reading."""
_LONGEST_STRIDE = 4
"""No more than this many steps from one sensed step to the next."""


def sensed_every(total_steps: int) -> int:
    """Every how many optimizer steps the sensor is updated.

    Decisions are spread over a run as fractions of it, so the longer the run, the more steps lie between
    two of them. Of a run that is four times as long, half of that goes into more readings for each
    decision and half into fewer sensed steps: the stride is `sqrt(total_steps / 100)`, rounded down to a power of 2.

    >>> [sensed_every(total_steps) for total_steps in (300, 400, 1500, 10_000)]
    [1, 2, 2, 4]
    """
    stride = 1
    while stride < _LONGEST_STRIDE and total_steps >= _DENSELY_SENSED * (2 * stride) ** 2:
        stride *= 2
    return stride
