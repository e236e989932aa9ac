"""A bill: what a whole run may spend beside its budgets per step, and the number of steps that this pays for."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, final

from setpoint.controller.horizon import next_decision, spans
from setpoint.controller.schedule import Schedule
from setpoint.cost.budget import Budget, amount
from setpoint.errors import BudgetError
from setpoint.groups.group import Group, widths_of
from setpoint.spending.account import Account
from setpoint.spending.forecast import likely_widths
from setpoint.spending.target import Target


@dataclass(frozen=True)
class Bill:
    """A budget of FLOPs for the whole run, and the length of the dense run that a fraction of it is one of."""

    budget: Budget
    total_steps: int


@final
class Paying:
    """Takes the place of `Runs`: budgets per step fix the finished model, and the bill fixes how long it is trained.

    The length of the run is the largest T for which

        spent + sum over the steps s <= T to come of (f * share(reference(d(s))) + sensing) <= bill,

    with f the FLOPs of a step now and d(s) the last decision before s. The reference comes down from what a step costs
    now. It is of the budget's resource, of which FLOPs are no fixed share, as in a model whose parameters lie in layers
    of few FLOPs: `likely_widths` forecasts which share is left at the limit, and FLOPs are a power of the cost until
    there. The length is found afresh at each decision.

    Decisions fall as in a run of T steps. They move ahead where T shrinks, since the budget is to be met before the
    bill is spent. Without a budget of FLOPs per step, cuts may save none, and decisions fall early enough for such a
    run: there, too, the reference has come down by `Schedule.land`. A run that what is left does not even bring to its
    next decision ends before it, so the bill is never exceeded, whatever the cuts come to.
    """

    metered = False

    def __init__(
        self, bill: Bill, account: Account, schedule: Schedule, dense_widths: Mapping[str, int], target: Target
    ) -> None:
        self._account, self._schedule, self._target, self._dense_widths = account, schedule, target, dense_widths
        self._limit = bill.budget.absolute(target.dense_cost("flops") * bill.total_steps)
        self._planned = sys.maxsize  # the first plan is bound by none before
        self._length = self._next = 0
        self._present = self._share = 1.0

    def limit(self, *_: Any) -> dict[str, float]:
        """The bill."""
        return {"flops": self._limit}

    def spent(self) -> dict[str, float]:
        """FLOPs from the call of `attach` on, overhead included."""
        return {"flops": self._account.train_flops}

    def most(self, *_: Any) -> dict[str, Any]:
        """The bill bounds no single step."""
        return {}

    rest = most

    def replan(self, *_: Any) -> None:
        """Limits per step stay as they are."""

    read_joules = replan

    def spare_flops(self, *_: Any) -> float:
        """What else is spent makes the run shorter."""
        return math.inf

    def over(self, *_: Any) -> bool:
        """The run ends before."""
        return False

    def check(self, *_: Any) -> None:
        """Check that the bill pays for a run.

        Raises:
            BudgetError: where it does not pay for two steps, or what decisions spend is not known before.
        """
        if any(each.resource == "inference" for each in self._target.budgets):
            raise BudgetError(
                "a bill cannot be kept beside a budget of inference: each decision times forward passes, as many as "
                "the clock asks for. Leave the bill out, and give the number of steps"
            )
        account, left = self._account, self._left()
        if left < 2 * account.step_flops:
            asked, spent, step, least = (
                amount(value, "flops")
                for value in (
                    *(self._limit, account.train_flops, account.step_flops),
                    self._limit - left + 2 * account.step_flops,
                )
            )
            raise BudgetError(
                f"the bill of {asked} pays for no run: attaching spent {spent}, and a dense step spends {step}. Two "
                f"steps are the least: ask for {least}"
            )

    def length(self, total_steps: int) -> int:
        """The number of steps of the whole run."""
        return self._length

    def planned(self, total_steps: int, groups: tuple[Group, ...]) -> int:
        """Find afresh how long the run is, with these groups; returns of how many steps decisions fall as in a run."""
        account, step, cost = self._account, self._account.num_steps, self._target.cost
        self._present, self._share = cost.total(widths_of(groups)), 1.0
        if self._present > self._least:
            flops = self._target.costs["flops"]
            self._share = flops.total(likely_widths(cost, groups, self._dense_widths, self._least)) / account.step_flops
        sure = int(self._schedule.land * (step + self._left() / (account.step_flops + account.sensing_flops)))
        saves = any(each.resource == "flops" for each in self._target.budgets)

        def paid(length: int) -> bool:
            return self._pays(step, length, length) and (saves or self._schedule.settled(sure, length))

        self._planned = min(self._planned, _longest(step, paid))
        self._length = _longest(step, partial(self._pays, step, self._planned))
        self._next = next_decision(self._schedule, step, self._planned)
        return self._planned

    def stepped(self) -> None:
        """A step is done; what is left pays for so many steps."""
        step = self._account.num_steps
        if self._schedule.due(step, self._planned):
            self._length = _longest(step, partial(self._pays, step, self._planned))
            self._next = next_decision(self._schedule, step, self._planned)
        affordable = step + int(self._left() / self._account.step_flops)
        if affordable < min(max(self._next, step + 1), self._length):
            self._length = max(step, affordable)

    def state_dict(self) -> dict[str, Any]:
        """The cost of a step now with what is forecast of it, and the plan."""
        return {
            "present": self._present,
            "share": self._share,
            "planned": self._planned,
            "length": self._length,
            "next": self._next,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self._present, self._share = float(state["present"]), float(state["share"])
        self._planned, self._length, self._next = (int(state[name]) for name in ("planned", "length", "next"))

    @property
    def _least(self) -> float:
        """The limit of the budget per step, as predicted."""
        name = self._target.cost.resource
        return self._target.limits[name] / self._target.factor(name)

    def _pays(self, step: int, planned: int, length: int) -> bool:
        """Whether what is left pays for the steps up to a length, with decisions as in a run of `planned` steps."""
        present, least, spent = self._present, self._least, 0.0
        start = self._schedule.start_through(step, planned, value=present, limit=least)
        for at, steps in spans(self._schedule, step, max(planned, length)):
            cost = min(present, self._schedule.at(at, planned, start=start, limit=least))
            done = math.log(cost / present) / math.log(least / present) if cost < present else 0.0
            sensing = self._account.sensing_flops if cost > least else 0.0
            spent += max(0, min(steps, length - at)) * (self._account.step_flops * self._share**done + sensing)
        return spent <= self._left()

    def _left(self) -> float:
        """FLOPs that are left for steps; one sensing is kept for the step to come."""
        return self._limit - self._account.train_flops - self._account.sensing_flops


def _longest(step: int, paid: Callable[[int], bool]) -> int:
    """The largest length, from this step on, that is paid for."""
    low, high = step, step + 1
    while paid(high):
        low, high = high, step + 2 * (high - step)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if paid(middle) else (low, middle)
    return low
