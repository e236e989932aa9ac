"""The stride: which optimizer steps are sensed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from torch import nn

from setpoint.groups.group import Group

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


@runtime_checkable
class Listening(Protocol):
    """What a sensor has in addition that sees forwards of training, and only in the steps before a decision."""

    @property
    def steps_ahead(self) -> int:
        """How many steps before a decision it is shown; the others are none of its business."""

    def listen(self, state: Any, groups: tuple[Group, ...], model: nn.Module, *, sensed: bool) -> Any:
        """The next step begins, which is to be taken in or not: the state with hooks on the model as that asks for."""


def is_sensed(sensor: object, step: int, total_steps: int, due: Callable[[int], bool]) -> bool:
    """Whether the step after so many steps is sensed.

    Args:
        sensor: one that is `Listening` is shown the steps before each decision, any other some all along.
        step: optimizer steps done.
        total_steps: of the run.
        due: whether a decision comes after so many steps.
    """
    ahead = getattr(sensor, "steps_ahead", None)
    if ahead is None:
        return step % sensed_every(total_steps) == 0
    return any(due(later) for later in range(step + 1, step + 1 + ahead))
