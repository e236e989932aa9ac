"""A run budget: what a whole run may spend, and what that leaves for each step to come."""

from __future__ import annotations

import math
from dataclasses import dataclass

from setpoint.controller.horizon import least_run, most_per_step, next_decision, step_limit
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

    def check(
        self, total_steps: int, *, step: int, spent: float, present: float, cheapest: float, besides: float = 0.0
    ) -> None:
        """Check that the budget can still be met.

        Args:
            total_steps: of the run.
            step: optimizer steps done.
            spent: so far.
            present: cost of a step now.
            cheapest: cost of a step of the narrowest model.
            besides: what is spent besides steps from here on.

        Raises:
            BudgetError: saying what the least is, and what is spent already.
        """
        limit, resource = self.limit(total_steps), self.budget.resource
        dense_run = self.dense * total_steps
        words = f"a budget of {amount(limit, resource)} for the run ({limit / dense_run:.1%} of a dense one)"
        if resource in IN_SECONDS and limit > MILLISECONDS * dense_run:
            raise BudgetError(
                f"{words} is {limit / dense_run:,.0f} times what a dense run takes ({dense_run:.3g} s): it is in "
                f"seconds. If you mean milliseconds, write Budget.total({limit / 1000:g}, of={resource!r}, per='run')"
            )
        least = spent + besides + least_run(self.reference, step, total_steps, present=present, cheapest=cheapest)
        if limit * (1 - self.margin) < least:
            least /= 1 - self.margin
            fraction = math.ceil(1000 * least / dense_run) / 1000
            ask = f"fraction({fraction:g}" if fraction <= 1 else f"total({_rounded_up(least):g}"
            cut = next_decision(self.reference, step, total_steps)
            why = f"cannot be met: with a cut down to the narrowest model after step {cut}, the first that there can be"
            if spent >= limit:
                why = f"is spent already: {amount(spent, resource)} went by step {step}. Cut to the narrowest model"
            raise BudgetError(
                f"{words} {why}, the run spends {amount(least, resource)} ({least / dense_run:.1%}). "
                f"Ask for at least Budget.{ask}, of={resource!r}, per='run')"
            )

    def most(self, step: int, total_steps: int, *, spent: float, cheapest: float, besides: float) -> float:
        """The most that a step may cost until the next decision, so that the budget can still be met from there on.

        Args:
            step: optimizer steps done.
            total_steps: of the run.
            spent: so far.
            cheapest: cost of a step of the narrowest model.
            besides: what is spent besides steps from here on.
        """
        rest = (1 - self.margin) * self.limit(total_steps) - spent - besides
        return most_per_step(self.reference, step, total_steps, rest=rest, cheapest=cheapest)

    def per_step(self, step: int, total_steps: int, *, spent: float, present: float) -> float:
        """The limit per step that the rest of the run can be held to."""
        rest = (1 - self.margin) * self.limit(total_steps) - spent
        found = step_limit(self.reference, step, total_steps, rest=rest, start=self.dense, present=present)
        if self.reference.settled(step, total_steps) and step < total_steps:
            found = min(found, rest / (total_steps - step))
        return max(found, _FLOOR * self.dense)

    def wait(
        self,
        step: int,
        total_steps: int,
        *,
        spent: float,
        present: float,
        after: float,
        sensing: float = 0.0,
        deciding: float = 0.0,
    ) -> int:
        """Steps by which a landing had better wait, 0 for none.

        Args:
            step: optimizer steps done.
            total_steps: of the run.
            spent: so far.
            present: cost of a step now.
            after: cost of a step after the landing.
            sensing: cost of sensing per step, until the landing.
            deciding: what each further decision costs, those that are due until then included.

        >>> run = RunBudget(Budget.total(100.0, of="flops", per="run"), Reference(), dense=1.0)
        >>> run.wait(60, 110, spent=60.0, present=1.0, after=0.6)  # 30 for 50 steps, 10 left: 25 steps more at 1.0
        25
        """
        limit = (1 - self.margin) * self.limit(total_steps)
        unused = limit - spent - after * (total_steps - step)
        saving = present + sensing - after
        if unused <= _UNUSED * limit or present <= after:
            return 0
        most = total_steps - 1 - step

        def steps(left: float) -> int:
            return max(0, min(math.floor(left / saving), most))

        until = step + steps(unused)
        decisions = 1 + sum(self.reference.due(each, total_steps) for each in range(step + 1, until))
        return steps(unused - sensing - deciding * decisions) if deciding else steps(unused)


def _rounded_up(value: float) -> float:
    """A number of three digits that is not below.

    >>> _rounded_up(1234.0), _rounded_up(0.0099701)
    (1240.0, 0.00998)
    """
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return float(f"{math.ceil(value / unit) * unit:.3g}")
