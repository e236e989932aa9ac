"""Budgets of a whole run: what one leaves for each step to come, or how many steps it pays for."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from setpoint.controller.horizon import Remaining, cheapest_run, highest_step, next_decision, spans, step_limit
from setpoint.controller.plan import Controller
from setpoint.controller.schedule import Schedule
from setpoint.controller.selection import reach, start
from setpoint.cost.budget import IN_SECONDS, METERED, MILLISECONDS, Budget, amount
from setpoint.cost.cost import Cost
from setpoint.errors import BudgetError
from setpoint.groups.group import Group, widths_of
from setpoint.sensor.reading import sensed_every
from setpoint.spending.account import Account
from setpoint.spending.limits import Limits

_FLOOR = 1e-3  # lowest limit per step / dense: where nothing is left every block goes, and the summary says so
_WAVER = 0.003  # share of a run budget that is left where a meter tells what is spent
_MEAN_OVER = 50  # steps over which the mean overhead of a step is taken
_MOVED = 0.01  # share of a step by which that mean has moved when the run is planned again
# What is read again at each decision. FLOPs may fall much faster, so a reading that wavers would multiply the length:
# the forecast lets them fall no faster, and the run becomes longer once cuts have come.
_WAVERING = ("latency", "energy")


@dataclass(frozen=True)
class RunBudget:
    """A budget on all that a run of so many steps spends, overhead included, as it stands at a step: pure mathematics.

    It says what each step may cost. Before each decision the limit per step is found again from what the account has
    really spent (`step_limit`), so the steps to come make up for what cost more or less than planned; a last cut waits
    while it would leave much unused (`Remaining`). Where a meter reads what is spent, all of this aims at
    `(1 - margin) * limit`, so that noise in the last steps does not take the run over it.
    """

    budget: Budget  # of one resource, per run
    schedule: Schedule  # when decisions are made
    dense: float  # cost of a step of the dense model
    step: int
    num_steps: int
    spent: float  # so far, from the call of `attach` on
    present: float  # cost of a step now, by all that is known
    lowest: float  # cost of a step of the narrowest model
    coming: float = 0.0  # spent apart from steps whatever is decided, such as on the user's own code
    factor: float = 1.0  # cost of a step as metered / as predicted
    sensing: float = 0.0  # cost of a sensing; 0 where a meter reads the resource, since that has all overhead in it
    learning: Callable[[int], float] = lambda num_steps: 0.0  # on a decision so many steps from now; 0 likewise
    regrows: bool = False  # whether units come back until the schedule is over

    @property
    def limit(self) -> float:
        """What the run may spend; a fraction is one of the dense run."""
        return self.budget.absolute(self.dense * self.num_steps)

    @property
    def margin(self) -> float:
        return _WAVER if self.budget.resource in METERED else 0.0

    def forecast(self, per_step: float) -> float:
        """What the run comes to if each step to come costs so much."""
        return self.spent + self.coming + max(0, self.num_steps - self.step) * per_step

    def missed(self) -> str:
        """Why the budget cannot be met any more in the middle of the run; "" if it can."""
        lowest, resource = self.forecast(self.lowest), self.budget.resource
        if not 0 < self.step < self.num_steps or lowest <= self.limit:
            return ""
        return (
            f"the budget of {amount(self.limit, resource)} for the run cannot be met any more: "
            f"{amount(self.spent, resource)} was spent by step {self.step}, and with the narrowest model it would come "
            f"to {amount(lowest, resource)}"
        )

    def check(self, cheapest: float) -> None:
        """Refuse a budget that cannot be met any more; `cheapest` is the lowest cost of a step that blocks reach."""
        step, num_steps, spent, resource = self.step, self.num_steps, self.spent, self.budget.resource
        limit, dense_run = self.limit, self.dense * num_steps
        words = f"a budget of {amount(limit, resource)} for the run ({limit / dense_run:.1%} of a dense one)"
        if resource in IN_SECONDS and limit > MILLISECONDS * dense_run:
            raise BudgetError(
                f"{words} is {limit / dense_run:,.0f} times what a dense run takes, so nothing would be cut: ask for "
                f"less than {amount(dense_run, resource)}. A number without a unit is in seconds"
            )
        steps = cheapest_run(self.schedule, step, num_steps, present=self.present, cheapest=cheapest)
        lowest = spent + self._overhead(deciding=False) + steps
        if limit * (1 - self.margin) < lowest:
            lowest /= 1 - self.margin
            fraction = math.ceil(1000 * lowest / dense_run) / 1000
            ask = f"fraction({fraction:g}" if fraction <= 1 else f"total({_rounded_up(lowest):g}"
            cut = next_decision(self.schedule, step, num_steps)
            why = f"cannot be met: with a cut down to the narrowest model after step {cut}, the first that there can be"
            if spent >= limit:
                why = f"is spent already: {amount(spent, resource)} by step {step}. Cut to the narrowest model"
            raise BudgetError(
                f"{words} {why}, the run spends {amount(lowest, resource)} ({lowest / dense_run:.1%}). "
                f"Ask for at least Budget.{ask}, of={resource!r}, per='run')"
            )

    def ceiling(self, *, deciding: bool = True) -> float:
        """The most that a step may cost until the next decision, so that the budget can still be met from there on."""
        left = self._left - self._overhead(deciding=deciding)
        return highest_step(self.schedule, self.step, self.num_steps, left=left, cheapest=self.lowest)

    def spare(self) -> float:
        """What the budget leaves for other things than steps until the next decision."""
        if self.step >= self.num_steps:
            return math.inf
        coming = next_decision(self.schedule, self.step, self.num_steps)
        return (self.ceiling(deciding=False) - self.present) * (coming - self.step)

    def per_step(self) -> float:
        """The limit per step that the rest of the run can be held to; at its end a cut saves nothing any more."""
        step, num_steps, left = self.step, self.num_steps, self._left
        found = step_limit(self.schedule, step, num_steps, left=left, start=self.dense, present=self.present)
        if self.schedule.settled(step, num_steps) and step < num_steps:
            found = min(found, left / (num_steps - step))
        found = max(found, _FLOOR * self.dense)  # a limit of 0 has no relative error
        return found if step < num_steps else max(found, self.present)

    def remaining(self) -> Remaining:
        """What is left of the budget, and what it is spent on apart from steps."""
        every, now = sensed_every(self.num_steps), self.learning(0)
        return Remaining(
            self.limit,
            self.spent + self.coming,
            self.schedule,
            self.margin,
            ahead=self.sensing if every > 1 else 0.0,
            later=self._overhead(deciding=False),
            sensing=self.sensing / every + self.learning(1) - now,  # with what more learning may take with each step
            deciding=now,
            factor=self.factor,
        )

    @property
    def _left(self) -> float:
        return (1 - self.margin) * self.limit - (self.spent + self.coming)

    def _overhead(self, *, deciding: bool) -> float:
        """Cost of sensing up to the last decision, and of learning for one decision more.

        After one that spends more than is left, only the narrowest model is within the budget, and nothing is learned.
        """
        if deciding and self._lands(self.step):
            return 0.0
        later = (at for at in self.schedule.decisions(self.num_steps) if self.step < at < self.num_steps)
        landing = next((at for at in later if self._lands(at)), self.num_steps)
        num_sensed = -(-(landing - self.step) // sensed_every(self.num_steps))
        return num_sensed * self.sensing + self.learning(landing - self.step)

    def _lands(self, step: int) -> bool:
        """Whether a decision at this step can be the last."""
        open_still = self.regrows and not self.schedule.final(step, self.num_steps)
        return self.schedule.settled(step, self.num_steps) and not open_still


def run_budgets(
    limits: Limits,
    account: Account,
    controller: Controller[Any],
    spent: Mapping[str, float],
    step: int,
    num_steps: int,
    widths: Mapping[str, int],
    watts: float,
) -> dict[str, RunBudget]:
    """By resource of a budget per run, that budget at this step of a run of so many.

    Of FLOPs, a controller that learns spends some on the decision at hand. Of seconds, the user's own code between
    steps is taken to continue as it did so far; of joules, where they are `watts` times seconds, likewise.
    """
    groups = tuple(replace(group, num_units=widths[group.name]) for group in limits.groups)

    def learning_flops(ahead: int) -> float:
        return controller.flops(groups, account.learning_left(ahead))

    between = max(0, num_steps - step) * account.extra_seconds_per_step
    coming = {"flops": learning_flops(0), "latency": between, "energy": between * watts}
    runs = {
        budget.resource: RunBudget(
            budget,
            controller.conduct.schedule,
            limits.dense_cost(budget.resource),
            step,
            num_steps,
            spent[budget.resource],
            present=limits.expected(budget.resource, widths),
            lowest=limits.expected(budget.resource, limits.narrowest),
            coming=coming[budget.resource],
            factor=limits.factor(budget.resource),
            regrows=controller.conduct.regrow,
        )
        for budget in limits.budgets
        if budget.per == "run"
    }
    if "flops" in runs:  # a meter's readings have the overhead in them
        runs["flops"] = replace(runs["flops"], sensing=account.sensing_flops, learning=learning_flops)
    return runs


def _rounded_up(value: float) -> float:
    """A number of three digits that is not below."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return float(f"{math.ceil(value / unit) * unit:.3g}")


