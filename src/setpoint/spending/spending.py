"""The spending of a run: what it is held to, what it has spent, and what that leaves for the steps to come."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from setpoint.controller.plan import Learning, Observation, Plan
from setpoint.controller.schedule import Schedule
from setpoint.controller.selection import cheapest
from setpoint.cost.budget import METERED, Budget, amount
from setpoint.cost.cost import Cost
from setpoint.groups.group import Group, widths_of
from setpoint.ledger import Entry
from setpoint.messages import warn
from setpoint.sensor.reading import Reading
from setpoint.spending.account import Account
from setpoint.spending.limits import Limits
from setpoint.spending.meter import Meter

if TYPE_CHECKING:  # most runs have no budget of the whole run, and never load it
    from setpoint.spending.run_budget import RunBudget, RunPlan, RunState

# A controller that learns never takes more than this share of the FLOPs of the steps so far.
_LEARNING_SHARE = 0.01
# What is read again at each decision. FLOPs may fall much faster, so a reading that wavers would multiply the length:
# the forecast lets them fall no faster, and the run becomes longer once cuts have come.
_WAVERING = ("latency", "energy")


class Spending:
    """What a run is held to, what it has spent, and what meters read of it. It changes at every step.

    Args:
        limits: of a step; the groups are at dense widths.
        total_steps: as the user said it; a bill that is a fraction is one of a dense run of so many steps.
        schedule: when decisions are made.
        regrows: whether units come back until the schedule is over.
        learning: the controller, if it learns.
        modelled: by resource, what the cost was modelled by.
        check_kind: refuses budgets that a run of this kind cannot meet.
        bill: FLOPs of the whole run where there are budgets per step, too; it fixes the run's length.

    Attributes:
        readings: of meters at the last decision, by resource.
    """

    def __init__(
        self,
        limits: Limits,
        *,
        total_steps: int,
        schedule: Schedule,
        account: Account,
        meter: Meter,
        single_process: bool = True,
        regrows: bool = False,
        learning: Learning | None = None,
        modelled: Mapping[str, str] | None = None,
        check_kind: Callable[[Sequence[Budget]], None] = lambda budgets: None,
        bill: Budget | None = None,
    ) -> None:
        self.limits, self.costs, self.dense_widths = limits, limits.costs, limits.dense_widths
        self.account, self.meter, self.schedule = account, meter, schedule
        self.modelled, self.check_kind, self.bill = modelled or {}, check_kind, bill
        self._single_process, self._regrows, self._learning = single_process, regrows, learning
        self._total_steps = total_steps
        self._fixed_total: RunBudget | None = None
        self._plan: RunPlan | None = None  # with a bill only
        if bill is not None:
            from setpoint.spending.run_budget import RunBudget

            self._fixed_total = RunBudget(bill, schedule, limits.dense_cost("flops"))
        self.readings, self._warned = dict[str, float](), set[str]()
        self._known: Mapping[str, float] = {}  # what meters have told the controller of a step
        self.hold(limits.budgets, limits.groups)

    @property
    def planned_steps(self) -> int:
        """Decisions fall as in a run of so many steps."""
        return self._total_steps if self._plan is None else self._plan.decisions_as

    @property
    def run_steps(self) -> int:
        """How many optimizer steps the run has: `planned_steps`, but with a bill what that pays for."""
        return self._total_steps if self._plan is None else self._plan.length

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """The budgets but for the bill; none where a price or a tolerance is followed."""
        return self.limits.budgets

    @property
    def cost(self) -> Cost:
        """What the controller is to hold."""
        return self.limits.cost

    # What the run is held to; `checks` has it checked before it changes.

    def hold(self, budgets: Sequence[Budget], groups: tuple[Group, ...]) -> None:
        self.limits = self.limits.held_to(budgets)
        if self._fixed_total is not None:
            from setpoint.spending.run_budget import RunPlan

            # A new plan, since `decisions_as` of the last one would bind it; the overhead of steps is still known.
            self._plan = RunPlan() if self._plan is None else RunPlan(overhead=self._plan.overhead)
            self._replan_length(groups, met=False)

    def set_length(self, total_steps: int) -> None:
        self._total_steps = total_steps

    def check_run(self, step: int, total_steps: int, groups: tuple[Group, ...]) -> None:
        """Refuse budgets of the run that cannot be met from here, with these groups at their present widths."""
        if self._fixed_total is not None and self._plan is not None:
            self._fixed_total.check_total(self._plan, self.account.now, self.limit_run["flops"])
        widths = widths_of(groups)
        self.read_joules(widths)
        for name, state in self._states(step, widths, total_steps).items():
            cost = self.costs[name]
            self._runs[name].check(state, state.present * cheapest(cost, groups) / cost.total(widths))

    # What happens.

    def stepped(self) -> None:
        self.account.stepped()
        self.meter.stepped()
        if self._fixed_total is not None and self._plan is not None:
            total, learn = self.limit_run["flops"], self._single_process
            self._plan = self._fixed_total.stepped(self._plan, self.account.now, total, learn=learn)

    def prepare(self, due: bool) -> None:
        """The next step begins: on the clock, unless it is watched for its bytes, as before a decision (`due`)."""
        if not self.meter.prepare(due):
            self.meter.steps.begin()

    def read_meters(self, widths: Mapping[str, int]) -> None:
        """Take in what meters read at these widths, before a decision."""
        self.account.sensed(self.meter.time_inference(widths))
        self.readings = dict(self.meter.read().values)
        self.limits, self._known = self.meter.corrected(self.limits, widths)

    def resized(self, groups: tuple[Group, ...], sensing_flops: float) -> None:
        """The model has other widths, at which a sensing has these FLOPs."""
        self.account.sensing_flops = sensing_flops
        self.account.resized(self.costs["flops"].total(widths_of(groups)))
        self.meter.cut()

    def decided(self, groups: tuple[Group, ...], met: bool) -> None:
        """A decision is made; none follows once the budgets per step are met."""
        self.read_joules(widths_of(groups))
        if self._fixed_total is not None:
            self._replan_length(groups, met=met)

    def read_joules(self, widths: Mapping[str, int]) -> None:
        """Have the account go by the meter: joules of the run as read, those of the steps to come as expected."""
        if "energy" in self._runs:
            run_j = self.meter.read().run_j
            self.account.run_j = self.account.run_j if run_j is None else run_j
            self.account.step_j = self.limits.expected("energy", widths)

    def _replan_length(self, groups: tuple[Group, ...], *, met: bool) -> None:
        from setpoint.spending.run_budget import likely_widths

        assert self._fixed_total is not None and self._plan is not None
        limits, cost = self.limits, self.cost
        present, share = cost.total(widths_of(groups)), 1.0
        lowest = limits.held[cost.resource] / limits.factor(cost.resource)
        if present > lowest and not met:
            likely = likely_widths(cost, groups, self.dense_widths, lowest)
            share = self.costs["flops"].total(likely) / self.account.step_flops
            if any(budget.resource in _WAVERING for budget in self.budgets):
                share = max(share, lowest / present)
        # Decisions are no overhead of steps: what they took is left out of what is learnt.
        overhead = replace(self._plan.overhead, noted=self.account.overhead_flops)
        saves = any(budget.resource == "flops" for budget in self.budgets)
        plan = replace(self._plan, met=met, saves=saves, present=present, lowest=lowest, share=share, overhead=overhead)
        self._plan = self._fixed_total.planned(plan, self.account.now, self.limit_run["flops"])

    # What is known.

    def facts(self) -> dict[str, Any]:
        """What a run that is resumed must share with the one before, and all ranks with each other."""
        dense, bills = self.limits.dense, () if self.bill is None else (self.bill,)
        budgets = [(b.resource, float(b.limit), b.per, b.relative) for b in (*self.budgets, *bills)]
        return {
            "dense": {name: dense[name] for name in ("flops", "params")},  # others are fitted to this machine
            "budgets": budgets,
            "total_steps": self._total_steps,
        }

    @property
    def header(self) -> dict[str, Any]:
        """The part of a ledger's header that is on spending."""
        dense = {name: self.limits.dense_cost(name) for name in self.costs}
        per_step = {b.resource: b.absolute(dense[b.resource]) for b in self.budgets if b.per == "step"}
        return {
            "dense": dense,
            "limit": per_step,
            "limit_run": self.limit_run,
            "total_steps": self.planned_steps,
            "modelled": dict(self.modelled),
            "measured": dict(self.meter.sources),
        }

    def observation(self, step: int, groups: tuple[Group, ...], reading: Reading | None, **others: Any) -> Observation:
        """Everything that a controller sees at a decision; `others` are more of its fields, such as the loss."""
        widths, account, resizing = widths_of(groups), self.account, self.account.watch.resizing
        self.replan(step, widths)
        runs, states = self._runs, self._states(step, widths)
        return Observation(
            step=step,
            planned_steps=self.planned_steps,
            widths=widths,
            dense_widths=self.dense_widths,
            reading=reading,
            dense=self.limits.dense,
            limit=self.limits.held,
            spent={name: cost.total(widths) for name, cost in self.costs.items()},
            metered=self._known,
            # Each process has a clock of its own, and all must come to the same plan.
            seconds_per_step=account.steps.seconds_per_step if self._single_process else None,
            seconds_per_resize=resizing.last_seconds if account.resizes and self._single_process else None,
            ceiling={name: runs[name].ceiling(state) for name, state in states.items()},
            remaining={name: runs[name].remaining(state) for name, state in states.items()},
            learning_flops=max(0.0, account.share_left(_LEARNING_SHARE, account.learning_flops)),
            **others,
        )

    def entry(
        self, step: int, plan: Plan | None, groups: tuple[Group, ...], before: Mapping[str, int], reason: str
    ) -> Entry:
        """An entry on the present widths; `plan` is the last one, `before` are the widths that the meters read."""
        widths = widths_of(groups)
        return Entry(
            step=step,
            widths=widths,
            seconds=self.account.seconds,
            reason=reason,
            spent={name: self.limits.expected(name, widths) for name in self.costs},
            metered=dict(self.readings),
            predicted={name: self.costs[name].total(before) for name in self.readings},
            reference=self.limits.references(plan.reference) if plan else {},
            limit=self.limits.asked,
            spent_run=self.spent_run,
            price=self.limits.prices(plan.price, before) if plan else {},
            own_seconds=self.account.seconds_since_entry(),
        )

    # What the whole run may spend. All of it is empty where no budget is one of the run.

    @property
    def _runs(self) -> dict[str, RunBudget]:
        budgets = [budget for budget in self.budgets if budget.per == "run"]
        if not budgets:
            return {}
        from setpoint.spending.run_budget import RunBudget

        dense = self.limits.dense_cost
        return {budget.resource: RunBudget(budget, self.schedule, dense(budget.resource)) for budget in budgets}

    @property
    def limit_run(self) -> dict[str, float]:
        """By resource of a run budget, what the whole run may spend."""
        if self._fixed_total is not None:
            return {"flops": self._fixed_total.limit(self._total_steps)}
        return {name: run.limit(self.planned_steps) for name, run in self._runs.items()}

    @property
    def spent_run(self) -> dict[str, float]:
        """By resource of a run budget, what was spent from `attach` to the last optimizer step, overhead included.

        Joules are those of the meter's last reading and as predicted from there on, or the user's watts times seconds.
        """
        account, watts = self.account, self.meter.watts
        run_j = watts * account.run_seconds if watts else account.run_j
        found = {"flops": account.train_flops, "latency": account.run_seconds, "energy": run_j}
        return {name: found[name] for name in self.limit_run}

    def replan(self, step: int, widths: Mapping[str, int]) -> None:
        """Find what budgets of the run leave for each step now; warn once of one that cannot be met."""
        self.read_joules(widths)
        per_step = dict(self.limits.per_step)
        for name, state in self._states(step, widths).items():
            per_step[name] = self._runs[name].per_step(state)
            limit, lowest, reported = self.limit_run[name], state.forecast(state.lowest), f"{name} of the run"
            if 0 < step < self.planned_steps and lowest > limit and reported not in self._warned:
                self._warned.add(reported)
                warn(
                    f"the budget of {amount(limit, name)} for the run cannot be met any more: "
                    f"{amount(state.spent, name)} was spent by step {step}, and with the narrowest model it would come "
                    f"to {amount(lowest, name)}"
                )
        self.limits = replace(self.limits, per_step=per_step)

    def over(self, step: int, widths: Mapping[str, int]) -> bool:
        """Whether meters say that the run will be over its budget at these widths."""
        if not self._runs.keys() & set(METERED):
            return False
        with self.account.watch.deciding:
            before = self.readings, self._known
            self.read_meters(widths)
            self.readings, self._known = before  # those of the last decision stand in its entry
            self.replan(step, widths)
            states = self._states(step, widths)
            return any(state.forecast(state.present) > self.limit_run[name] for name, state in states.items())

    def spare_flops(self, step: int, widths: Mapping[str, int]) -> float:
        """FLOPs that a budget of the run leaves for other things than steps, until the next decision."""
        runs, states = self._runs, self._states(step, widths)
        return runs["flops"].spare(states["flops"]) if "flops" in runs else math.inf

    def _states(self, step: int, widths: Mapping[str, int], num_steps: int | None = None) -> dict[str, RunState]:
        """By resource of a run budget, what is known of the run at this step if it has `num_steps`.

        Of FLOPs, a controller that learns spends some on the decision at hand. Of seconds, the user's own code between
        steps is taken to go on as it did so far; of joules, where they are watts times seconds, likewise.
        """
        runs, account, learning = self._runs, self.account, self._learning
        if not runs:  # a plain run asks at every decision, and copies no group for it
            return {}
        from setpoint.spending.run_budget import RunState

        num_steps = self.planned_steps if num_steps is None else num_steps
        groups = tuple(replace(group, num_units=widths[group.name]) for group in self.limits.groups)

        def learning_flops(ahead: int) -> float:
            left = account.share_left(_LEARNING_SHARE, account.learning_flops, ahead)
            return 0.0 if learning is None else learning.flops(groups, max(0.0, left))

        between = max(0, num_steps - step) * account.extra_seconds_per_step
        coming = {"flops": learning_flops(0), "latency": between, "energy": between * self.meter.watts}
        spent, states = self.spent_run, dict[str, RunState]()
        for name in runs:
            states[name] = RunState(
                step,
                num_steps,
                spent[name],
                spent[name] + coming[name],
                present=self.limits.expected(name, widths),
                lowest=self.limits.expected(name, self.limits.narrowest),
                factor=self.limits.factor(name),
                regrows=self._regrows,
            )
        if "flops" in states:  # a meter's readings have the overhead in them
            states["flops"] = replace(states["flops"], sensing=account.sensing_flops, learning=learning_flops)
        return states

    # What is remembered.

    def state_dict(self) -> dict[str, Any]:
        return {
            "account": self.account.state_dict(),
            "metered": dict(self.readings),
            "metering": self.meter.state_dict(),
            "limits": self.limits.state_dict(),
            **({"plan": asdict(self._plan)} if self._plan is not None else {}),
        }

    def check(self, state: Mapping[str, Any]) -> None:
        """Load a state on trial, before anything is changed."""
        trial = copy.copy(self)  # limits and plan are values: only what changes in place is copied
        trial.account, trial.meter = copy.deepcopy(self.account), copy.copy(self.meter)
        trial.load_state_dict(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.account.load_state_dict(state["account"])
        self.limits = self.limits.restored(state["limits"])
        self.meter.load_state_dict(state["metering"])
        if self._plan is not None:
            self._plan = self._plan.restored(state["plan"])
        self.readings = {str(name): float(value) for name, value in state["metered"].items()}
