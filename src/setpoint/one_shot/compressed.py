"""Compressed: what a cut without training came to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from setpoint.cost.budget import amount
from setpoint.messages import counted


@dataclass(frozen=True, eq=False)
class Compressed:
    """What `compress` did; printed, some lines that a person reads.

    Args:
        resource: of the budget.
        limit: what may be spent, in the resource's own unit.
        before: by resource, FLOPs of a training step on the first batch, and parameters.
        after: likewise.
        dense_widths: units by group before.
        widths: units by group after.
        refitted: names of the layers whose weights were fitted anew.
        num_samples: that were looked at.
        frozen: by name or place, why it was not pruned.
    """

    resource: str
    limit: float
    before: Mapping[str, float]
    after: Mapping[str, float]
    dense_widths: Mapping[str, int]
    widths: Mapping[str, int]
    refitted: tuple[str, ...]
    num_samples: int
    frozen: Mapping[str, str]

    @property
    def density(self) -> dict[str, float]:
        """By group, the share of its units that stayed."""
        return {name: width / self.dense_widths[name] for name, width in self.widths.items()}

    def _why(self) -> str:
        """The first reason, and where the others are."""
        if not self.frozen:
            return ""
        place, reason = next(iter(self.frozen.items()))
        more = f"; {len(self.frozen) - 1} more in `frozen`" if len(self.frozen) > 1 else ""
        return f": {place}: {reason}{more}"

    def __str__(self) -> str:
        words = {"flops": "FLOPs", "params": "parameters"}
        shares = ", ".join(
            f"{100 * self.after[name] / self.before[name]:.1f} % of its {words.get(name, name)}" for name in self.before
        )
        units = f"{sum(self.widths.values()):,} of {counted(sum(self.dense_widths.values()), 'unit')}"
        spent = f", {amount(self.after[self.resource], self.resource)} spent" if self.resource in self.after else ""
        less = sum(self.widths.values()) < sum(self.dense_widths.values())
        if spent and less and self.after[self.resource] < 0.97 * self.limit:
            spent += " (units go in blocks, and no block more fits the budget)"
        return (
            f"compressed to {shares}: {units} in {counted(len(self.widths), 'group')}\n"
            f"a budget of {amount(self.limit, self.resource)}{spent}\n"
            f"{counted(len(self.refitted), 'layer')} fitted anew to {counted(self.num_samples, 'sample')}; "
            f"{counted(len(self.frozen), 'place')} not pruned{self._why()}"
        )