@dataclass(frozen=True)
class StepOverhead:
    """What steps take besides their own FLOPs and a sensing each, such as a teacher's passes: learnt step by step."""

    mean: float = 0.0  # per step, over the last ones
    twice: float = 0.0  # the largest that two steps have taken: one pass over all data is not expected again
    once: float = 0.0  # the largest that one step has taken
    noted: float = 0.0  # overhead of the run that has been looked at
    steps: int = 0  # how many have been learnt from

    def learnt(self, overhead: float, sensing: float) -> StepOverhead:
        """The same with the overhead of the run after one more step; that of a sensing is known and left out."""
        taken = max(0.0, overhead - self.noted - sensing)
        twice = max(self.twice, min(taken, self.once))
        mean = self.mean + (min(taken, twice) - self.mean) / max(1, min(self.steps, _MEAN_OVER))
        return StepOverhead(mean, twice, max(self.once, taken), overhead, self.steps + 1)


@dataclass(frozen=True)
class Bill:
    """How long a run is whose budgets per step fix the finished model, and whose total of FLOPs fixes the length.

    The length is the largest T for which

        spent + sum over the steps s <= T to come of (f * share(reference(d(s))) + sensing) <= total,

    with f the FLOPs of a step now and d(s) the last decision before s. The overhead of a step, such as a teacher's, is
    learnt and added, and enough is kept for the next step. The reference is of the resource of the budgets per step,
    and FLOPs need not fall with it: parameters may lie in layers of few FLOPs. So `likely_widths` forecasts the share
    of FLOPs that is left at the limit, and until there FLOPs are a power of the cost. Decisions fall as in a run of T
    steps. They move ahead where T shrinks, since the budget is to be met before the total is spent. If what is left
    does not reach the next decision, the run ends before it. So the total is not exceeded, whatever the cuts come to,
    unless the last step has more overhead than any two steps before it.
    """

    budget: Budget  # of FLOPs, per run
    schedule: Schedule
    total: float  # FLOPs that it allows
    overhead: StepOverhead = field(default_factory=StepOverhead)  # what steps take besides, as learnt
    length: int = 0  # number of steps of the run
    decisions_as: int = sys.maxsize  # decisions fall as in a run of so many steps; it only ever falls
    next_decision: int = 0  # the step of the next one
    met: bool = False  # whether the budgets per step are, so that no decision follows
    saves: bool = False  # whether one of them is of FLOPs
    present: float = 1.0  # cost of a step now, of the resource that the controller holds
    lowest: float = 1.0  # the limit of that cost, as predicted
    share: float = 1.0  # of a step's FLOPs that is left at the limit, by forecast
    expected: float = 0.0  # the mean overhead that the run was last planned with

    def check(self, account: Account) -> None:
        """Refuse a total that does not pay for two steps."""
        left, two_steps = self._left(account), 2 * account.step_flops
        if left < two_steps:
            values = self.total, account.train_flops, self.total - left + two_steps
            asked, spent, lowest = (amount(value, "flops") for value in values)
            raise BudgetError(
                f"the run budget of {asked} pays for no run: attaching spent {spent}, so ask for {lowest}, two steps"
            )

    def anew(self) -> Bill:
        """The bill for other budgets per step: `decisions_as` would bind them, and the overhead is still known."""
        return Bill(self.budget, self.schedule, self.total, self.overhead)

    def decided(self, limits: Limits, account: Account, groups: tuple[Group, ...], *, met: bool) -> Bill:
        """Planned after a decision, or for other budgets per step, with these groups at their present widths."""
        cost = limits.cost
        present, share = cost.total(widths_of(groups)), 1.0
        lowest = limits.held[cost.resource] / limits.factor(cost.resource)
        if present > lowest and not met:
            likely = likely_widths(cost, groups, limits.dense_widths, lowest)
            share = limits.costs["flops"].total(likely) / account.step_flops
            if any(budget.resource in _WAVERING for budget in limits.budgets):
                share = max(share, lowest / present)
        # Decisions are no overhead of steps: what they took is left out of what is learnt.
        overhead = replace(self.overhead, noted=account.overhead_flops)
        saves = any(budget.resource == "flops" for budget in limits.budgets)
        known = replace(self, met=met, saves=saves, present=present, lowest=lowest, share=share, overhead=overhead)
        return known.planned(account)

    def planned(self, account: Account) -> Bill:
        """With the length that the total pays for, and decisions to suit.

        Without a budget of FLOPs per step cuts may save none. So decisions fall early enough for a run that saves none.
        """
        step, left = account.num_steps, self._left(account)
        affordable = step + left / (account.step_flops + self.overhead.mean + account.sensing_flops)
        sure = int(self.schedule.land * affordable)

        def paid(length: int) -> bool:
            early = self.saves or self.schedule.settled(sure, length)
            return early and self._pays(account, length, length)

        # `min`: decisions move ahead only, or one that was due would not come.
        decisions_as = self.decisions_as if self.met else min(self.decisions_as, _longest(step, paid))
        return replace(self, expected=self.overhead.mean, decisions_as=decisions_as)._measured(account)

    def stepped(self, account: Account, *, learn: bool) -> Bill:
        """After a step. The overhead of several ranks may differ: none is learnt, or decisions would, too."""
        bill, step = self, account.num_steps
        if learn:
            sensing = 0.0 if self.met else account.sensing_flops
            bill = replace(self, overhead=self.overhead.learnt(account.overhead_flops, sensing))
        if self.schedule.due(step, bill.decisions_as):
            bill = bill._measured(account)
        elif abs(bill.overhead.mean - bill.expected) > _MOVED * account.step_flops:
            bill = bill.planned(account)
        affordable = bill._affordable(account)
        # Without this the steps up to the next decision could cost more than is left, and nothing would be cut in time.
        if affordable < min(max(bill.next_decision, step + 1), bill.length):
            bill = replace(bill, length=max(step, affordable))
        return bill

    def _measured(self, account: Account) -> Bill:
        """With the length that is paid for if decisions fall as planned."""
        step = account.num_steps
        if self.met:
            length = self._affordable(account)
        else:
            length = _longest(step, lambda length: self._pays(account, self.decisions_as, length))
        return replace(self, length=length, next_decision=next_decision(self.schedule, step, self.decisions_as))

    def _pays(self, account: Account, decisions_as: int, length: int) -> bool:
        """Whether what is left pays for the steps up to a length, with decisions as in a run of another length."""
        step, present, lowest, spent = account.num_steps, self.present, self.lowest, 0.0
        start = self.schedule.start_through(step, decisions_as, value=present, limit=lowest)
        # The same reference without its many checks after the ramp, each of which would be a span of its own.
        ramp = replace(self.schedule, land=self.schedule.settle)
        end = max(step, decisions_as)  # no decision comes after it, however long the run is
        for at, steps in [*spans(ramp, step, end), (end, length - end)]:
            cost = min(present, self.schedule.at(at, decisions_as, start=start, limit=lowest))
            done = math.log(cost / present) / math.log(lowest / present) if cost < present else 0.0
            overhead = (account.sensing_flops if cost > lowest else 0.0) + self.overhead.mean
            spent += max(0, min(steps, length - at)) * (account.step_flops * self.share**done + overhead)
        return spent <= self._left(account)

    def _left(self, account: Account) -> float:
        """FLOPs that are left for steps; one sensing and the largest overhead are kept for the step to come."""
        kept = max(0.0, self.overhead.twice - self.overhead.mean)
        return self.total - account.train_flops - account.sensing_flops - kept

    def _affordable(self, account: Account) -> int:
        return account.num_steps + int(self._left(account) / (account.step_flops + self.overhead.mean))

    def state_dict(self) -> dict[str, Any]:
        plan = {name: value for name, value in vars(self).items() if name not in ("budget", "schedule", "total")}
        return {**plan, "overhead": asdict(self.overhead)}

    def restored(self, state: Mapping[str, Any]) -> Bill:
        own = {name: state[name] for name in self.state_dict()}
        return replace(self, **own | {"overhead": StepOverhead(**state["overhead"])})


def _longest(step: int, paid: Callable[[int], bool]) -> int:
    low, high = step, step + 1
    while paid(high):  # doubling, so that a bill in a wrong unit is planned in no time
        low, high = high, step + 2 * (high - step)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if paid(middle) else (low, middle)
    return low


def likely_widths(cost: Cost, groups: tuple[Group, ...], dense: Mapping[str, int], limit: float) -> dict[str, int]:
    """The widths at which a cut by worth meets a limit, if groups matter equally and saliencies rise evenly in each.

    Of a group of N units in the dense model the k-th least salient has the saliency k / N^2, so all groups sum to about
    one half, and those that are left after earlier cuts are the last ones. This tells where a budget finds its savings:
    in wide groups, and in those that cost much. `groups` are at their present widths, which none exceeds afterwards.
    """
    saliency = {
        group.name: np.arange(dense[group.name] - group.num_units + 1, dense[group.name] + 1) / dense[group.name] ** 2
        for group in groups
    }
    selection = start(cost, groups, saliency, widths_of(groups), dense)
    reach(selection, limit)
    return dict(selection.widths)
