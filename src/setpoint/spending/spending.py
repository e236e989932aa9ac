"""The spending of a run: what it is held to, what it has spent, and what that leaves for the steps to come."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from setpoint.controller.plan import Controller, Observation
from setpoint.cost.budget import METERED, Budget
from setpoint.groups.group import Group, widths_of
from setpoint.messages import warn
from setpoint.sensor.reading import Reading
from setpoint.spending.account import Account
from setpoint.spending.limits import Limits
from setpoint.spending.meter import Meter

if TYPE_CHECKING:  # most runs have no budget of the whole run, and never load it
    from setpoint.spending.run_budget import RunBudget


class Spending:
    """What a run is held to, what it has spent, and what meters read of it. It changes at every step."""

    def __init__(
        self,
        limits: Limits,
        *,
        total_steps: int,  # as the user said it; a bill that is a fraction is one of a dense run of so many steps
        account: Account,
        meter: Meter,
        controller: Controller[Any],
        single_process: bool,
        modelled: Mapping[str, str],  # by resource, what the cost was modelled by
        check_kind: Callable[[Sequence[Budget]], None],  # refuses budgets that a run of this kind cannot meet
        bill: Budget | None,  # FLOPs of the whole run where there are budgets per step, too; it fixes its length
    ) -> None:
        self.limits, self.costs, self.dense_widths = limits, limits.costs, limits.dense_widths
        self.account, self.meter, self.schedule = account, meter, controller.conduct.schedule
        self.modelled, self.check_kind = modelled, check_kind
        self.total_steps, self._controller, self._single_process = total_steps, controller, single_process
        self.readings: dict[str, float] = {}  # of meters at the last decision, by resource
        self._warned = set[str]()
        self._known: Mapping[str, float] = {}  # what meters have told the controller of a step
        self.bill = None
        if bill is not None:
            from setpoint.spending.run_budget import Bill

            self.bill = Bill(bill, self.schedule, bill.absolute(limits.dense_cost("flops") * total_steps))
        self.hold(limits.budgets, limits.groups)

    @property
    def planned_steps(self) -> int:
        """Decisions fall as in a run of so many steps."""
        return self.total_steps if self.bill is None else self.bill.decisions_as

    @property
    def run_steps(self) -> int:
        """How many optimizer steps the run has: `planned_steps`, but with a bill what that pays for."""
        return self.total_steps if self.bill is None else self.bill.length

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """The budgets but for the bill; none where a price or a tolerance is followed."""
        return self.limits.budgets

    def hold(self, budgets: Sequence[Budget], groups: tuple[Group, ...]) -> None:
        self.limits = self.limits.held_to(budgets)
        if self.bill is not None:
            self.bill = self.bill.anew().decided(self.limits, self.account, groups, met=False)

    def stepped(self) -> None:
        self.account.stepped()
        self.meter.stepped()
        if self.bill is not None:
            self.bill = self.bill.stepped(self.account, learn=self._single_process)

    def prepare(self, due: bool) -> None:
        """The next step begins: on the clock, unless it is watched for its bytes, as before a decision (`due`)."""
        if not self.meter.prepare(due):
            self.meter.steps.begin()

    def read_meters(self, widths: Mapping[str, int]) -> None:
        """Take in what meters read at these widths, before a decision."""
        self.meter.read_clocks(widths)
        self.readings = dict(self.meter.read().values)
        self.limits, self._known = self.meter.corrected(self.limits, widths)

    def resized(self, groups: tuple[Group, ...], sensing_flops: float) -> None:
        """The model has other widths, at which a sensing has these FLOPs."""
        self.account.sensing_flops = sensing_flops
        self.account.resized(self.costs["flops"].total(widths_of(groups)))
        self.meter.cut()

    def decided(self, groups: tuple[Group, ...], met: bool) -> None:
        """After a decision; none follows once the budgets per step are met."""
        self.read_joules(widths_of(groups))
        if self.bill is not None:
            self.bill = self.bill.decided(self.limits, self.account, groups, met=met)

    def read_joules(self, widths: Mapping[str, int]) -> None:
        """Have the account go by the meter: joules of the run as read, those of the steps to come as expected."""
        if self.limits.is_per_run("energy"):
            run_j = self.meter.read().run_j
            self.account.run_j = self.account.run_j if run_j is None else run_j
            self.account.step_j = self.limits.expected("energy", widths)

    # What is known.

    def observation(self, step: int, groups: tuple[Group, ...], reading: Reading | None, **others: Any) -> Observation:
        """What a controller sees at a decision; `others` are more of its fields, such as the loss."""
        widths = widths_of(groups)
        runs = self.replan(step, widths)
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
            ceiling={name: run.ceiling() for name, run in runs.items()},
            remaining={name: run.remaining() for name, run in runs.items()},
            learning_flops=self.account.learning_left(),
            **others,
        )

    # What the whole run may spend. All of it is empty where no budget is one of the run.

    @property
    def limit_run(self) -> dict[str, float]:
        """By resource of a run budget, what the whole run may spend."""
        if self.bill is not None:
            return {"flops": self.bill.total}
        runs = (budget for budget in self.budgets if budget.per == "run")
        return {b.resource: b.absolute(self.limits.dense_cost(b.resource) * self.planned_steps) for b in runs}

    @property
    def spent_run(self) -> dict[str, float]:
        """By resource of a run budget, what was spent from `attach` to the last optimizer step, overhead included.

        Joules are those of the meter's last reading and as predicted from there on, or the user's watts times seconds.
        """
        account, watts = self.account, self.meter.watts
        run_j = watts * account.run_seconds if watts else account.run_j
        found = {"flops": account.train_flops, "latency": account.run_seconds, "energy": run_j}
        return {name: found[name] for name in self.limit_run}

    def replan(self, step: int, widths: Mapping[str, int]) -> dict[str, RunBudget]:
        """Find what budgets of the run leave for each step now; warn once of one that cannot be met."""
        self.read_joules(widths)
        runs = self.runs(step, widths)
        for name, run in runs.items():
            if name not in self._warned and (missed := run.missed()):
                self._warned.add(name)
                warn(missed)
        per_step = {name: run.per_step() for name, run in runs.items()}
        self.limits = replace(self.limits, per_step={**self.limits.per_step, **per_step})
        return runs

    def over(self, step: int, widths: Mapping[str, int]) -> bool:
        """Whether meters say that the run will be over its budget at these widths."""
        if not any(self.limits.is_per_run(name) for name in METERED):
            return False
        with self.account.watch.deciding:
            self.meter.read_clocks(widths)
            self.limits, _ = self.meter.corrected(self.limits, widths)
            runs = self.replan(step, widths)
            return any(run.forecast(run.present) > run.limit for run in runs.values())

    def runs(self, step: int, widths: Mapping[str, int], num_steps: int | None = None) -> dict[str, RunBudget]:
        """By resource of a run budget, that budget as it stands at this step of a run of `num_steps`."""
        if all(budget.per == "step" for budget in self.budgets):
            return {}
        from setpoint.spending.run_budget import run_budgets

        num_steps = self.planned_steps if num_steps is None else num_steps
        return run_budgets(
            self.limits, self.account, self._controller, self.spent_run, step, num_steps, widths, self.meter.watts
        )

    # What is remembered.

    def state_dict(self) -> dict[str, Any]:
        return {
            "account": self.account.state_dict(),
            "metered": dict(self.readings),
            "metering": self.meter.state_dict(),
            "limits": self.limits.state_dict(),
            **({"plan": self.bill.state_dict()} if self.bill is not None else {}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.account.load_state_dict(state["account"])
        self.limits = self.limits.restored(state["limits"])
        self.meter.load_state_dict(state["metering"])
        if self.bill is not None:
            self.bill = self.bill.restored(state["plan"])
        self.readings = {str(name): float(value) for name, value in state["metered"].items()}
