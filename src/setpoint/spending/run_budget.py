"""A run budget: what a whole run may spend, and what that leaves for each step to come, or for how many steps."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from setpoint.checkpoint.fields import fields_of
from setpoint.controller.horizon import Remaining, cheapest_run, highest_step, next_decision, spans, step_limit
from setpoint.controller.ladder import free_ladders
from setpoint.controller.schedule import Schedule
from setpoint.controller.selection import add_back, descend, start
from setpoint.controller.swap import swap, trade
from setpoint.cost.budget import IN_SECONDS, METERED, MILLISECONDS, Budget, amount
from setpoint.cost.cost import Cost
from setpoint.errors import BudgetError
from setpoint.groups.group import Group
from setpoint.sensor.reading import sensed_every

# The lowest limit per step, as a share of dense: where nothing is left every block goes, and the summary says so.
_FLOOR = 1e-3
# Share of a run budget that is left where a meter tells what is spent.
_WAVER = 0.003
# Steps over which the mean overhead of a step is taken.
_MEAN_OVER = 50
# Share of a step by which that mean has moved when the run is planned again.
_MOVED = 0.01


@dataclass(frozen=True)
class RunBudget:
    """A budget on everything that a run spends, verification, sensing and probing included: pure mathematics.

    With a *fixed length* the budget says what each step may cost. Before each decision the limit per step is found
    again from what the account has really spent (`step_limit`), so the steps to come make up for what cost more or
    less than planned; a last cut waits while it would leave much unused (`Remaining`). Where a meter reads what is
    spent, all of this aims at `(1 - margin) * limit`, so that noise in the last steps does not take the run over it.

    With a *fixed total* (a bill) budgets per step fix the finished model, and the total fixes how long it is trained.
    The length is the largest T for which

        spent + sum over the steps s <= T to come of (f * share(reference(d(s))) + sensing) <= total,

    with f the FLOPs of a step now and d(s) the last decision before s. The overhead of a step, such as a teacher's, is
    learnt and added, and enough is kept for the next step. The reference is of the resource of the budgets per step,
    and FLOPs need not fall with it: parameters may lie in layers of few FLOPs. So `likely_widths` forecasts the share
    of FLOPs that is left at the limit, and until there FLOPs are a power of the cost. Decisions fall as in a run of T
    steps. They move ahead where T shrinks, since the budget is to be met before the total is spent. If what is left
    does not reach the next decision, the run ends before it. So the total is not exceeded, whatever the cuts come to,
    unless the last step has more overhead than any two steps before it.

    Args:
        budget: of one resource, per run.
        schedule: when decisions are made.
        dense: cost of a step of the dense model.
    """

    budget: Budget
    schedule: Schedule
    dense: float

    @property
    def margin(self) -> float:
        return _WAVER if self.budget.resource in METERED else 0.0

    def limit(self, num_steps: int) -> float:
        """What a run of so many steps may spend; a fraction is one of the dense run."""
        return self.budget.absolute(self.dense * num_steps)

    # A fixed length.

    def check(self, state: RunState, cheapest: float) -> None:
        """Refuse a budget that cannot be met any more; `cheapest` is the lowest cost of a step that blocks reach."""
        step, num_steps, spent, resource = state.step, state.num_steps, state.spent, self.budget.resource
        limit, dense_run = self.limit(num_steps), self.dense * num_steps
        words = f"a budget of {amount(limit, resource)} for the run ({limit / dense_run:.1%} of a dense one)"
        if resource in IN_SECONDS and limit > MILLISECONDS * dense_run:
            raise BudgetError(
                f"{words} is {limit / dense_run:,.0f} times what a dense run takes, so nothing would be cut: ask for "
                f"less than {amount(dense_run, resource)}. A number without a unit is in seconds"
            )
        steps = cheapest_run(self.schedule, step, num_steps, present=state.present, cheapest=cheapest)
        lowest = spent + self._overhead(state, deciding=False) + steps
        if limit * (1 - self.margin) < lowest:
            lowest /= 1 - self.margin
            fraction = math.ceil(1000 * lowest / dense_run) / 1000
            ask = f"fraction({fraction:g}" if fraction <= 1 else f"total({_rounded_up(lowest):g}"
            cut = next_decision(self.schedule, step, num_steps)
            why = f"cannot be met: with a cut down to the narrowest model after step {cut}, the first that there can be"
            if spent >= limit:
                why = f"is spent already: {amount(spent, resource)} was spent by step {step}"
                why += ". Cut to the narrowest model"
            raise BudgetError(
                f"{words} {why}, the run spends {amount(lowest, resource)} ({lowest / dense_run:.1%}). "
                f"Ask for at least Budget.{ask}, of={resource!r}, per='run')"
            )

    def ceiling(self, state: RunState, *, deciding: bool = True) -> float:
        """The most that a step may cost until the next decision, so that the budget can still be met from there on."""
        left = self._left(state) - self._overhead(state, deciding=deciding)
        return highest_step(self.schedule, state.step, state.num_steps, left=left, cheapest=state.lowest)

    def spare(self, state: RunState) -> float:
        """What the budget leaves for other things than steps until the next decision."""
        if state.step >= state.num_steps:
            return math.inf
        coming = next_decision(self.schedule, state.step, state.num_steps)
        return (self.ceiling(state, deciding=False) - state.present) * (coming - state.step)

    def per_step(self, state: RunState) -> float:
        """The limit per step that the rest of the run can be held to; at its end a cut saves nothing any more."""
        step, num_steps, left = state.step, state.num_steps, self._left(state)
        found = step_limit(self.schedule, step, num_steps, left=left, start=self.dense, present=state.present)
        if self.schedule.settled(step, num_steps) and step < num_steps:
            found = min(found, left / (num_steps - step))
        found = max(found, _FLOOR * self.dense)  # a limit of 0 has no relative error
        return found if step < num_steps else max(found, state.present)

    def remaining(self, state: RunState) -> Remaining:
        """What is left of the budget, and what it is spent on beside steps."""
        every, now = sensed_every(state.num_steps), state.learning(0)
        return Remaining(
            self.limit(state.num_steps),
            state.committed,
            self.schedule,
            self.margin,
            ahead=state.sensing if every > 1 else 0.0,
            later=self._overhead(state, deciding=False),
            sensing=state.sensing / every + state.learning(1) - now,  # with what more learning may take with each step
            deciding=now,
            factor=state.factor,
        )

    def _left(self, state: RunState) -> float:
        return (1 - self.margin) * self.limit(state.num_steps) - state.committed

    def _overhead(self, state: RunState, *, deciding: bool) -> float:
        """Cost of sensing up to the last decision, and of learning for one decision more.

        After one that spends more than is left, only the narrowest model is within the budget, and nothing is learned.
        """
        if deciding and self._lands(state, state.step):
            return 0.0
        later = (at for at in self.schedule.decisions(state.num_steps) if state.step < at < state.num_steps)
        landing = next((at for at in later if self._lands(state, at)), state.num_steps)
        num_sensed = -(-(landing - state.step) // sensed_every(state.num_steps))
        return num_sensed * state.sensing + state.learning(landing - state.step)

    def _lands(self, state: RunState, step: int) -> bool:
        """Whether a decision at this step can be the last."""
        open_still = state.regrows and not self.schedule.final(step, state.num_steps)
        return self.schedule.settled(step, state.num_steps) and not open_still

    # A fixed total.

    def check_total(self, plan: RunPlan, now: Spent, total: float) -> None:
        """Refuse a total that does not pay for two steps."""
        left = _left(plan, now, total)
        if left < 2 * now.step_flops:
            values = total, now.train_flops, now.step_flops, total - left + 2 * now.step_flops
            asked, spent, step, lowest = (amount(value, "flops") for value in values)
            raise BudgetError(
                f"the bill of {asked} pays for no run: attaching spent {spent}, and a dense step spends {step}. Two "
                f"steps are the least: ask for {lowest}"
            )

    def planned(self, plan: RunPlan, now: Spent, total: float) -> RunPlan:
        """The plan with the length that a total of FLOPs pays for, and with its decisions.

        Without a budget of FLOPs per step cuts may save none. So decisions fall early enough for a run that saves none.
        """
        plan = replace(plan, expected=plan.overhead.mean)
        left = _left(plan, now, total)
        affordable = now.step + left / (now.step_flops + plan.overhead.mean + now.sensing_flops)
        sure = int(self.schedule.land * affordable)

        def paid(length: int) -> bool:
            early = plan.saves or self.schedule.settled(sure, length)
            return early and self._pays(plan, now, length, length, left)

        if not plan.met:  # `min`: decisions move ahead only, or one that was due would not come
            plan = replace(plan, decisions_as=min(plan.decisions_as, _longest(now.step, paid)))
        return self._measured(plan, now, total)

    def stepped(self, plan: RunPlan, now: Spent, total: float, *, learn: bool) -> RunPlan:
        """The plan after a step. The overhead of several ranks may differ: none is learnt, or decisions would, too."""
        if learn:
            sensing = 0.0 if plan.met else now.sensing_flops
            plan = replace(plan, overhead=plan.overhead.learnt(now.overhead_flops, sensing))
        if self.schedule.due(now.step, plan.decisions_as):
            plan = self._measured(plan, now, total)
        elif abs(plan.overhead.mean - plan.expected) > _MOVED * now.step_flops:
            plan = self.planned(plan, now, total)
        affordable = _affordable(plan, now, total)
        # Without this the steps up to the next decision could cost more than is left, and nothing would be cut in time.
        if affordable < min(max(plan.next_decision, now.step + 1), plan.length):
            plan = replace(plan, length=max(now.step, affordable))
        return plan

    def _measured(self, plan: RunPlan, now: Spent, total: float) -> RunPlan:
        """The plan with the length that is paid for if decisions fall as planned."""
        left = _left(plan, now, total)
        if plan.met:
            length = _affordable(plan, now, total)
        else:
            length = _longest(now.step, lambda length: self._pays(plan, now, plan.decisions_as, length, left))
        return replace(plan, length=length, next_decision=next_decision(self.schedule, now.step, plan.decisions_as))

    def _pays(self, plan: RunPlan, now: Spent, decisions_as: int, length: int, left: float) -> bool:
        """Whether what is left pays for the steps up to a length, with decisions as in a run of another length."""
        present, lowest, spent = plan.present, plan.lowest, 0.0
        start = self.schedule.start_through(now.step, decisions_as, value=present, limit=lowest)
        # The same reference without its many checks after the ramp, each of which would be a span of its own.
        ramp = replace(self.schedule, land=self.schedule.settle)
        end = max(now.step, decisions_as)  # no decision comes after it, however long the run is
        for at, steps in [*spans(ramp, now.step, end), (end, length - end)]:
            cost = min(present, self.schedule.at(at, decisions_as, start=start, limit=lowest))
            done = math.log(cost / present) / math.log(lowest / present) if cost < present else 0.0
            overhead = (now.sensing_flops if cost > lowest else 0.0) + plan.overhead.mean
            spent += max(0, min(steps, length - at)) * (now.step_flops * plan.share**done + overhead)
        return spent <= left


@dataclass(frozen=True)
class RunState:
    """What is known at a step of a run of fixed length, of one resource and in its own unit.

    Args:
        spent: so far, from the call of `attach` on.
        committed: `spent`, and what will be spent beside steps whatever is decided, such as on the user's own code.
        present: cost of a step now, by all that is known.
        lowest: cost of a step of the narrowest model.
        factor: cost of a step as metered / as predicted.
        sensing: cost of a sensing; 0 where a meter reads the resource, since that has all overhead in it.
        learning: what a decision so many steps from now spends on learning at the most; 0 likewise.
        regrows: whether units come back until the schedule is over.
    """

    step: int
    num_steps: int
    spent: float
    committed: float
    present: float
    lowest: float
    factor: float = 1.0
    sensing: float = 0.0
    learning: Callable[[int], float] = lambda num_steps: 0.0
    regrows: bool = False

    def forecast(self, per_step: float) -> float:
        """What the run comes to if each step to come costs so much."""
        return self.committed + max(0, self.num_steps - self.step) * per_step


@dataclass(frozen=True)
class Spent:
    """What the account of a run says after a step, in FLOPs.

    Args:
        step: optimizer steps done.
        train_flops: of the run so far, overhead included.
        overhead_flops: of them, those of no optimizer step.
        step_flops: of a step now.
        sensing_flops: of a sensing now.
    """

    step: int
    train_flops: float
    overhead_flops: float
    step_flops: float
    sensing_flops: float


@dataclass(frozen=True)
class StepOverhead:
    """What steps take besides their own FLOPs and a sensing each, such as the passes of a teacher: learnt step by step.

    Args:
        mean: per step, over the last ones.
        twice: the largest that two steps have taken. So one pass over all data between two steps is not expected again.
        once: the largest that one step has taken.
        noted: overhead of the run that has been looked at.
        steps: how many have been learnt from.
    """

    mean: float = 0.0
    twice: float = 0.0
    once: float = 0.0
    noted: float = 0.0
    steps: int = 0

    def learnt(self, overhead: float, sensing: float) -> StepOverhead:
        """The same with the overhead of the run after one more step; that of a sensing is known and left out.

        >>> found = StepOverhead()
        >>> for overhead in (2.0, 4.0, 6.0, 90.0):
        ...     found = found.learnt(overhead, sensing=0.5)
        >>> found.mean, found.twice
        (1.5, 1.5)
        """
        taken = max(0.0, overhead - self.noted - sensing)
        twice = max(self.twice, min(taken, self.once))
        mean = self.mean + (min(taken, twice) - self.mean) / max(1, min(self.steps, _MEAN_OVER))
        return StepOverhead(mean, twice, max(self.once, taken), overhead, self.steps + 1)


@dataclass(frozen=True)
class RunPlan:
    """How long a run is that a total pays for, and on what grounds.

    Args:
        length: its number of steps.
        decisions_as: decisions fall as in a run of so many steps; it only ever falls.
        next_decision: the step of the next one.
        met: whether the budgets per step are, so that no decision follows.
        saves: whether one of them is of FLOPs.
        present: cost of a step now, of the resource that the controller holds.
        lowest: the limit of that cost, as predicted.
        share: of a step's FLOPs that is left at the limit, by forecast.
        overhead: what steps take besides, as learnt.
        expected: the mean overhead that the run was last planned with.
    """

    length: int = 0
    decisions_as: int = sys.maxsize
    next_decision: int = 0
    met: bool = False
    saves: bool = False
    present: float = 1.0
    lowest: float = 1.0
    share: float = 1.0
    overhead: StepOverhead = field(default_factory=StepOverhead)
    expected: float = 0.0

    def restored(self, state: Mapping[str, Any]) -> RunPlan:
        """The plan of a state."""
        overhead = StepOverhead(**fields_of(StepOverhead, state["overhead"]))
        plan = {name: value for name, value in state.items() if name != "overhead"}
        return RunPlan(**fields_of(RunPlan, plan), overhead=overhead)


def _left(plan: RunPlan, now: Spent, total: float) -> float:
    """FLOPs that are left for steps; one sensing and the largest overhead are kept for the step to come."""
    return total - now.train_flops - now.sensing_flops - max(0.0, plan.overhead.twice - plan.overhead.mean)


def _affordable(plan: RunPlan, now: Spent, total: float) -> int:
    """The steps that are paid for at what one costs now."""
    return now.step + int(_left(plan, now, total) / (now.step_flops + plan.overhead.mean))


def _longest(step: int, paid: Callable[[int], bool]) -> int:
    """The largest length, from this step on, that is paid for."""
    low, high = step, step + 1
    while paid(high):  # doubling, so that a bill in a wrong unit is planned in no time
        low, high = high, step + 2 * (high - step)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if paid(middle) else (low, middle)
    return low


def _rounded_up(value: float) -> float:
    """A number of three digits that is not below.

    >>> _rounded_up(1234.0), _rounded_up(0.0099701)
    (1240.0, 0.00998)
    """
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return float(f"{math.ceil(value / unit) * unit:.3g}")


def likely_widths(cost: Cost, groups: tuple[Group, ...], dense: Mapping[str, int], limit: float) -> dict[str, int]:
    """The widths at which a cut by worth meets a limit, if groups matter equally and saliencies rise evenly in each.

    Of a group of N units in the dense model the k-th least salient has the saliency k / N^2, so all groups sum to about
    one half, and those that are left after earlier cuts are the last ones. This tells where a budget finds its savings:
    in wide groups, and in those that cost much.

    Args:
        groups: at their present widths, which none exceeds afterwards; all that the cost follows.
        dense: units by group of the dense model.
    """
    saliency = {
        group.name: np.arange(dense[group.name] - group.num_units + 1, dense[group.name] + 1) / dense[group.name] ** 2
        for group in groups
    }
    ladders, widths = free_ladders(dense, groups, saliency, {}), {group.name: group.num_units for group in groups}
    selection = start(cost, ladders, widths, "worth")
    descend(selection, limit)
    if selection.total <= limit:
        add_back(selection, limit)
        swap(selection, limit, deadband=0.01)
        trade(selection, limit, deadband=0.01)
    return dict(selection.widths)
