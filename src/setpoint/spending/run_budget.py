"""A run budget: what a whole run may spend, and what that leaves for each step to come."""

from __future__ import annotations

import math
from dataclasses import dataclass

from setpoint.controller.schedule import Schedule, least_run, most_per_step, next_decision, step_limit
from setpoint.cost.budget import IN_SECONDS, MILLISECONDS, Budget, amount
from setpoint.errors import BudgetError

_FLOOR = 1e-3
"""The least limit per step, as a share of dense: where nothing is left every block goes, and the summary says so."""


@dataclass(frozen=True)
class RunBudget:
    """A budget on everything that a run spends, verification, sensing and probing included.

    Before each decision the limit per step is found afresh from what the account has really spent (`step_limit`), so
    whatever came out dearer or cheaper than planned is made up for by the steps to come; what a last cut would leave
    unused is waited off (`RunRest`). Where a meter tells what is spent, all of this aims at `(1 - margin) * limit`, so
    that the run is not over when its last steps waver.

    Args:
        dense: cost of a step of the dense model.
        margin: share of the budget that is left for a meter that wavers.
    """

    budget: Budget
    schedule: Schedule
    dense: float
    margin: float = 0.0

    def limit(self, total_steps: int) -> float:
        """What a run of so many steps may spend; a fraction is one of the dense run."""
        return self.budget.absolute(self.dense * total_steps)

    def check(
        self, total_steps: int, *, step: int, spent: float, present: float, cheapest: float, besides: float = 0.0
    ) -> None:
        """Check that the budget can still be met, with `besides` going on something else than steps.

        Raises:
            BudgetError: saying what the least is, and what is spent already.
        """
        limit, resource = self.limit(total_steps), self.budget.resource
        dense_run = self.dense * total_steps
        words = f"a budget of {amount(limit, resource)} for the run ({limit / dense_run:.1%} of a dense one)"
        if resource in IN_SECONDS and limit > MILLISECONDS * dense_run:
            raise BudgetError(
                f"{words} is {limit / dense_run:,.0f} times what a dense run takes, so nothing would be cut: ask for "
                f"less than {amount(dense_run, resource)}. A number without a unit is in seconds"
            )
        least = spent + besides + least_run(self.schedule, step, total_steps, present=present, cheapest=cheapest)
        if limit * (1 - self.margin) < least:
            least /= 1 - self.margin
            fraction = math.ceil(1000 * least / dense_run) / 1000
            ask = f"fraction({fraction:g}" if fraction <= 1 else f"total({_rounded_up(least):g}"
            cut = next_decision(self.schedule, step, total_steps)
            why = f"cannot be met: with a cut down to the narrowest model after step {cut}, the first that there can be"
            if spent >= limit:
                why = f"is spent already: {amount(spent, resource)} was spent by step {step}"
                why += ". Cut to the narrowest model"
            raise BudgetError(
                f"{words} {why}, the run spends {amount(least, resource)} ({least / dense_run:.1%}). "
                f"Ask for at least Budget.{ask}, of={resource!r}, per='run')"
            )

    def most(self, step: int, total_steps: int, *, spent: float, cheapest: float, besides: float) -> float:
        """The most that a step may cost until the next decision, so that the budget can still be met from there on."""
        rest = (1 - self.margin) * self.limit(total_steps) - spent - besides
        return most_per_step(self.schedule, step, total_steps, rest=rest, cheapest=cheapest)

    def per_step(self, step: int, total_steps: int, *, spent: float, present: float) -> float:
        """The limit per step that the rest of the run can be held to."""
        rest = (1 - self.margin) * self.limit(total_steps) - spent
        found = step_limit(self.schedule, step, total_steps, rest=rest, start=self.dense, present=present)
        if self.schedule.settled(step, total_steps) and step < total_steps:
            found = min(found, rest / (total_steps - step))
        return max(found, _FLOOR * self.dense)


def _rounded_up(value: float) -> float:
    """A number of three digits that is not below.

    >>> _rounded_up(1234.0), _rounded_up(0.0099701)
    (1240.0, 0.00998)
    """
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return float(f"{math.ceil(value / unit) * unit:.3g}")
