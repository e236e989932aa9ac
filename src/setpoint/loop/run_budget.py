"""A run budget: what a whole run may spend, and what that leaves for each step to come."""

from __future__ import annotations

import math
from dataclasses import dataclass

from setpoint.controller.horizon import least_run, step_limit
from setpoint.controller.reference import Reference
from setpoint.cost.budget import IN_SECONDS, MILLISECONDS, Budget, amount
from setpoint.errors import BudgetError

_UNUSED = 0.002
"""Share of the budget that a landing may leave unused without waiting."""
_FLOOR = 1e-3
"""The least limit per step, as a share of dense: where nothing is left every block goes, and the summary says so."""


@dataclass(frozen=True)
class RunBudget:
    """A budget on everything that a run spends, verification, sensing and probing included.

    Before each decision the limit per step is found afresh from what the account has really spent
    (`step_limit`), so whatever came out dearer or cheaper than planned is made up for by the steps to come. A landing
    at step s with the cost c per step fixes the rest of the run, and

        unused = limit - spent - c * (total_steps - s)

    is known exactly. Blocks may be so coarse that it is a good part of the budget. Then the last cut waits, at the
    present cost p and with sensing going on at `sensing` per step, for

        floor(unused / (p + sensing - c)) steps,

    which uses up what is left but for less than the saving of one step. Where a meter tells what is spent, all of this
    aims at `(1 - margin) * limit`, so that the run is not over when its last steps waver.

    Args:
        budget: the user's, `per="run"`.
        reference: when decisions are made.
        dense: cost of a step of the dense model.
        margin: share of the budget that is left for a meter that wavers.
    """

    budget: Budget
    reference: Reference
    dense: float
    margin: float = 0.0

    def limit(self, total_steps: int) -> float:
        """What a run of so many steps may spend; a fraction is one of the dense run."""
        return self.budget.absolute(self.dense * total_steps)

    def check(self, total_steps: int, *, step: int, spent: float, present: float, cheapest: float) -> None:
        """Check that the budget can still be met.

        Args:
            total_steps: of the run.
            step: optimizer steps done.
            spent: so far.
            present: cost of a step now.
            cheapest: cost of a step of the narrowest model.

        Raises:
            BudgetError: saying what is spent already, or what the least is; or for a reference that rises.
        """
        if self.reference.dip < 1:
            raise BudgetError("a budget for the whole run is planned downwards: it needs a reference without a dip")
        limit, resource = self.limit(total_steps), self.budget.resource
        dense_run = self.dense * total_steps
        words = f"a budget of {amount(limit, resource)} for the run ({limit / dense_run:.1%} of a dense one)"
        if resource in IN_SECONDS and limit > MILLISECONDS * dense_run:
            raise BudgetError(
                f"{words} is {limit / dense_run:,.0f} times what a dense run takes ({dense_run:.3g} s): it is in "
                f"seconds. If you mean milliseconds, write Budget.total({limit / 1000:g}, of={resource!r}, per='run')"
            )
        if spent >= limit:
            raise BudgetError(f"{words} is spent already: {amount(spent, resource)} went before step {step + 1}")
        dense_until = next((s for s in range(step + 1, total_steps + 1) if self.reference.due(s, total_steps)), None)
        least = spent + least_run(self.reference, total_steps, start=present, cheapest=cheapest)
        if step:
            until = total_steps if dense_until is None else dense_until
            least = spent + present * (until - step) + cheapest * (total_steps - until)
        if limit < least:
            fraction = math.ceil(1000 * least / dense_run) / 1000
            raise BudgetError(
                f"{words} cannot be met: with the first cut down to the narrowest model the run still spends "
                f"{amount(least, resource)} ({least / dense_run:.1%}). "
                f"Ask for at least Budget.fraction({fraction:g}, of={resource!r}, per='run')"
            )

    def per_step(self, step: int, total_steps: int, *, spent: float, present: float) -> float:
        """The limit per step that the rest of the run can be held to."""
        rest = (1 - self.margin) * self.limit(total_steps) - spent
        found = step_limit(self.reference, step, total_steps, rest=rest, start=self.dense, present=present)
        if self.reference.settled(step, total_steps) and step < total_steps:
            found = min(found, rest / (total_steps - step))
        return max(found, _FLOOR * self.dense)

    def wait(
        self, step: int, total_steps: int, *, spent: float, present: float, after: float, sensing: float = 0.0
    ) -> int:
        """Steps by which a landing had better wait, 0 for none.

        Args:
            step: optimizer steps done.
            total_steps: of the run.
            spent: so far.
            present: cost of a step now.
            after: cost of a step after the landing.
            sensing: cost of sensing per step, until the landing.

        >>> run = RunBudget(Budget.total(100.0, of="flops", per="run"), Reference(), dense=1.0)
        >>> run.wait(60, 110, spent=60.0, present=1.0, after=0.6)  # 30 for 50 steps, 10 left: 25 steps more at 1.0
        25
        """
        limit = (1 - self.margin) * self.limit(total_steps)
        unused = limit - spent - after * (total_steps - step)
        saving = present + sensing - after
        if unused <= _UNUSED * limit or present <= after:
            return 0
        return max(0, min(math.floor(unused / saving), total_steps - 1 - step))
