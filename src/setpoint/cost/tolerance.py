"""A tolerance: how much loss the user gives for a smaller model."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from setpoint.arguments import plain_fields
from setpoint.cost.budget import check_means, check_resource
from setpoint.errors import BudgetError


@dataclass(frozen=True)
class Tolerance:
    """How far the observed loss may rise over its trend; the size of the model follows from it.

    Each cut is judged by the loss that `loop.observe(loss=...)` reports: how far that loss lies above its trend before
    the cut. The rises of all cuts are added up. A cut that takes the sum beyond the tolerance is taken back.

    Args:
        loss: highest rise over the trend, in the unit of the loss; at least 0.
        of: the resource to save.
        watts: power that a training step draws, for "energy" where no meter reads it.
        example: inputs of one inference, for "inference"; by default the example that `attach` is given.

    Raises:
        BudgetError: for a loss that is no finite number of at least 0, or an unknown resource; for watts or an example
            that a budget would refuse.

    >>> Tolerance(loss=0.02)
    Tolerance(loss=0.02, of='flops')
    """

    loss: float
    of: str = "flops"
    watts: float | None = field(default=None, repr=False)
    example: Any = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        plain_fields(self)
        check_resource(self.of)
        if isinstance(self.loss, bool) or not isinstance(self.loss, (int, float)) or not math.isfinite(self.loss):
            raise BudgetError(f"a tolerance is a finite number of at least 0, got {self.loss!r}")
        if self.loss < 0:
            raise BudgetError(f"a tolerance must be at least 0, got {self.loss!r}: it is the rise in loss to accept")
        check_means(self.of, self.watts, self.example)

    @property
    def resource(self) -> str:
        """The resource, by the name that a budget gives it."""
        return self.of
