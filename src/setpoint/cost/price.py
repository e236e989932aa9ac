"""A price: what a unit of a resource is worth to the user, in loss."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from setpoint.arguments import plain_fields
from setpoint.cost.budget import check_means, check_resource
from setpoint.errors import BudgetError


@dataclass(frozen=True)
class Price:
    """An exchange rate between loss and a resource; the size of the model follows from it.

    The loop then minimises

        loss + rate * cost(widths) / cost(dense)      with relative=True, the default,
        loss + rate * cost(widths)                    with relative=False,

    so a block of units stays while its saliency is at least the rate times its saving. A rate of 0.1 says: the whole
    dense cost is worth 0.1 of loss, hence a unit that costs a hundredth of it must earn 0.001.

    To choose a rate, decide what rise in loss you would accept for halving the cost, and double that rise. If you have
    a tariff, multiply the money that a run costs at dense size by the loss that you would give for a unit of money.

    Args:
        rate: loss for the dense cost, or for a unit of the resource; at least 0. At 0 nothing is dropped.
        of: the resource.
        relative: whether the rate is for the dense cost.
        watts: power that a training step draws, for "energy" where no meter reads it.
        example: inputs of one inference, for "inference"; by default the example that `attach` is given.

    Raises:
        BudgetError: for a rate that is no finite number of at least 0, or an unknown resource; for watts or an example
            that a budget would refuse.

    >>> Price(0.1, of="flops").absolute(dense=2e9)
    5e-11
    """

    rate: float
    of: str
    relative: bool = True
    watts: float | None = field(default=None, repr=False)
    example: Any = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        plain_fields(self)
        check_resource(self.of)
        if isinstance(self.rate, bool) or not isinstance(self.rate, (int, float)) or not math.isfinite(self.rate):
            raise BudgetError(f"a rate is a finite number of at least 0, got {self.rate!r}")
        if self.rate < 0:
            raise BudgetError(f"a rate must be at least 0, got {self.rate!r}: it is the loss that the cost is worth")
        check_means(self.of, self.watts, self.example)

    @property
    def resource(self) -> str:
        """The resource, by the name that a budget gives it."""
        return self.of

    def absolute(self, dense: float) -> float:
        """Loss per unit of the resource, given the dense cost in that unit."""
        return self.rate / dense if self.relative and dense > 0 else float(self.rate)
