"""The spending of a run: what it is held to, what it has spent, and what that leaves for the steps to come."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from setpoint.controller.plan import Learning, Observation, Plan
from setpoint.controller.schedule import Schedule
from setpoint.cost.budget import Budget
from setpoint.cost.cost import Cost
from setpoint.groups.group import Group, widths_of
from setpoint.ledger import Entry
from setpoint.sensor.reading import Reading
from setpoint.spending.account import Account
from setpoint.spending.bill import Bill, Paying
from setpoint.spending.meter import Meter
from setpoint.spending.no_runs import NoRuns
from setpoint.spending.runs import LEARNING_SHARE, Runs
from setpoint.spending.target import Target


class Spending:
    """What a run is held to, what it has spent, and what meters read of it.

    `runs` knows what budgets of the whole run leave for each step; the limits in `target` follow from that.

    Args:
        costs: by resource, over the widths of `groups`; always "flops" and "params".
        groups: at dense widths.
        alone: whether one process trains: of several each has a clock of its own, and all must decide alike.
        regrows: whether units come back until the schedule is over.
        modelled: by resource, what the cost was modelled by.
        check: refuses budgets that a run of this kind cannot meet.
        bill: what the run may spend beside budgets per step, which fixes its length.
    """

    def __init__(
        self,
        target: Target,
        costs: Mapping[str, Cost],
        groups: tuple[Group, ...],
        *,
        total_steps: int,
        schedule: Schedule,
        sensing_flops: float,
        account: Account,
        meter: Meter,
        alone: bool = True,
        regrows: bool = False,
        learning: Learning | None = None,
        modelled: Mapping[str, str] | None = None,
        check: Callable[[Sequence[Budget]], None] = lambda budgets: None,
        bill: Bill | None = None,
    ) -> None:
        self.costs, self.planned_steps, self.schedule = costs, total_steps, schedule
        self.account, self.meter, self.modelled = account, meter, modelled or {}
        self.sensing, self.deciding, self.resizing = account.sensing, account.deciding, account.resizing
        self.probing, self.probed, self.stop = account.probing, account.probed, meter.stop
        self.dense_widths, self.check_kind, self._alone, self.bill = widths_of(groups), check, alone, bill
        self.account.sensing_flops, self.readings, self._known = sensing_flops, dict[str, float](), dict[str, float]()
        self.runs: NoRuns | Runs | Paying = NoRuns()
        runs = partial(Runs, account, meter, groups, schedule, regrows, learning, set[str]())
        self._runs = partial(Paying, bill, account, schedule, self.dense_widths, alone) if bill else runs
        self.hold(target, groups)

    def hold(self, target: Target, groups: tuple[Group, ...]) -> None:
        """Be held to these budgets from here on, with these groups."""
        make = self.runs.held_to if isinstance(self.runs, Paying) else self._runs
        self.target, self.runs = target, make(target) if self.bill or target.runs else NoRuns()
        self.planned_steps = self.runs.planned(self.planned_steps, groups)

    @property
    def run_steps(self) -> int:
        """Optimizer steps of the whole run; with a bill it changes, and decisions fall as in `planned_steps` steps."""
        return self.runs.length(self.planned_steps)

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """The budgets; none where a price or a tolerance is followed."""
        return self.target.budgets

    @property
    def cost(self) -> Cost:
        """What the controller is to hold."""
        return self.target.cost

    @property
    def limits(self) -> dict[str, float]:
        """What the controller is to hold, by resource."""
        return self.target.limits

    def facts(self) -> dict[str, Any]:
        """What must be the same in two runs of which one goes on with the other, and on all ranks of one run."""
        dense, bills = self.target.dense, (self.bill.budget,) if self.bill else ()
        return {
            "dense": {name: dense[name] for name in ("flops", "params")},  # others are fitted to this machine
            "budgets": [
                (each.resource, float(each.limit), each.per, each.relative) for each in (*self.budgets, *bills)
            ],
            "total_steps": self.bill.total_steps if self.bill else self.planned_steps,
        }

    def binding(self, widths: Mapping[str, int]) -> str:
        """Resource of the budget that leads."""
        return self.target.binding(widths)

    def price(self, plan: Plan | None, widths: Mapping[str, int]) -> float:
        """Price of a plan for a unit of the budget that leads; 0 without one."""
        prices = self.target.prices(plan.price, widths) if plan else {}
        return float(prices.get(self.binding(widths), 0.0))

    @property
    def header(self) -> dict[str, Any]:
        """What a ledger says of spending before its first entry."""
        dense = {name: self.target.dense_cost(name) for name in self.costs}
        limit = {each.resource: each.absolute(dense[each.resource]) for each in self.budgets}
        return {
            "dense": dense,
            "limit": {name: value for name, value in limit.items() if name not in self.target.runs},
            "limit_run": self.limit_run,
            "total_steps": self.planned_steps,
            "modelled": dict(self.modelled),
            "measured": dict(self.meter.sources),
        }

    def begin(self) -> None:
        """The first step begins."""
        self.account.running.__enter__()
        self.account.steps.begin()

    def stepped(self) -> None:
        """An optimizer step is done."""
        self.account.stepped()
        self.meter.stepped()
        self.planned_steps = self.runs.stepped(self.planned_steps)

    def sensed(self) -> None:
        """The gradients of a step were read."""
        self.account.sensed(self.account.sensing_flops)

    def learned(self, flops: float) -> None:
        """The controller has spent FLOPs on learning."""
        self.account.sensed(flops)
        self.account.learning_flops += flops

    def recompiled(self, seconds: float, count: int) -> None:
        """Code was compiled again because sizes had changed."""
        self.account.recompiles += count
        self.account.recompiling_seconds += seconds

    def resized(self, groups: tuple[Group, ...], sensing_flops: float) -> None:
        """The model has other widths: a step and a sensing cost something else from here on."""
        self.account.sensing_flops = sensing_flops
        self.account.resized(self.costs["flops"].total(widths_of(groups)))
        self.meter.cut()

    def decided(self, groups: tuple[Group, ...], met: bool) -> None:
        """A decision is made, the last one where the budgets per step are met: what is left is planned afresh."""
        self.runs.read_joules(widths_of(groups))
        self.planned_steps = self.runs.planned(self.planned_steps, groups, met)

    def prepare(self, due: bool) -> None:
        """The next step begins: on the clock, unless it is watched for its bytes, as before a decision (`due`)."""
        self.meter.prepare(due)
        if not self.meter.watching:
            self.meter.steps.begin()

    # What is known at a decision.

    def metered(self, widths: Mapping[str, int]) -> None:
        """Take in what meters read at these widths."""
        self.readings, self._known = self._take_in(widths)

    def _take_in(self, widths: Mapping[str, int]) -> tuple[dict[str, float], dict[str, float]]:
        self.account.sensed(self.meter.time_inference(widths))
        return self.target.take_in(widths)

    def observation(self, step: int, groups: tuple[Group, ...], reading: Reading | None, **others: Any) -> Observation:
        """Everything that a controller sees at a decision, what the rest of the run may spend found afresh.

        `others` is what is known besides, such as the loss, by name of the observation's fields.
        """
        widths, account = widths_of(groups), self.account
        self.replan(step, widths)
        return Observation(
            step=step,
            planned_steps=self.planned_steps,
            widths=widths,
            dense_widths=self.dense_widths,
            reading=reading,
            dense=self.target.dense,
            limit=self.target.limits,
            spent={name: cost.total(widths) for name, cost in self.costs.items()},
            metered=self._known,
            seconds_per_step=account.steps.seconds_per_step if self._alone else None,
            seconds_per_resize=account.resizing.last_seconds if account.resizes and self._alone else None,
            most=self.runs.most(step, self.planned_steps, widths),
            rest=self.runs.rest(step, self.planned_steps, widths),
            learning_flops=max(0.0, account.share_left(LEARNING_SHARE, account.learning_flops)),
            **others,
        )

    def replan(self, step: int, widths: Mapping[str, int]) -> None:
        """Find afresh what budgets of the whole run leave for each step."""
        self.runs.replan(step, self.planned_steps, widths)

    def expected(self, name: str, widths: Mapping[str, int]) -> float:
        """Cost of a step at these widths, by all that is known."""
        return self.target.expected(name, widths)

    @property
    def limit_run(self) -> dict[str, float]:
        """By resource of a run budget, what the whole run may spend."""
        return self.runs.limit(self.planned_steps)

    def spare_flops(self, step: int, widths: Mapping[str, int]) -> float:
        """FLOPs that a budget of the run leaves for other things than steps, until the next decision."""
        return self.runs.spare_flops(step, self.planned_steps, widths)

    def over(self, step: int, widths: Mapping[str, int]) -> bool:
        """Whether meters say that the run will be over its budget at these widths."""
        if not self.runs.metered:
            return False
        with self.deciding:
            self._take_in(widths)
            return self.runs.over(step, self.planned_steps, widths)

    def entry(
        self, step: int, plan: Plan | None, groups: tuple[Group, ...], before: Mapping[str, int], reason: str
    ) -> Entry:
        """An entry on the present widths; `plan` is the last one, `before` are the widths that the meters read."""
        target, account, widths = self.target, self.account, widths_of(groups)
        spent = {name: self.expected(name, widths) for name in self.costs}
        reference = target.references(plan.reference) if plan else {}
        return Entry(
            step=step,
            widths=widths,
            seconds=account.seconds,
            reason=reason,
            spent=spent,
            metered=dict(self.readings),
            predicted={name: self.costs[name].total(before) for name in self.readings},
            reference=reference,
            limit=target.limit,
            spent_run=self.runs.spent(),
            error={name: spent[name] / value - 1.0 for name, value in reference.items() if name in spent and value > 0},
            price=target.prices(plan.price, before) if plan else {},
            deciding_seconds=account.deciding.last_seconds,
            resizing_seconds=account.resizing.last_seconds if plan is not None and plan.step == step else 0.0,
            **account.news(),
        )

    def state_dict(self) -> dict[str, Any]:
        """All that was spent, read and learnt so far, in plain numbers."""
        return {
            "account": self.account.state_dict(),
            "metered": dict(self.readings),
            "metering": self.meter.state_dict(),
            "target": self.target.state_dict(),
            **({"bill": self.runs.state_dict()} if self.bill else {}),
        }

    def check(self, state: Mapping[str, Any]) -> None:
        """Load a state on trial, before anything is changed."""
        trial = copy.copy(self)
        trial.account, trial.target = copy.deepcopy(self.account), copy.copy(self.target)
        trial.meter, trial.runs = copy.copy(self.meter), copy.copy(self.runs)
        trial.load_state_dict(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.account.load_state_dict(state["account"])
        self.target.load_state_dict(state["target"])
        self.meter.load_state_dict(state["metering"])
        if self.bill:
            self.runs.load_state_dict(state["bill"])
            self.planned_steps = int(state["bill"]["planned"])
        self.readings = {str(name): float(value) for name, value in state["metered"].items()}
