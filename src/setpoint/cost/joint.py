"""A joint cost: several budgets at once, each by the share of its limit that is spent; the largest share binds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from setpoint.cost.cost import Cost


@dataclass(frozen=True, eq=False)
class Share:
    """One of the budgets.

    Args:
        cost: predicts spending.
        limit: in the resource's own unit.
        factor: metered cost / predicted cost, as last seen; 1 without a meter.
    """

    cost: Cost
    limit: float
    factor: float = 1.0

    def total(self, widths: Mapping[str, int]) -> float:
        """Share of the limit that is spent at these widths."""
        return self.factor * self.cost.total(widths) / self.limit


class JointCost:
    """`total(widths) = max over budgets of factor * cost(widths) / limit`: at 1 all budgets are met.

    A block saves what it takes off the largest share. So the binding budget decides what is worth
    dropping, until another one is level with it.
    """

    resource: Final = "joint"

    def __init__(self, shares: Sequence[Share]) -> None:
        self.shares = tuple(shares)

    def total(self, widths: Mapping[str, int]) -> float:
        """The largest share of a limit that is spent."""
        return max(share.total(widths) for share in self.shares)

    def saving(self, widths: Mapping[str, int], group: str, num_units: int) -> float:
        """`total(widths) - total(widths with num_units fewer units in group)`."""
        return self.total(widths) - self.total({**widths, group: widths[group] - num_units})

    def binding(self, widths: Mapping[str, int]) -> Share:
        """The budget with the largest share."""
        return max(self.shares, key=lambda share: share.total(widths))

    def prices(self, price: float, widths: Mapping[str, int]) -> dict[str, float]:
        """By resource, a price per share at these widths: one per unit of the budget that binds, 0 of one with room."""
        binding = self.binding(widths)
        per_unit = price * binding.factor / binding.limit
        return {share.cost.resource: per_unit if share is binding else 0.0 for share in self.shares}
