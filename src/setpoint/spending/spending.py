"""The spending of a run: what it is held to, what it has spent, and what that leaves for the steps to come."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from setpoint.controller.horizon import RunRest, next_decision
from setpoint.controller.ladder import lowest_width
from setpoint.controller.plan import Learning, Observation, Plan
from setpoint.controller.reference import Reference
from setpoint.controller.selection import cheapest
from setpoint.cost.budget import METERED, Budget, amount
from setpoint.cost.cost import Cost
from setpoint.entry import Entry
from setpoint.errors import BudgetError, LoopError
from setpoint.groups.group import Group, widths_of
from setpoint.sensor.reading import Reading
from setpoint.sensor.stride import sensed_every
from setpoint.spending.account import Account
from setpoint.spending.break_even import break_even_step
from setpoint.spending.meter import Meter
from setpoint.spending.target import Target, check_budgets, check_reachable

_LEARNING_SHARE = 0.01
"""A controller that learns never takes more than this share of the FLOPs of the steps so far."""


class Spending:
    """What a run is held to, what it has spent, and what meters read of it.

    Args:
        target: the budgets.
        costs: by resource, over the widths of `groups`; always "flops" and "params".
        groups: at dense widths.
        total_steps: of the run.
        schedule: when decisions are made.
        sensing_flops: of one sensing.
        account: counts FLOPs and seconds.
        meter: reads what steps take.
        alone: whether one process trains: of several each has a clock of its own, and all must decide alike.
        regrows: whether units come back until the schedule is over.
        learning: the controller, if it learns.
        modelled: by resource, what the cost was modelled by.
        check: refuses budgets that a run of this kind cannot meet.
    """

    def __init__(
        self,
        target: Target,
        costs: Mapping[str, Cost],
        groups: tuple[Group, ...],
        *,
        total_steps: int,
        schedule: Reference,
        sensing_flops: float,
        account: Account,
        meter: Meter,
        alone: bool = True,
        regrows: bool = False,
        learning: Learning | None = None,
        modelled: Mapping[str, str] | None = None,
        check: Callable[[Sequence[Budget]], None] = lambda budgets: None,
    ) -> None:
        self.target, self.costs, self.total_steps, self.schedule = target, costs, total_steps, schedule
        self.account, self.meter = account, meter
        self.sensing, self.deciding = account.sensing, account.deciding
        self.resizing, self.probing = account.resizing, account.probing
        self.sensing_flops, self.readings = sensing_flops, dict[str, float]()
        self._told: dict[str, float] = {}
        self._groups, self._dense_widths = groups, widths_of(groups)
        self._narrowest = {group.name: lowest_width(group) for group in groups}
        self._alone, self._regrows, self._learning, self._check = alone, regrows, learning, check
        self._modelled = modelled or {}
        self._reported: set[str] = set()

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

    @property
    def resizes(self) -> int:
        """How often the model has changed its widths."""
        return self.account.resizes

    @property
    def probing_flops(self) -> float:
        """FLOPs that resting units have added to steps."""
        return self.account.probing_flops

    @property
    def peak_wanted(self) -> bool:
        """Whether a step's bytes can be read, and none has been since the last cut."""
        return self.meter.peak_wanted

    @property
    def peak_known(self) -> bool:
        """Whether a step's bytes have been read since the last cut."""
        return self.meter.peak_known

    def facts(self) -> dict[str, Any]:
        """What must be the same in two runs of which one goes on with the other, and on all ranks of one run."""
        dense = self.target.dense
        return {
            "dense": {name: dense[name] for name in ("flops", "params")},  # others are fitted to this machine
            "budgets": [(each.resource, float(each.limit), each.per, each.relative) for each in self.budgets],
            "total_steps": self.total_steps,
        }

    def binding(self, widths: Mapping[str, int]) -> str:
        """Resource of the budget that leads."""
        return self.target.binding(widths)

    def price(self, plan: Plan | None, widths: Mapping[str, int]) -> float:
        """Price of a plan for a unit of the budget that leads; 0 without one."""
        prices = self.target.prices(plan.price, widths) if plan else {}
        return float(prices.get(self.binding(widths), 0.0))

    def share_left(self, share: float, used: float) -> float:
        """What is left of a share of the steps' FLOPs so far, of which some have been used."""
        return share * (self.account.train_flops - self.account.overhead_flops) - used

    @property
    def header(self) -> dict[str, Any]:
        """What a ledger says of spending before its first entry."""
        dense = {name: cost.total(self._dense_widths) for name, cost in self.costs.items()}
        limit = {each.resource: each.absolute(dense[each.resource]) for each in self.budgets}
        return {
            "dense": dense,
            "limit": {name: value for name, value in limit.items() if name not in self.target.runs},
            "limit_run": self.limit_run,
            "total_steps": self.total_steps,
            "modelled": dict(self._modelled),
            "measured": dict(self.meter.sources),
        }

    # What happens.

    def begin(self) -> None:
        """The first step begins."""
        self.account.begin()

    def stepped(self) -> None:
        """An optimizer step is done."""
        self.account.stepped()
        self.meter.stepped()

    def sensed(self) -> None:
        """The gradients of a step were read."""
        self.account.sensed(self.sensing_flops)

    def learned(self, flops: float) -> None:
        """The controller has spent FLOPs on learning."""
        self.account.learned(flops)

    def probed(self, flops: float) -> None:
        """Resting units add FLOPs to the step under way."""
        self.account.probed(flops)

    def recompiled(self, seconds: float, count: int) -> None:
        """Code was compiled again because sizes had changed."""
        self.account.recompiled(seconds, count)

    def resized(self, groups: tuple[Group, ...], sensing_flops: float) -> None:
        """The model has other widths: a step and a sensing cost something else from here on."""
        self.sensing_flops = sensing_flops
        self.account.resized(self.costs["flops"].total(widths_of(groups)))
        self.meter.cut()

    def prepare(self, due: bool) -> None:
        """The next step begins: on the clock, unless it is watched for its bytes, as before a decision (`due`)."""
        self.meter.prepare(due)
        if not self.meter.watching:
            self.meter.steps.begin()

    def stop(self) -> None:
        """End what watches a step; may be called again."""
        self.meter.stop()

    # What is known at a decision.

    def metered(self, widths: Mapping[str, int]) -> None:
        """Take in what meters read at these widths."""
        self.readings, self._told = self._take_in(widths)

    def _take_in(self, widths: Mapping[str, int]) -> tuple[dict[str, float], dict[str, float]]:
        self.account.sensed(self.meter.time_inference(widths))
        return self.target.take_in(widths)

    def observation(self, step: int, groups: tuple[Group, ...], reading: Reading | None, **others: Any) -> Observation:
        """Everything that a controller sees at a decision, what the rest of the run may spend found afresh.

        Args:
            step: optimizer steps done.
            groups: at their present widths.
            reading: of every active unit.
            others: what is known besides, such as the loss, by name of the observation's fields.
        """
        widths, account = widths_of(groups), self.account
        self.replan(step, widths)
        return Observation(
            step=step,
            total_steps=self.total_steps,
            widths=widths,
            dense_widths=self._dense_widths,
            reading=reading,
            dense=self.target.dense,
            limit=self.target.limits,
            spent={name: cost.total(widths) for name, cost in self.costs.items()},
            metered=self._told,
            seconds_per_step=account.steps.seconds_per_step if self._alone else None,
            seconds_per_resize=account.resizing.last_seconds if account.resizes and self._alone else None,
            most=self._most(step, widths),
            rest=self._rest(step, widths),
            learning_flops=self._learning_allowance(),
            **others,
        )

    def replan(self, step: int, widths: Mapping[str, int]) -> None:
        """Find afresh what budgets of the whole run leave for each step; one that cannot be met is warned of once."""
        self.read_joules(widths)
        self.target.replan(step, self.total_steps, spent=self._committed(step, widths), widths=widths)
        least = self._forecast(step, self._narrowest)
        for name, limit in self.limit_run.items():
            if 0 < step < self.total_steps and least[name] > limit and name not in self._reported:
                self._reported.add(name)
                warnings.warn(
                    f"the budget of {amount(limit, name)} for the run cannot be met any more: "
                    f"{amount(self.spent_run[name], name)} went by step {step}, and with the narrowest model it would "
                    f"come to {amount(least[name], name)}",
                    stacklevel=2,
                )

    def expected(self, name: str, widths: Mapping[str, int]) -> float:
        """Cost of a step at these widths, by all that is known."""
        return self.target.expected(name, widths)

    # What a whole run spends.

    @property
    def limit_run(self) -> dict[str, float]:
        """By resource of a run budget, what the whole run may spend."""
        return {name: run.limit(self.total_steps) for name, run in self.target.runs.items()}

    @property
    def spent_run(self) -> dict[str, float]:
        """By resource of a run budget, what has been spent from the call of `attach` to the last optimizer step.

        Overhead is included: FLOPs as they are counted, seconds by the clock, joules by the meter at its last reading
        and as predicted from there on. Joules by the user's watts are those times the seconds of the run.
        """
        account, watts = self.account, self.meter.watts
        run_j = watts * account.run_seconds if watts else account.run_j
        found = {"flops": account.train_flops, "latency": account.run_seconds, "energy": run_j}
        return {name: found[name] for name in self.target.runs}

    def _committed(self, step: int, widths: Mapping[str, int]) -> dict[str, float]:
        """By resource of a run budget, what has been spent, and what will be besides optimizer steps.

        Of FLOPs that is what a controller that learns spends on the decision at hand. Of seconds it is what the user's
        own code has taken between steps so far, step for step; of joules, where they are watts times seconds, likewise.
        """
        if not self.target.runs:
            return {}
        seconds = max(0, self.total_steps - step) * self.account.extra_seconds_per_step
        besides = {
            "flops": self._learning_flops(widths),
            "latency": seconds,
            "energy": seconds * self.meter.watts,
        }
        return {name: value + besides[name] for name, value in self.spent_run.items()}

    def _forecast(self, step: int, widths: Mapping[str, int]) -> dict[str, float]:
        """By resource of a run budget, what the run will have spent if the model has these widths from now on."""
        left, spent = max(0, self.total_steps - step), self._committed(step, widths)
        return {name: value + left * self.expected(name, widths) for name, value in spent.items()}

    def _learning_allowance(self, num_steps: int = 0) -> float:
        """FLOPs that may go into learning so many steps from now: a share of those of the steps, less what went."""
        account = self.account
        steps = account.train_flops - account.overhead_flops + num_steps * account.step_flops
        return max(0.0, _LEARNING_SHARE * steps - account.learning_flops)

    def _learning_flops(self, widths: Mapping[str, int], num_steps: int = 0) -> float:
        """FLOPs that a decision at these widths spends on learning at the most, so many steps from now."""
        if self._learning is None:
            return 0.0
        groups = tuple(replace(group, num_units=widths[group.name]) for group in self._groups)
        return self._learning.flops(groups, self._learning_allowance(num_steps))

    def _overhead_to_come(self, step: int, widths: Mapping[str, int], *, deciding: bool) -> float:
        """FLOPs that go besides steps from here to the landing at the latest: on sensing, and on one more decision.

        After one that spends more than is left the narrowest model is all that a budget of the run allows, and for that
        nothing is learned. At a decision that can land (`deciding`: one is made at this step), nothing goes any more.
        """
        if "flops" not in self.target.runs:
            return 0.0
        times, total_steps = self.schedule, self.total_steps

        def lands(at: int) -> bool:
            open_still = self._regrows and not times.final(at, total_steps)
            return times.settled(at, total_steps) and not open_still

        if deciding and lands(step):
            return 0.0
        due = (at for at in range(step + 1, total_steps) if times.due(at, total_steps))
        landing = next((at for at in due if lands(at)), total_steps)
        num_sensed = -(-(landing - step) // sensed_every(total_steps))
        return num_sensed * self.sensing_flops + self._learning_flops(widths, landing - step)

    def _most(self, step: int, widths: Mapping[str, int], *, deciding: bool = True) -> dict[str, float]:
        """By resource of a run budget, the most that a step may cost from this decision to the next."""
        spent, besides = self._committed(step, widths), self._overhead_to_come(step, widths, deciding=deciding)
        return {
            name: run.most(
                step,
                self.total_steps,
                spent=spent[name],
                cheapest=self.expected(name, self._narrowest),
                besides=besides if name == "flops" else 0.0,  # what a meter reads has them in it
            )
            for name, run in self.target.runs.items()
        }

    def _rest(self, step: int, widths: Mapping[str, int]) -> dict[str, RunRest]:
        """By resource of a run budget, what is left of it, and what else it is spent on."""
        spent, every = self._committed(step, widths), sensed_every(self.total_steps)
        found = {}
        for name, run in self.target.runs.items():
            rest = RunRest(
                run.limit(self.total_steps), spent[name], run.schedule, run.margin, factor=self.target.factor(name)
            )
            if name == "flops":  # what a meter reads has all else in it
                deciding = self._learning_flops(widths)
                growth = self._learning_flops(widths, num_steps=1) - deciding  # of what learning may take, per step
                rest = replace(
                    rest,
                    ahead=self.sensing_flops if every > 1 else 0.0,
                    later=self._overhead_to_come(step, widths, deciding=False),
                    sensing=self.sensing_flops / every + growth,
                    deciding=deciding,
                )
            found[name] = rest
        return found

    def spare_flops(self, step: int, widths: Mapping[str, int]) -> float:
        """FLOPs that a budget of the run leaves for other things than steps, until the next decision."""
        if "flops" not in self.target.runs or step >= self.total_steps:
            return math.inf
        most = self._most(step, widths, deciding=False)["flops"]
        coming = next_decision(self.schedule, step, self.total_steps)
        return (most - self.expected("flops", widths)) * (coming - step)

    def read_joules(self, widths: Mapping[str, int]) -> None:
        """Set the account's joules to what the meter reads now, and those of a step to come to what is expected."""
        if "energy" in self.target.runs:
            run_j = self.meter.run_j()
            self.account.run_j = self.account.run_j if run_j is None else run_j
            self.account.step_j = self.expected("energy", widths)

    def over(self, step: int, widths: Mapping[str, int]) -> bool:
        """Whether meters say that the run will be over its budget at these widths."""
        if not self.target.runs.keys() & set(METERED):
            return False
        with self.deciding:
            self._take_in(widths)
            self.replan(step, widths)
            coming = self._forecast(step, widths)
        return any(coming[name] > limit for name, limit in self.limit_run.items())

    # What the user changes.

    def check_open(self, step: int, *, landed: bool) -> None:
        """Check that the budget may still be changed.

        Raises:
            LoopError: after the landing or the freeze, or where there is no budget.
        """
        if not self.budgets:
            raise LoopError(
                "this loop follows a Price or a Tolerance: it has no budget to change, attach with a Budget"
            )
        if landed or self.schedule.final(step, self.total_steps):
            raise LoopError(
                f"the budget is frozen at step {step}: it may be changed until the landing, "
                f"by {self.schedule.land:.0%} of the run at the latest. Finish this loop and attach a new one"
            )

    def take(self, other: Spending) -> None:
        """Go on with the budgets and the length of another one of the same run."""
        self.target, self.total_steps = other.target, other.total_steps

    def with_budget(self, budget: Budget | Sequence[Budget], groups: tuple[Group, ...], step: int) -> Spending:
        """The same run with another budget.

        Raises:
            BudgetError: when it cannot be met, or is on a resource that this run does not know.
        """
        budgets = check_budgets(budget)
        self._check(budgets)
        metered = {each.resource for each in self.budgets} & set(METERED)
        for each in budgets:
            if each.resource not in self.costs or (each.resource in METERED and each.resource not in metered):
                raise BudgetError(
                    f"{each.resource!r} was not costed out when this loop was attached: "
                    "change to a budget of 'flops', 'params', or a resource that attach was given"
                )
        changed = copy.copy(self)
        changed.target = self.target.anew(budgets)
        for each in budgets:
            cost, dense = self.costs[each.resource], changed.expected(each.resource, self._dense_widths)
            check_reachable(each, dense, cheapest(cost, groups) * dense / cost.total(self._dense_widths))
        changed.check_runs(groups, step)
        return changed

    def with_total_steps(self, total_steps: int, groups: tuple[Group, ...], step: int) -> Spending:
        """The same run with another length.

        Raises:
            BudgetError: when the budget of the run could not be met.
            ValueError: for a number that is not above the steps done.
        """
        if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps <= step:
            raise ValueError(f"total_steps must be an integer above the {step} steps done, got {total_steps!r}")
        changed = copy.copy(self)
        changed.total_steps = total_steps
        changed.check_runs(groups, step)
        return changed

    def check_runs(self, groups: tuple[Group, ...], step: int) -> None:
        """Check that budgets of the whole run can be met from here.

        Raises:
            BudgetError: saying what is spent already, or what the least is.
        """
        widths = widths_of(groups)
        self.read_joules(widths)
        spent = self.spent_run
        for name, run in self.target.runs.items():
            present = self.expected(name, widths)
            least = present * cheapest(self.costs[name], groups) / self.costs[name].total(widths)
            besides = self._overhead_to_come(step, widths, deciding=False) if name == "flops" else 0.0
            run.check(self.total_steps, step=step, spent=spent[name], present=present, cheapest=least, besides=besides)

    # What is recorded.

    def entry(
        self, step: int, plan: Plan | None, groups: tuple[Group, ...], before: Mapping[str, int], reason: str
    ) -> Entry:
        """An entry on the present widths.

        Args:
            step: optimizer steps done.
            plan: the last one, for its price and reference.
            groups: at their present widths.
            before: widths that the meters read.
            reason: why.
        """
        target, account, widths = self.target, self.account, widths_of(groups)
        spent = {name: self.expected(name, widths) for name in self.costs}
        reference = target.references(plan.reference) if plan else {}
        recompiles, recompiling_seconds = account.new_recompiles()
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
            spent_run=self.spent_run,
            error={name: spent[name] / value - 1.0 for name, value in reference.items() if name in spent and value > 0},
            price=target.prices(plan.price, before) if plan else {},
            sensing_seconds=account.new_sensing_seconds(),
            probing_seconds=account.new_probing_seconds(),
            recompiles=recompiles,
            recompiling_seconds=recompiling_seconds,
            deciding_seconds=account.deciding.last_seconds,
            resizing_seconds=account.resizing.last_seconds if plan is not None and plan.step == step else 0.0,
        )

    def totals(self, step: int, widths: Mapping[str, int]) -> dict[str, Any]:
        """What the run came to, by name of the summary's fields.

        Args:
            step: optimizer steps done.
            widths: present widths.
        """
        account, meter = self.account, self.meter
        if "inference" not in meter.read():  # the last decision has cut
            with self.deciding:
                account.sensed(meter.time_inference(widths))
        if step < self.total_steps:
            self.read_joules(widths)
        spent = {name: self.expected(name, widths) for name in self.costs}
        dense_flops = self.costs["flops"].total(self._dense_widths)
        readings = meter.read()
        read = self.target.metered | readings.keys()  # a meter that has vanished reads nothing
        measured = {name: source for name, source in meter.sources.items() if name in read}
        return {
            "steps": step,
            "total_steps": self.total_steps,
            "dense_flops": dense_flops,
            "final_flops": spent["flops"],
            "final_flops_ratio": spent["flops"] / dense_flops if dense_flops else 1.0,
            "train_flops": account.train_flops,
            "overhead_flops": account.overhead_flops,
            "overhead_flops_ratio": account.overhead_flops / account.train_flops if account.train_flops else 0.0,
            "seconds": account.seconds,
            "overhead_seconds": account.overhead_seconds,
            "attach_seconds": account.attach.seconds,
            "sensing_seconds": account.sensing.seconds,
            "deciding_seconds": account.deciding.seconds,
            "resizing_seconds": account.resizing.seconds,
            "resizes": account.resizes,
            "limit": self.target.limit,
            "spent": spent,
            "metered": readings,
            "sources": {**self._modelled, **measured},
            "resident_bytes": meter.resident_bytes(),
            "break_even_step": break_even_step(account.segments()),
            "probing_seconds": account.probing_seconds,
            "probing_flops": account.probing_flops,
            "probed_steps": account.probed_steps,
            "recompiles": account.recompiles,
            "recompiling_seconds": account.recompiling_seconds,
            "limit_run": self.limit_run,
            "spent_run": self.spent_run,
        }

    def verdict(self, step: int, widths: Mapping[str, int], last: Plan | None) -> tuple[bool, str]:
        """Whether the run landed, and why or why not.

        Args:
            step: optimizer steps done.
            widths: present widths.
            last: the last plan, or None before the first.
        """
        total_steps, target = self.total_steps, self.target
        steps, limits = min(step, total_steps), self.target.limit
        early = f"ended after {steps} of {total_steps} steps" if steps < total_steps else "ended"
        for name, limit in self.limit_run.items():
            spent, rest = self.spent_run[name], self.expected(name, widths) * (total_steps - steps)
            if spent + rest > limit * (1 + 1e-12):
                heading = f", and {amount(rest, name)} to go" if rest else ""
                return False, f"{early} at {amount(spent, name)} for the run{heading}, over {amount(limit, name)}"
        for name, limit in limits.items():
            seen, dense = self.expected(name, widths), target.dense_cost(name)
            if name in target.metered:
                seen = self.meter.settled().get(name, seen)
            margin = max(1e-12, self.meter.margin(name))
            if name not in target.runs and seen > limit * (1 + margin):
                over = f"over {limit / dense:.1%}" if name not in METERED else f"over {amount(limit, name)}"
                slower = f"landed at step {last.step}, but since then " if last is not None and last.landed else ""
                return False, f"{slower}{early} at {seen / dense:.1%} of the dense {name}, {over}"
        if last is not None and last.landed:
            gone = "; the energy meter has vanished since: joules are modelled" if self.meter.vanished else ""
            return True, f"landed at step {last.step}: {last.reason}{gone}"
        if limits and all(limit >= self.expected(name, self._dense_widths) for name, limit in limits.items()):
            return True, "the dense model is within budget"
        within = "within budget" if limits else early
        return False, f"{within} after {steps} of {total_steps} steps, but the last decision was not made"

    # What is remembered.

    def state_dict(self) -> dict[str, Any]:
        """All that was spent, read and learnt so far, in plain numbers."""
        return {
            "account": self.account.state_dict(),
            "metered": dict(self.readings),
            "metering": self.meter.state_dict(),
            "target": self.target.state_dict(),
        }

    def check(self, state: Mapping[str, Any]) -> None:
        """Load a state on trial, before anything is changed."""
        trial = copy.copy(self)
        trial.account, trial.target = copy.deepcopy(self.account), copy.copy(self.target)
        trial.meter = copy.copy(self.meter)
        trial.load_state_dict(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Args:
            state: from `state_dict`.
        """
        self.account.load_state_dict(state["account"])
        self.target.load_state_dict(state["target"])
        self.meter.load_state_dict(state["metering"])
        self.readings = {str(name): float(value) for name, value in state["metered"].items()}
