"""Runs: what budgets of a whole run leave for each of its steps to come, everything that it spends taken in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from setpoint.controller.ladder import lowest_width
from setpoint.controller.plan import Learning
from setpoint.controller.schedule import RunRest, Schedule, next_decision
from setpoint.controller.selection import cheapest
from setpoint.cost.budget import METERED, amount
from setpoint.groups.group import Group, widths_of
from setpoint.messages import warn
from setpoint.sensor.reading import sensed_every
from setpoint.spending.account import Account
from setpoint.spending.meter import Meter
from setpoint.spending.target import Target

LEARNING_SHARE = 0.01
"""A controller that learns never takes more than this share of the FLOPs of the steps so far."""


class Runs:
    """The budgets of a whole run.

    Whatever it is asked is for a step, the run's length and widths: optimizer steps done, of how many, and the present
    units by group.

    Args:
        groups: at dense widths.
        regrows: whether units come back until the schedule is over.
        learning: the controller, if it learns.
        reported: resources whose budget was warned of.
    """

    def __init__(
        self,
        account: Account,
        meter: Meter,
        groups: tuple[Group, ...],
        schedule: Schedule,
        regrows: bool,
        learning: Learning | None,
        reported: set[str],
        target: Target,
    ) -> None:
        self._target, self._account, self._meter, self._schedule = target, account, meter, schedule
        self._groups, self._narrowest = groups, {group.name: lowest_width(group) for group in groups}
        self._regrows, self._learning, self._reported = regrows, learning, reported

    def limit(self, total_steps: int) -> dict[str, float]:
        """By resource, what the whole run may spend."""
        return {name: run.limit(total_steps) for name, run in self._target.runs.items()}

    def spent(self) -> dict[str, float]:
        """By resource, what has been spent from the call of `attach` to the last optimizer step.

        Overhead is included: FLOPs as they are counted, seconds by the clock, joules by the meter at its last reading
        and as predicted from there on. Joules by the user's watts are those times the seconds of the run.
        """
        account, watts = self._account, self._meter.watts
        run_j = watts * account.run_seconds if watts else account.run_j
        found = {"flops": account.train_flops, "latency": account.run_seconds, "energy": run_j}
        return {name: found[name] for name in self._target.runs}

    def read_joules(self, widths: Mapping[str, int]) -> None:
        """Set the account's joules to what the meter reads now, and those of a step to come to what is expected."""
        if "energy" in self._target.runs:
            run_j = self._meter.run_j()
            self._account.run_j = self._account.run_j if run_j is None else run_j
            self._account.step_j = self._target.expected("energy", widths)

    def replan(self, step: int, total_steps: int, widths: Mapping[str, int]) -> None:
        """Find afresh what the budgets leave for each step; one that cannot be met is warned of once."""
        self.read_joules(widths)
        self._target.replan(step, total_steps, spent=self._committed(step, total_steps, widths), widths=widths)
        least = self._forecast(step, total_steps, self._narrowest)
        for name, limit in self.limit(total_steps).items():
            if 0 < step < total_steps and least[name] > limit and name not in self._reported:
                self._reported.add(name)
                warn(
                    f"the budget of {amount(limit, name)} for the run cannot be met any more: "
                    f"{amount(self.spent()[name], name)} was spent by step {step}, and with the narrowest model it "
                    f"would come to {amount(least[name], name)}"
                )

    def length(self, total_steps: int, *_: Any) -> int:
        """The run is as long as it was said to be."""
        return total_steps

    planned = stepped = length

    def state_dict(self) -> dict[str, Any]:
        """Nothing is remembered."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing is remembered."""

    @property
    def metered(self) -> bool:
        """Whether a meter tells what is spent."""
        return bool(self._target.runs.keys() & set(METERED))

    def over(self, step: int, total_steps: int, widths: Mapping[str, int]) -> bool:
        """Whether the run will be over its budget at these widths, by all that is known."""
        self.replan(step, total_steps, widths)
        coming = self._forecast(step, total_steps, widths)
        return any(coming[name] > limit for name, limit in self.limit(total_steps).items())

    def most(
        self, step: int, total_steps: int, widths: Mapping[str, int], *, deciding: bool = True
    ) -> dict[str, float]:
        """By resource, the most that a step may cost from this decision to the next."""
        spent = self._committed(step, total_steps, widths)
        besides = self._overhead_to_come(step, total_steps, widths, deciding=deciding)
        return {
            name: run.most(
                step,
                total_steps,
                spent=spent[name],
                cheapest=self._target.expected(name, self._narrowest),
                besides=besides if name == "flops" else 0.0,  # what a meter reads has them in it
            )
            for name, run in self._target.runs.items()
        }

    def rest(self, step: int, total_steps: int, widths: Mapping[str, int]) -> dict[str, RunRest]:
        """By resource, what is left of a budget, and what else it is spent on."""
        spent, every = self._committed(step, total_steps, widths), sensed_every(total_steps)
        found = {}
        for name, run in self._target.runs.items():
            factor = self._target.factor(name)
            rest = RunRest(run.limit(total_steps), spent[name], run.schedule, run.margin, factor=factor)
            if name == "flops":  # what a meter reads has all else in it
                deciding, sensing = self._learning_flops(widths), self._account.sensing_flops
                growth = self._learning_flops(widths, num_steps=1) - deciding  # of what learning may take, per step
                rest = replace(
                    rest,
                    ahead=sensing if every > 1 else 0.0,
                    later=self._overhead_to_come(step, total_steps, widths, deciding=False),
                    sensing=sensing / every + growth,
                    deciding=deciding,
                )
            found[name] = rest
        return found

    def spare_flops(self, step: int, total_steps: int, widths: Mapping[str, int]) -> float:
        """FLOPs that are left for other things than steps, until the next decision."""
        if "flops" not in self._target.runs or step >= total_steps:
            return math.inf
        most = self.most(step, total_steps, widths, deciding=False)["flops"]
        coming = next_decision(self._schedule, step, total_steps)
        return (most - self._target.expected("flops", widths)) * (coming - step)

    def check(self, step: int, total_steps: int, groups: tuple[Group, ...]) -> None:
        """Check that the budgets can be met from here, with these groups at their present widths.

        Raises:
            BudgetError: saying what is spent already, or what the least is.
        """
        widths, target = widths_of(groups), self._target
        self.read_joules(widths)
        spent = self.spent()
        for name, run in target.runs.items():
            present, cost = target.expected(name, widths), target.costs[name]
            least = present * cheapest(cost, groups) / cost.total(widths)
            flops = name == "flops"
            besides = self._overhead_to_come(step, total_steps, widths, deciding=False) if flops else 0.0
            run.check(total_steps, step=step, spent=spent[name], present=present, cheapest=least, besides=besides)

    def _committed(self, step: int, total_steps: int, widths: Mapping[str, int]) -> dict[str, float]:
        """By resource, what has been spent, and what will be besides optimizer steps.

        Of FLOPs that is what a controller that learns spends on the decision at hand. Of seconds it is what the user's
        own code has taken between steps so far, step for step; of joules, where they are watts times seconds, likewise.
        """
        seconds = max(0, total_steps - step) * self._account.extra_seconds_per_step
        besides = {"flops": self._learning_flops(widths), "latency": seconds, "energy": seconds * self._meter.watts}
        return {name: value + besides[name] for name, value in self.spent().items()}

    def _forecast(self, step: int, total_steps: int, widths: Mapping[str, int]) -> dict[str, float]:
        left, spent = max(0, total_steps - step), self._committed(step, total_steps, widths)
        return {name: value + left * self._target.expected(name, widths) for name, value in spent.items()}

    def _learning_flops(self, widths: Mapping[str, int], num_steps: int = 0) -> float:
        """FLOPs that a decision at these widths spends on learning at the most, so many steps from now."""
        if self._learning is None:
            return 0.0
        groups = tuple(replace(group, num_units=widths[group.name]) for group in self._groups)
        left = self._account.share_left(LEARNING_SHARE, self._account.learning_flops, num_steps)
        return self._learning.flops(groups, max(0.0, left))

    def _overhead_to_come(self, step: int, total_steps: int, widths: Mapping[str, int], *, deciding: bool) -> float:
        """FLOPs that go besides steps from here to the landing at the latest: on sensing, and on one more decision.

        After one that spends more than is left the narrowest model is all that a budget of the run allows, and for that
        nothing is learned. At a decision that can land (`deciding`: one is made at this step), nothing goes any more.
        """
        if "flops" not in self._target.runs:
            return 0.0
        times = self._schedule

        def lands(at: int) -> bool:
            open_still = self._regrows and not times.final(at, total_steps)
            return times.settled(at, total_steps) and not open_still

        if deciding and lands(step):
            return 0.0
        due = (at for at in range(step + 1, total_steps) if times.due(at, total_steps))
        landing = next((at for at in due if lands(at)), total_steps)
        num_sensed = -(-(landing - step) // sensed_every(total_steps))
        return num_sensed * self._account.sensing_flops + self._learning_flops(widths, landing - step)
