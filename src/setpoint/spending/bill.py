"""A bill: what a whole run may spend beside its budgets per step, and the number of steps that this pays for."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, final

from setpoint.checkpoint.fields import fields_of
from setpoint.controller.schedule import Schedule, next_decision, spans
from setpoint.cost.budget import Budget, amount
from setpoint.errors import BudgetError, CheckpointError
from setpoint.groups.group import Group, widths_of
from setpoint.spending.account import Account
from setpoint.spending.forecast import likely_widths
from setpoint.spending.target import Target

_MEAN_OVER = 50
"""Steps over which the mean overhead of a step is taken."""
_WAVERING = ("latency", "energy")
"""What is read anew at each decision. FLOPs may fall much faster, so a reading that wavers would multiply the length:
the forecast lets them fall no faster, and the run becomes longer once cuts have come."""
_MOVED = 0.01
"""Share of a step by which that mean has moved when the run is planned afresh."""


@dataclass(frozen=True)
class Bill:
    """A budget of FLOPs for the whole run, and the length of the dense run that a fraction of it is one of."""

    budget: Budget
    total_steps: int


@dataclass
class StepOverhead:
    """What steps take beside their own FLOPs and a sensing each, such as the passes of a teacher: learnt step by step.

    Args:
        mean: per step, over the last ones.
        most: what two steps have taken. So one pass over all data between two steps is not expected again.
        once: what one step has taken.
        noted: overhead of the run that has been looked at.
        steps: how many have been learnt from.
    """

    mean: float = 0.0
    most: float = 0.0
    once: float = 0.0
    noted: float = 0.0
    steps: int = 0

    def learn(self, overhead: float, sensing: float) -> None:
        """Take in the overhead of the run after a step; that of a sensing is known and left out.

        >>> found = StepOverhead()
        >>> for overhead in (2.0, 4.0, 6.0, 90.0):
        ...     found.learn(overhead, sensing=0.5)
        >>> found.mean, found.most
        (1.5, 1.5)
        """
        taken = max(0.0, overhead - self.noted - sensing)
        self.most, self.once = max(self.most, min(taken, self.once)), max(self.once, taken)
        self.noted = overhead
        self.mean += (min(taken, self.most) - self.mean) / max(1, min(self.steps, _MEAN_OVER))
        self.steps += 1


@final
class Paying:
    """Takes the place of `Runs`: budgets per step fix the finished model, and the bill fixes how long it is trained.

    The length of the run is the largest T for which

        spent + sum over the steps s <= T to come of (f * share(reference(d(s))) + sensing) <= bill,

    with f the FLOPs of a step now and d(s) the last decision before s. The overhead of a step, such as a teacher's,
    is learnt and added, and enough is kept for the next step. The reference comes down from what a step costs
    now. It is of the budget's resource, of which FLOPs are no fixed share, as in a model whose parameters lie in layers
    of few FLOPs: `likely_widths` forecasts which share is left at the limit, and FLOPs are a power of the cost until
    there. The length is found afresh at each decision.

    Decisions fall as in a run of T steps. They move ahead where T shrinks, since the budget is to be met before the
    bill is spent. Without a budget of FLOPs per step, cuts may save none, and decisions fall early enough for such a
    run: there, too, the reference has come down by `Schedule.land`. If what is left does not reach the next decision,
    the run ends before it. So the bill is not exceeded, whatever the cuts come to, unless the last step has more
    overhead than any two steps before it.

    On several ranks decisions must fall together. There no overhead is learnt, since it may differ.
    """

    metered = False

    def __init__(
        self,
        bill: Bill,
        account: Account,
        schedule: Schedule,
        dense_widths: Mapping[str, int],
        alone: bool,
        target: Target,
    ) -> None:
        self._alone = alone
        self._account, self._schedule, self._target, self._dense_widths = account, schedule, target, dense_widths
        self._ramp = replace(schedule, land=schedule.settle)  # the same reference, without its many checks
        self._limit = bill.budget.absolute(target.dense_cost("flops") * bill.total_steps)
        self._overhead, self._expected, self._met = StepOverhead(noted=account.overhead_flops), 0.0, False
        self._planned = sys.maxsize  # the first plan is bound by none before
        self._length = self._next = 0
        self._present = self._least = self._share = 1.0

    def held_to(self, target: Target) -> Paying:
        """The same with other budgets per step, before anything is planned with them."""
        other = copy.copy(self)
        other._target, other._planned, other._overhead = target, sys.maxsize, replace(self._overhead)
        return other

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
            BudgetError: where it does not pay for two steps.
        """
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

    def planned(self, total_steps: int, groups: tuple[Group, ...], met: bool = False) -> int:
        """Find afresh how long the run is, with these groups. Returns the length of the run that decisions fall as in.

        Args:
            met: whether the budgets per step are, so that no decision is to come.
        """
        cost, name = self._target.cost, self._target.cost.resource
        self._met, self._present, self._share = met, cost.total(widths_of(groups)), 1.0
        self._least = self._target.limits[name] / self._target.factor(name)
        if self._present > self._least and not met:
            flops = self._target.costs["flops"]
            likely = likely_widths(cost, groups, self._dense_widths, self._least)
            self._share = flops.total(likely) / self._account.step_flops
            if any(each.resource in _WAVERING for each in self._target.budgets):
                self._share = max(self._share, self._least / self._present)
        self._overhead.noted = self._account.overhead_flops  # a decision is none of what steps take
        self._plan()
        return self._planned

    def _plan(self) -> None:
        step, self._expected = self._account.num_steps, self._overhead.mean
        sure = int(self._schedule.land * (step + self._left() / (self._per_step + self._account.sensing_flops)))
        saves = any(each.resource == "flops" for each in self._target.budgets)

        def paid(length: int) -> bool:
            return self._pays(step, length, length) and (saves or self._schedule.settled(sure, length))

        if not self._met:
            self._planned = min(self._planned, _longest(step, paid))
        self._measure()

    def _measure(self) -> None:
        """How long the run is, with decisions as they are planned."""
        step = self._account.num_steps
        paid = partial(self._pays, step, self._planned)
        self._length = self._affordable if self._met else _longest(step, paid)
        self._next = next_decision(self._schedule, step, self._planned)

    def stepped(self, total_steps: int) -> int:
        """Count a step; returns the length of the run that decisions fall as in."""
        step, account = self._account.num_steps, self._account
        if self._alone:
            self._overhead.learn(account.overhead_flops, 0.0 if self._met else account.sensing_flops)
        if self._schedule.due(step, self._planned):
            self._measure()
        elif abs(self._overhead.mean - self._expected) > _MOVED * account.step_flops:
            self._plan()
        if self._affordable < min(max(self._next, step + 1), self._length):
            self._length = max(step, self._affordable)
        return self._planned

    def state_dict(self) -> dict[str, Any]:
        """The cost of a step now with what is forecast of it, and the plan."""
        return {
            "present": self._present,
            "least": self._least,
            "share": self._share,
            "planned": self._planned,
            "length": self._length,
            "next": self._next,
            "met": self._met,
            "expected": self._expected,
            "overhead": asdict(self._overhead),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        if "planned" not in state:
            raise CheckpointError(
                "the state is of a run with a bill of Setpoint 0.2, which planned in another way: finish that run with "
                "setpoint==0.2.0, or begin it anew"
            )
        self._present, self._least, self._share, self._expected = (
            float(state[name]) for name in ("present", "least", "share", "expected")
        )
        self._planned, self._length, self._next = (int(state[name]) for name in ("planned", "length", "next"))
        self._met, self._overhead = bool(state["met"]), StepOverhead(**fields_of(StepOverhead, state["overhead"]))

    @property
    def _per_step(self) -> float:
        """FLOPs of a step now, with its overhead."""
        return self._account.step_flops + self._overhead.mean

    @property
    def _affordable(self) -> int:
        """The steps that are paid for at what one costs now."""
        return self._account.num_steps + int(self._left() / self._per_step)

    def _pays(self, step: int, planned: int, length: int) -> bool:
        """Whether what is left pays for the steps up to a length, with decisions as in a run of `planned` steps."""
        present, least, spent = self._present, self._least, 0.0
        start = self._schedule.start_through(step, planned, value=present, limit=least)
        end = max(step, planned)  # no decision is after it, however long the run is
        for at, steps in [*spans(self._ramp, step, end), (end, length - end)]:
            cost = min(present, self._schedule.at(at, planned, start=start, limit=least))
            done = math.log(cost / present) / math.log(least / present) if cost < present else 0.0
            other = (self._account.sensing_flops if cost > least else 0.0) + self._overhead.mean
            spent += max(0, min(steps, length - at)) * (self._account.step_flops * self._share**done + other)
        return spent <= self._left()

    def _left(self) -> float:
        """FLOPs that are left for steps; one sensing and the largest overhead are kept for the step to come."""
        account, overhead = self._account, self._overhead
        return self._limit - account.train_flops - account.sensing_flops - max(0.0, overhead.most - overhead.mean)


def _longest(step: int, paid: Callable[[int], bool]) -> int:
    """The largest length, from this step on, that is paid for."""
    low, high = step, step + 1
    while paid(high):
        low, high = high, step + 2 * (high - step)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if paid(middle) else (low, middle)
    return low
