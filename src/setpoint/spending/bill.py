"""A bill: what a whole run may spend beside its budgets per step, and the number of steps that this pays for."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

from setpoint.controller.horizon import next_decision, spans
from setpoint.controller.schedule import Schedule
from setpoint.cost.budget import Budget, amount
from setpoint.errors import BudgetError
from setpoint.spending.account import Account
from setpoint.spending.target import Target


@dataclass(frozen=True)
class Bill:
    """A budget of FLOPs for the whole run, and the length of the dense run that a fraction of it is one of."""

    budget: Budget
    total_steps: int


@final
class Paying:
    """Takes the place of `Runs`: budgets per step fix the finished model, and the bill fixes how long it is trained.

    Decisions fall where they do in a run of as many steps as are planned at first. The length of the run is the largest
    T for which

        spent + sum over the steps s <= T to come of (f * min(1, reference(d(s)) / c) + sensing) <= bill,

    with f the FLOPs of a step now, c its cost in the unit of the reference and d(s) the last decision before s. It is
    found afresh at each decision. A run that what is left does not even bring to its next decision ends before it, so
    the bill is never exceeded, whatever the cuts come to.
    """

    metered = False

    def __init__(self, bill: Bill, account: Account, schedule: Schedule, target: Target) -> None:
        self._account, self._schedule, self._target = account, schedule, target
        self._limit = bill.budget.absolute(target.dense_cost("flops") * bill.total_steps)
        self._present = target.dense[target.cost.resource]
        self._length = self._planned = self._longest(0, lambda length: self._spends(0, length, length))
        self._next = next_decision(schedule, 0, self._planned)

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

    def stepped(self, widths: Mapping[str, int] | None = None) -> None:
        """A step is done or, where widths are given, a cut to them; what is left pays for so many steps."""
        step, left = self._account.num_steps, self._left()
        if widths is not None:
            self._present = self._target.cost.total(widths)
        if widths is not None or self._schedule.due(step, self._planned):
            self._length = self._longest(step, lambda length: self._spends(step, self._planned, length))
            self._next = next_decision(self._schedule, step, self._planned)
        affordable = step + int(left / self._account.step_flops)
        if affordable < min(self._next, self._length):
            self._length = max(step, affordable)

    def held_to(self, target: Target) -> Paying:
        """The same with other budgets per step."""
        other = copy.copy(self)
        other._target = target
        return other

    def state_dict(self) -> dict[str, Any]:
        """The cost of a step now, and the length."""
        return {"present": self._present, "length": self._length, "next": self._next}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self._present = float(state["present"])
        self._length, self._next = int(state["length"]), int(state["next"])

    def _longest(self, step: int, spends: Callable[[int], float]) -> int:
        """The largest length whose steps to come are paid for."""
        low, high, left = step, step + 1, self._left()
        while spends(high) <= left:
            low, high = high, step + 2 * (high - step)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if spends(middle) <= left else (low, middle)
        return low

    def _spends(self, step: int, planned: int, length: int) -> float:
        """FLOPs of the steps to come, where each decision of a run of `planned` steps comes down to the reference."""
        account, limit = self._account, self._target.limits[self._target.cost.resource]
        dense = self._target.dense[self._target.cost.resource]
        spent = 0.0
        for at, steps in spans(self._schedule, step, max(planned, length)):
            share = min(1.0, self._schedule.at(at, planned, start=dense, limit=limit) / self._present)
            sensing = account.sensing_flops if share * self._present > limit else 0.0
            spent += max(0, min(steps, length - at)) * (account.step_flops * share + sensing)
        return spent

    def _left(self) -> float:
        """FLOPs that are left for steps; one sensing is kept for the step to come."""
        return self._limit - self._account.train_flops - self._account.sensing_flops
