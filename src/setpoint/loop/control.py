"""Control: what a loop does at every step - sense, decide, act, record."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, final

import numpy as np
from torch import Tensor
from torch.optim import Optimizer

from setpoint.actuator.actuator import Actuator, Origins
from setpoint.controller.plan import Controller, Observation, Plan
from setpoint.errors import LoopError, RankError
from setpoint.groups.follow import ByUnit, Change, check_follows, follow, fresh
from setpoint.groups.group import Group, widths_of
from setpoint.host.host import Host, Unchanged
from setpoint.interrupts import uninterrupted
from setpoint.ledger import Entry, Ledger
from setpoint.loop.hooks import StepHooks
from setpoint.loop.losses import Losses
from setpoint.messages import counted, listed, warn
from setpoint.sensor.reading import Reading, Sensor, sensed_every
from setpoint.spending.metrics import LOG, log_decision, metrics
from setpoint.spending.spending import Spending

_FIRST_WAITS = 0.05  # share of the run
_FRESH_STEPS = 50  # that are sensed before a last decision is made again


@dataclass(frozen=True, eq=False)
class Parts:
    """What a loop is made of once the model has been looked at."""

    sensor: Sensor[Any]
    controller: Controller[Any]
    actuator: Actuator  # its groups are at dense widths
    spending: Spending
    header: Mapping[str, Any]  # of the ledger
    facts: Mapping[str, Any]  # what must be the same in a run that goes on with this one's state
    revocable: Callable[[], Actuator] | None = None  # makes of the actuator one that can take its first cut back


@dataclass(frozen=True, eq=False)
class RunState:
    """Where a run is, as a checkpoint holds it; every step and every decision makes a new one."""

    step: int = 0  # optimizer steps done
    skipped: int = 0  # steps that the sensor had left out by the last reading
    again: int = 0  # a step at which to decide in addition to those of the controller; 0 for none
    overdue: bool = False  # a decision is due and could not be made
    budget_met: bool = False  # the last decision has been made
    plan: Plan | None = None  # the last one, without what it says of single units
    # In the last reading and at the last decision, of the units that are active now.
    saliency: Mapping[str, ByUnit[np.ndarray]] = field(default_factory=dict, metadata=fresh(math.nan))
    worth: Mapping[str, ByUnit[np.ndarray]] = field(default_factory=dict, metadata=fresh(math.nan))
    gave_way: str = ""  # which goal lost when budget and loss could not both be met

    def decided(self, plan: Plan, reading: Reading, change: Change) -> RunState:
        seen = self if change.counted else replace(self, saliency=reading.saliency, worth=plan.worth)
        return replace(
            follow(seen, change),
            plan=replace(plan, keep={}, worth={}, grow={}, grow_worth={}),
            budget_met=plan.budget_met,
            overdue=False,
            again=plan.again or self.again,
            gave_way=plan.gave_way or self.gave_way,
        )


@final
class Control:
    """The control of one run, which changes at every step; it decides on all ranks or on none."""

    def __init__(
        self, host: Host, parts: Parts, losses: Losses, hooks: StepHooks, callbacks: dict[object, Callable[[Any], None]]
    ) -> None:
        self.host, self.losses, self._hooks, self._callbacks = host, losses, hooks, callbacks
        self.sensor, self.controller, self.actuator = parts.sensor, parts.controller, parts.actuator
        self.spending, self.facts, self.revocable = parts.spending, parts.facts, parts.revocable
        self.dense, self.ledger, self.state = parts.actuator.groups, Ledger(parts.header), RunState()
        self._checked_host = self.finished = False
        widths = widths_of(self.dense) if self.actuator.by_unit else {}
        self.controller_state = self.controller.init(self.dense)
        check_follows(self.controller_state, widths)
        self.sensor_state = self.sensor.init(self.dense, host.model)  # after what may fail, since it may leave hooks
        check_follows(self.sensor_state, widths)
        # attach saw an unsharded model.
        self.spending.account.sensing_flops = self.sensor.flops(self.dense, host.model)
        self._unchanged = Unchanged(host.model, host.copies)
        host.begin(self.dense)
        self.spending.account.begin()

    @property
    def step(self) -> int:
        return self.state.step

    @property
    def groups(self) -> tuple[Group, ...]:
        return self.actuator.groups

    @property
    def widths(self) -> dict[str, int]:
        return widths_of(self.groups)

    def metrics(self) -> dict[str, float]:
        return metrics(self.spending, self.step, self.state.plan, self.widths, len(self.ledger))

    # Before the optimizers step.

    def before_step(self, grad_scale: Tensor | None) -> None:
        """`grad_scale` is what gradients are still multiplied by, or None."""
        with uninterrupted(), self._explained():
            self.host.before_step(first=not self._checked_host)
            self._checked_host = True  # a closer look costs milliseconds, which the first step may take
            self.actuator.before_step(grad_scale)
            self._sense(grad_scale)  # behind the actuator: it masks gradients that must not count

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Inside, an exception whose cause is a model that others have changed says so."""
        try:
            yield
        except (LoopError, RankError):
            raise
        except Exception as error:
            try:
                self._unchanged.check(self.groups)
            except LoopError as explained:
                raise explained from error
            raise

    def _sense(self, grad_scale: Tensor | None) -> None:
        """Read the gradients of this step, if it is one of those that are read; after the last decision none is."""
        spending, planned_steps = self.spending, self.spending.planned_steps
        if self.state.budget_met or self.step >= planned_steps:
            self.release()
        # While a decision waits for a reading without NaN every step is read.
        # So is every one before a first cut.
        elif self.state.overdue or self.step % sensed_every(planned_steps) == 0 or self._calibrates:
            with spending.account.watch.sensing:
                self.sensor_state = self.sensor.update(self.sensor_state, self.groups, self.host.model, grad_scale)
            spending.account.sensed(spending.account.sensing_flops)
        else:
            self.sensor.forget(self.sensor_state)

    @property
    def _calibrates(self) -> bool:
        return bool(self.controller.conduct.schedule.first) and not len(self.ledger)

    def release(self) -> None:
        """Take off the model what the sensor reads through."""
        self._hooks.unseen.stop()
        self.sensor.release(self.sensor_state)

    # After they have stepped.

    def after_step(self) -> None:
        with uninterrupted(), self._explained():
            self.state = now = replace(self.state, step=self.step + 1)
            self.spending.stepped()
            self.actuator.after_step()
            step, planned_steps = now.step, self.spending.planned_steps
            if step == self.spending.run_steps + 1:
                warn(
                    f"the run was to have {self.spending.run_steps:,} steps, and this is step {step:,}: training "
                    "continues, but Setpoint makes no more decisions"
                )
            elif step <= planned_steps and not now.budget_met:
                due = step == now.again or self.controller.due(step, planned_steps)
                # A bill may turn out to pay for fewer steps, of which the first cut is past already.
                due = due or (self._calibrates and self.controller.conduct.schedule.settled(step, planned_steps))
                if due or now.overdue:
                    self._decide(due)
            elif step < planned_steps:
                # Where a decision would be due: meters may say that the run will be over its budget.
                if self.controller.due(step, planned_steps) and self.spending.over(step, self.widths):
                    self._reopen()
            else:
                self.spending.read_joules(self.widths)
            self._begin_step()
            if self.state.budget_met or step >= planned_steps:
                self.sensor.release(self.sensor_state)  # here as well: no step may follow
        decided = len(self.ledger) > 0 and self.ledger[-1].step == self.step
        if decided and self.host.ranks.own == 0 and LOG.isEnabledFor(logging.INFO):
            log_decision(self.ledger[-1], self.metrics())
        self.notify(self.ledger[-1] if decided else None)

    def notify(self, event: Any) -> None:
        for callback in tuple(self._callbacks.values()):  # one may take another off
            callback(event)

    def _begin_step(self) -> None:
        step, planned_steps = self.step, self.spending.planned_steps
        due = self.state.overdue or (step + 1 <= planned_steps and self.controller.due(step + 1, planned_steps))
        open_still = step <= planned_steps and not (self.state.budget_met or self.finished)
        change, ordinary = self.actuator.prepare(step, due=due, open_still=open_still)
        self._follow(change)
        self.spending.prepare(ordinary and open_still)

    def _follow(self, change: Change) -> None:
        """Resize what has an entry for each unit after units came for a probe, or went after it."""
        if change.keep or change.regrown:
            self.sensor_state = follow(self.sensor_state, change)
            self.controller_state = follow(self.controller_state, change)
            self.state = follow(self.state, change)
            self.spending.account.sensing_flops = self.sensor.flops(self.groups, self.host.model)

    def end_visit(self) -> None:
        """Take units that are there for a probe only out of the model."""
        self._follow(self.actuator.before_decision())

    def _decide(self, due: bool) -> None:
        """After a bad reading, try again at the next step."""
        # Set first: after an exception below the decision is still due at the next step.
        self.state = now = replace(self.state, overdue=True)
        self.end_visit()
        before, origin = self.widths, self.actuator.origin if self.actuator.by_unit else {}
        with self.spending.account.watch.deciding:
            # Read and averaged before anything is refused, as all ranks must send their part.
            reading = self.host.mean(self._read, self.losses, now.step)
            self.losses.complete(self.ledger)
            self.spending.read_meters(before)
            problem = _refusal(reading) or (self.spending.meter.waits if now.step < self.spending.planned_steps else "")
            problem = problem or self._too_early(reading)
            if not problem:
                observation, state, plan = self._plan(reading)
        if problem:
            if due:
                self.ledger.append(self._entry(now.plan, before, problem))
            return
        change = self._act(plan, state, reading)
        reason = f"{plan.reason}; {change.note}" if change.note else plan.reason
        self.ledger.append(self._entry(plan, before, reason, **_moved(plan, change, observation, origin)))
        self.spending.decided(self.groups, plan.budget_met)
        self.state = self.state.decided(plan, reading, change)
        if self.state.budget_met:
            self.actuator.release()
            if self.widths != before:
                _warn_of_low_rate(self.host.optimizers[0], now.step, self.spending.planned_steps)
        elif self.spending.planned_steps != observation.planned_steps:  # a bill pays for fewer now
            self.go_on()

    def _too_early(self, reading: Reading) -> str:
        """What a first cut waits for, up to 5 % of the run: what it has not seen by then, it would never see.

        Layers whose hooks have not run by the second step run none: their weights are used elsewhere, or compiled.
        """
        schedule, planned_steps = self.controller.conduct.schedule, self.spending.planned_steps
        soon = next(iter(schedule.decisions(planned_steps)), 0) + 2
        if not schedule.first or self.spending.account.resizes or self.step >= planned_steps:
            return ""
        gathered = reading.moments is None or any(moment.num_rows for moment in reading.moments.values())
        if not gathered and self.step < soon:
            return "no decision: no layer that reads units has been given numbers since the loop began"
        if self.step >= max(_FIRST_WAITS * planned_steps, soon):
            return ""
        if unseen := sorted(reading.unseen()):
            return f"no decision: no gradient has been seen of {listed(unseen, 3)} yet"
        if not any(values.any() for values in reading.saliency.values()):
            return "no decision: all gradients so far are zero"
        return ""

    def _plan(self, reading: Reading) -> tuple[Observation, Any, Plan]:
        with self.host.together(f"the plan after step {self.step}") as facts:
            known = {**self.losses.known(self.step), **self.actuator.extras(self.step)}
            observation = self.spending.observation(self.step, self.groups, reading, **known)
            groups, note = _waiting(self.groups, reading)
            cost = self.spending.limits.cost
            state, plan = self.controller.decide(self.controller_state, observation, cost, groups)
            facts["plan"] = _decisions(plan)  # ranks whose plans differ raise here, before anything is cut
        if note:  # the plan holds these groups at their width, which the ledger has to say
            plan = replace(plan, reason=f"{plan.reason}; {note}", drop_and_grow=0.0)
            remedy = "Unfreeze them before the first cut, or leave them out: attach(..., groups=...)"
            warn(f"{note}, so that the other groups carry the cut. {remedy}")
        self.spending.account.learned(plan.flops)
        if plan.gave_way:
            warn(f"{plan.gave_way}, and the reference pauses until the next decision")
        return observation, state, plan

    def _act(self, plan: Plan, state: Any, reading: Reading) -> Change:
        change = Change()
        watched = self.losses.watching and not self.spending.account.resizes
        if plan.drops() and watched and self.revocable is not None:  # the loss may ask to take the cut back
            self.actuator, self.revocable = self.revocable(), None
        if not plan.empty():
            smaller = Change(keep=plan.keep)  # followed first: whatever can fail comes before the model changes
            sensed, state = follow(self.sensor_state, smaller), follow(state, smaller)
            with self.spending.account.watch.resizing:
                change = self.actuator.act(plan, reading)
            # Returned units have no history: they follow once the model has them.
            larger = replace(change, keep={})
            self.sensor_state, state = follow(sensed, larger), follow(state, larger)
            self.losses.changed(self.step, cut=plan.drops())
            if self.actuator.by_unit:
                self.spending.resized(self.groups, self.sensor.flops(self.groups, self.host.model))
        elif plan.budget_met:  # moments would be kept for nothing, and be out of date in a later cut
            self.release()
            self.sensor_state = follow(self.sensor_state, change)
        self.controller_state = state
        return change

    def _entry(self, plan: Plan | None, before: Mapping[str, int], reason: str, **moved: Any) -> Entry:
        """An entry on the present widths; `plan` is the last one, `before` are the widths that the meters read."""
        spending, limits, widths = self.spending, self.spending.limits, self.widths
        return Entry(
            step=self.step,
            widths=widths,
            loss=self.losses.loss,
            val=self.losses.val,
            seconds=spending.account.seconds,
            reason=reason,
            spent={name: limits.expected(name, widths) for name in spending.costs},
            metered=dict(spending.readings),
            predicted={name: spending.costs[name].total(before) for name in spending.readings},
            reference=limits.references(plan.reference) if plan else {},
            limit=limits.asked,
            spent_run=spending.spent_run,
            price=limits.prices(plan.price, before) if plan else {},
            own_seconds=spending.account.seconds_since_entry(),
            **moved,
        )

    def _read(self) -> Reading:
        """A reading whose skipped steps count from the last one; LoopError if others have changed the model."""
        self._unchanged.check(self.groups)
        reading, before = self.sensor.read(self.sensor_state, self.groups, self.step), self.state.skipped
        self.state = replace(self.state, skipped=reading.skipped_steps)
        return replace(reading, skipped_steps=reading.skipped_steps - before)

    def stop(self) -> None:
        if self.host.ranks.count == 1:  # a rank that stops by itself must not wait for others to resize with it
            self.end_visit()
        self.release()
        self.spending.meter.stop()
        self.host.stop()
        self.actuator.stop()

    # What changes a run's goal.

    def go_on(self) -> None:
        """Replan after a new budget or length, bumpless; a last decision for the old ones is taken back."""
        spending = self.spending
        if self.state.budget_met and (spending.limit_run or spending.schedule.first):
            self._reopen()
        spending.replan(self.step, self.widths)
        cost = spending.limits.cost
        if spending.budgets:
            present, limit = cost.total(self.widths), spending.limits.held[cost.resource]
            self.controller_state = self.controller.transferred(
                self.controller_state, step=self.step, total_steps=spending.planned_steps, present=present, limit=limit
            )

    def _reopen(self) -> None:
        """Take the last decision back, and decide again once some fresh steps have been sensed."""
        plan = self.state.plan
        if plan is not None:
            again = self.step + max(1, min(_FRESH_STEPS, (self.spending.run_steps - self.step) // 10))
            self.state = replace(self.state, budget_met=False, plan=replace(plan, budget_met=False), again=again)


def _warn_of_low_rate(optimizer: Optimizer, step: int, steps: int) -> None:
    """Warn where a last cut comes behind the decay of the learning rate, so that training can hardly repair it."""
    group = optimizer.param_groups[0]
    highest, rate = float(group.get("max_lr", group.get("initial_lr", group["lr"]))), float(group["lr"])
    if step > 0.1 * steps and rate < 0.5 * highest:
        LOG.warning(
            f"the last cut came at step {step:,} of {steps:,}, with the learning rate at {rate / highest:.0%} of its "
            "highest: cut earlier, Schedule(settle=...), or let the rate rise once more"
        )


def _refusal(reading: Reading) -> str:
    """Why no decision can be made on a reading whose skipped steps count from the last one; "" if one can."""
    if steps := reading.skipped_steps:
        return f"no decision: NaN or infinite gradients in {counted(steps, 'step')} since the last reading"
    if not reading.finite():
        return "no decision: the reading holds NaN or infinite values"
    if reading.saliency and reading.unseen() >= reading.saliency.keys():
        return "no decision: no gradient has been seen yet"
    return ""


def _waiting(groups: tuple[Group, ...], reading: Reading) -> tuple[tuple[Group, ...], str]:
    """The groups as a controller may cut them, those of which nothing was seen yet not at all; a note about these."""
    # No gradient is not a saliency of zero: weights that are frozen at first would be dropped before all others.
    unseen = sorted(reading.unseen() & {group.name for group in groups})
    if not unseen:
        return groups, ""
    held = tuple(replace(group, min_units=group.num_units) if group.name in unseen else group for group in groups)
    few = ", ".join(unseen[:5]) + (f" and {len(unseen) - 5} more" if len(unseen) > 5 else "")
    return held, f"{few} {'wait' if len(unseen) > 1 else 'waits'}: none of the steps so far has shown a gradient there"


def _decisions(plan: Plan) -> list[Any]:
    keep = [(name, np.flatnonzero(~kept).tolist()) for name, kept in sorted(plan.keep.items())]
    grow = [(name, units.tolist()) for name, units in sorted(plan.grow.items()) if len(units)]
    return [plan.step, plan.budget_met, keep, grow]


def _moved(plan: Plan, change: Change, seen: Observation, origin: Origins) -> dict[str, Any]:
    """An entry's fields on what was dropped and what came back, by origin; single weights are counted, not listed.

    `seen` and `origin`, the dense index of each unit, are those from before the plan was carried out.
    """
    if change.counted:
        return {"num_dropped": change.num_dropped, "num_grown": change.num_grown}
    gone = {name: ~keep for name, keep in plan.keep.items() if not keep.all()}
    grown = {name: units.tolist() for name, units in plan.grow.items() if len(units)}
    gain: dict[str, list[float]] = {}
    reading, probe = seen.reading, seen.probe
    for name, units in grown.items():
        if probe is not None and name in probe.gain:
            known = dict(zip(probe.origins[name].tolist(), probe.gain[name].tolist(), strict=True))
            gain[name] = [known.get(unit, math.nan) for unit in units]
    return {
        "dropped": {name: origin[name][out].tolist() for name, out in gone.items()},
        "saliency": {name: reading.saliency[name][out].tolist() for name, out in gone.items() if reading},
        "worth": {name: plan.worth[name][out].tolist() for name, out in gone.items() if name in plan.worth},
        "grown": grown,
        "gain": gain,
        "grown_worth": {name: values.tolist() for name, values in plan.grow_worth.items() if name in grown},
    }
