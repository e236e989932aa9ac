"""A loop: after each step of the user's training it senses, decides, acts and records."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any
from weakref import WeakSet

import numpy as np
from jaxtyping import Bool, Float64, Int
from torch import Tensor, nn

from setpoint.actuator.balance import balance_and_shrink
from setpoint.controller.plan import Observation, Plan, regrows
from setpoint.cost.budget import amount
from setpoint.errors import GroupError, LoopError
from setpoint.groups.group import Group, widths_of
from setpoint.ledger import Entry, Ledger
from setpoint.loop.accounting import Account
from setpoint.loop.explanation import Explanation, explain_drop, last_return
from setpoint.loop.hooks import StepHooks
from setpoint.loop.metering import METERED
from setpoint.loop.parts import Parts
from setpoint.loop.record import (
    drop_counts,
    number,
    only_kept,
    refusal,
    return_counts,
    spread,
    with_drops,
    with_returns,
)
from setpoint.loop.regrowth import Regrowth
from setpoint.loop.state import check_loading, resume, state_of
from setpoint.loop.stride import sensed_every
from setpoint.loop.summary import Summary, break_even_step
from setpoint.sensor.probe import Probe
from setpoint.sensor.reading import Reading

ATTACHED: WeakSet[nn.Module] = WeakSet()
"""Models that a loop is at work on."""


class Loop:
    """The running control loop; `attach` makes one.

    It works through the optimizers' own hooks: `sensor.update` before a step (in long runs not before each,
    see `sensed_every`), and after it, whenever the controller is due, a reading, a decision, a cut and a
    ledger entry. After the landing it only
    counts. Used as a context manager it finishes at the end, and only detaches if there was an exception.

    Args:
        parts: what it is made of.
        account: what has been spent so far.
    """

    def __init__(self, parts: Parts, account: Account) -> None:
        self._parts = parts
        self._account = account
        self._groups = parts.groups
        self._dense_widths = widths_of(parts.groups)
        self._dense = {name: cost.total(self._dense_widths) for name, cost in parts.costs.items()}
        self._origin = {group.name: np.arange(group.num_units) for group in parts.groups}
        self._sensor_state = parts.sensor.init(parts.groups, parts.model)
        self._controller_state = parts.controller.init(parts.groups)
        self._sensing_flops = parts.sensor.flops(parts.groups, parts.model)
        self._ledger = Ledger(parts.header)
        self._step = 0
        self._skipped = 0
        self._overdue = self._landed = self._finished = False
        self._observed: dict[str, Tensor | float | None] = {"loss": None, "val": None}
        self._reading: Reading | None = None
        self._plan: Plan | None = None
        self._worth: dict[str, Float64[np.ndarray, " units"]] = {}
        self._summary: Summary | None = None
        self._metered: dict[str, float] = {}
        self._regrowth = Regrowth(parts, account) if regrows(parts.controller) else None
        self._hooks = StepHooks(parts.optimizers, self._before_step, self._after_step, partial(check_loading, parts))
        ATTACHED.add(parts.model)
        account.steps.begin()

    # What the user may ask.

    @property
    def ledger(self) -> Ledger:
        """Every decision so far."""
        return self._ledger

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups that may be pruned, at their present widths."""
        return self._groups

    @property
    def widths(self) -> dict[str, int]:
        """Active units by group."""
        return widths_of(self._groups)

    @property
    def origin(self) -> dict[str, Int[np.ndarray, " units"]]:
        """By group, the index that each active unit has in the dense model."""
        return {name: origin.copy() for name, origin in self._origin.items()}

    @property
    def price(self) -> float:
        """The Lagrange multiplier of the budget that leads, loss per unit of its resource; 0 before a decision."""
        target, widths = self._parts.target, self.widths
        prices = target.spread(self._plan.price, widths, price=True) if self._plan else {}
        return float(prices.get(target.binding(widths), 0.0))

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self._step

    @property
    def landed(self) -> bool:
        """Whether the last decision has been made."""
        return self._landed

    @property
    def summary(self) -> Summary | None:
        """What `finish` returned, or None before."""
        return self._summary

    def observe(self, *, loss: Tensor | float | None = None, val: Tensor | float | None = None) -> None:
        """Tell the loop the present loss; it is brought to the host only when a decision is made.

        Args:
            loss: training loss, a number or a tensor of one element.
            val: validation loss, the same.

        Raises:
            ValueError: for a tensor of several elements.
        """
        for name, value in (("loss", loss), ("val", val)):
            if isinstance(value, Tensor):
                if value.numel() != 1:
                    raise ValueError(f"{name} must have one element, got shape {tuple(value.shape)}: take its mean")
                self._observed[name] = value.detach()
            elif value is not None:
                self._observed[name] = float(value)

    def explain(self, group: str, origin: int) -> Explanation:
        """What became of a unit, and why.

        Args:
            group: name of the group.
            origin: index of the unit in the dense model.

        Raises:
            GroupError: for a group that is not pruned here, or a unit that it never had.
        """
        what = {each.name: each.what for each in self._groups}
        if group not in what:
            raise GroupError(f"no group {group!r} is pruned here: use one of {', '.join(what)}")
        if not 0 <= origin < self._dense_widths[group]:
            raise GroupError(f"group {group!r} has units 0 to {self._dense_widths[group] - 1}, got {origin}")
        resource = self._parts.target.binding(self.widths)
        position = np.flatnonzero(self._origin[group] == origin)
        dropped = explain_drop(self._ledger, group, origin, what[group], resource) if not len(position) else None
        if dropped is not None:
            return dropped
        at = int(position[0])
        returned, gain = last_return(self._ledger, group, origin)
        worth = float(self._worth[group][at]) if group in self._worth else math.nan
        saliency = float(self._reading.saliency[group][at]) if self._reading else math.nan
        plan, price = self._plan, self.price if self._plan else math.nan
        step, reason = (plan.step, plan.reason) if plan else (None, "")
        return Explanation(group, origin, what[group], True, step, saliency, worth, price, reason, returned, gain)

    def state_dict(self) -> dict[str, Any]:
        """All that the loop remembers, for `load_state_dict`; model and optimizers are saved beside it.

        It holds tensors, numbers and strings only, so that `torch.load(..., weights_only=True)` reads it.

        Raises:
            CheckpointError: when a sensor or controller of your own keeps what cannot be stored.
            LoopError: in the middle of a step.
        """
        return state_of(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state: shrink the dense model and its optimizers as they were, and go on from there.

        Load it before the states of the model, its copies and the optimizers, which then have the right
        shapes. Everything is checked before anything is changed.

        Args:
            state: from `state_dict`, of a loop that was attached with the same arguments.

        Raises:
            CheckpointError: when it is of another model, budget or length of run, or no such state.
            LoopError: when this loop has made a step already.
        """
        resume(self, state)

    # How it ends.

    def finish(self) -> Summary:
        """Check the landing, detach, and say what the run came to.

        Raises:
            LoopError: when it has been called before.
        """
        if self._finished:
            raise LoopError("finish() has been called already: its result is in loop.summary")
        self.detach()
        self._finished = True
        self._summary = self._summarise()
        return self._summary

    def detach(self) -> None:
        """Take the hooks away and leave the model as it is; may be called again."""
        self._hooks.remove()
        self._parts.metering.stop()
        if self._regrowth is not None:
            self._regrowth.stop()
        ATTACHED.discard(self._parts.model)

    def __enter__(self) -> Loop:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None and not self._finished:
            self.finish()
        self.detach()

    # What happens at every step.

    def _before_step(self, grad_scale: Tensor | None) -> None:
        if self._regrowth is not None:
            self._regrowth.end_probe(grad_scale)
        total_steps = self._parts.total_steps
        if self._landed or self._step >= total_steps or self._step % sensed_every(total_steps):
            return
        with self._account.sensing:
            self._sensor_state = self._parts.sensor.update(
                self._sensor_state, self._groups, self._parts.model, grad_scale
            )
        self._account.sensed(self._sensing_flops)

    def _after_step(self) -> None:
        self._step += 1
        self._account.stepped()
        self._parts.metering.stepped()
        regrowth, total_steps = self._regrowth, self._parts.total_steps
        if regrowth is not None:
            regrowth.ease()
        if self._step == total_steps + 1:
            warnings.warn(
                f"attach was told total_steps={total_steps}, and this is step {self._step}: training goes on, "
                "but Setpoint makes no more decisions",
                stacklevel=2,
            )
        elif self._step <= total_steps and not self._landed:
            due = self._parts.controller.due(self._step, total_steps)
            if due or self._overdue:
                self._decide(due)
            if regrowth is not None and not self._landed:
                regrowth.begin_probe(self._step)
        self._begin_step()

    def _begin_step(self) -> None:
        """The next step begins: on the clock, unless it is watched for its bytes; with resting units it is not."""
        coming, total_steps = self._step + 1, self._parts.total_steps
        due = coming <= total_steps and self._parts.controller.due(coming, total_steps)
        self._parts.metering.prepare(due and not (self._landed or self._finished or self._regrowth))
        if not self._parts.metering.watching:
            self._account.steps.begin()

    def _decide(self, due: bool) -> None:
        """Read, decide, act and record. After a bad reading, try again at the next step."""
        deciding, plan = self._account.deciding, None
        self._overdue = True  # also if anything is raised from here on
        with deciding:
            reading, metered = self._read(), self._meter()
            why_not = refusal(reading)
            if why_not is None:
                probe = self._regrowth.probe(self._step) if self._regrowth is not None else None
                state, plan = self._parts.controller.decide(
                    self._controller_state,
                    self._observation(reading, probe, metered),
                    self._parts.target.cost,
                    self._groups,
                )
        if plan is not None:
            origin, before = self._origin, self.widths
            regrown, note = self._act(plan, state, reading)
            reason = f"{plan.reason}; {note}" if note else plan.reason
            entry = with_drops(self._entry(reason, plan, before), plan, reading, origin)
            self._ledger.append(with_returns(entry, plan, probe))
            self._worth = spread(only_kept(plan.worth, plan), regrown)
            self._reading = replace(reading, saliency=spread(only_kept(reading.saliency, plan), regrown))
            self._plan, self._landed, self._overdue = plan, plan.landed, False
            if self._landed and self._regrowth is not None:
                self._regrowth.release()
        elif due and why_not is not None:
            self._ledger.append(self._entry(why_not, self._plan, self.widths))

    def _meter(self) -> dict[str, float]:
        """What the present widths spend by the meters; a joule meter that has gone is replaced by what it foretold."""
        metering, widths = self._parts.metering, self.widths
        self._metered = metering.read()
        modelled = {"energy": self._parts.target.expected("energy", widths)} if metering.vanished() else {}
        return self._parts.target.read(self._metered, widths) | modelled

    def _read(self) -> Reading:
        """A reading whose skipped steps count from the last one."""
        reading = self._parts.sensor.read(self._sensor_state, self._groups, self._step)
        before, self._skipped = self._skipped, reading.skipped_steps
        return replace(reading, skipped_steps=reading.skipped_steps - before)

    def _act(self, plan: Plan, state: Any, reading: Reading) -> tuple[dict[str, Bool[np.ndarray, " _units"]], str]:
        """Carry the plan out on everything that is indexed by unit; what has come back, and what is to be said."""
        parts, account, regrowth = self._parts, self._account, self._regrowth
        account.resizing.last_seconds = 0.0
        regrown: dict[str, Bool[np.ndarray, " _units"]] = {}
        note = ""
        if plan.empty():
            self._controller_state = state
            return regrown, note
        with account.resizing:
            if plan.drops():  # all that can fail comes before the model changes
                sensed, state = parts.sensor.cut(self._sensor_state, plan.keep), parts.controller.cut(state, plan.keep)
                with regrowth.resting(plan.keep) if regrowth is not None else nullcontext("") as note:
                    groups = balance_and_shrink(
                        parts.model, parts.optimizers, self._groups, plan.keep, reading.basis, parts.copies
                    )
                self._groups, self._sensor_state, self._origin = groups, sensed, only_kept(self._origin, plan)
            self._controller_state = state
            if plan.grows() and regrowth is not None:
                self._groups, regrown = regrowth.grow(self._groups, plan)
                self._sensor_state = parts.sensor.grow(self._sensor_state, regrown)  # type: ignore[attr-defined]
                self._controller_state = parts.controller.grow(self._controller_state, regrown)  # type: ignore[attr-defined]
                self._origin = regrowth.origin
        self._sensing_flops = parts.sensor.flops(self._groups, parts.model)
        account.resized(parts.costs["flops"].total(self.widths))
        parts.metering.cut()
        return regrown, note

    def _observation(self, reading: Reading, probe: Probe | None, metered: Mapping[str, float]) -> Observation:
        return Observation(
            step=self._step,
            total_steps=self._parts.total_steps,
            widths=self.widths,
            reading=reading,
            dense=self._dense | self._parts.target.dense,
            limit=self._parts.target.limits,
            spent=self._spent(),
            metered=metered,
            loss=number(self._observed["loss"]),
            val=number(self._observed["val"]),
            seconds_per_step=self._account.steps.seconds_per_step,
            seconds_per_resize=self._account.resizing.last_seconds if self._account.resizes else None,
            probe=probe,
        )

    def _spent(self) -> dict[str, float]:
        widths = self.widths
        return {name: cost.total(widths) for name, cost in self._parts.costs.items()}

    def _entry(self, reason: str, plan: Plan | None, before: Mapping[str, int]) -> Entry:
        """An entry on the present widths; `plan` is the last one, for its price and reference.

        Args:
            reason: why.
            plan: the last one.
            before: widths that the meters read.
        """
        account, target, costs = self._account, self._parts.target, self._parts.costs
        widths, spent = self.widths, self._spent()
        reference = target.spread(plan.reference, before) if plan else {}
        expected = {name: target.expected(name, widths) for name in reference if name in spent}
        return Entry(
            step=self._step,
            widths=self.widths,
            loss=number(self._observed["loss"]),
            val=number(self._observed["val"]),
            seconds=account.seconds,
            reason=reason,
            spent=spent,
            metered=dict(self._metered),
            predicted={name: costs[name].total(before) for name in self._metered},
            reference=reference,
            error={name: value / reference[name] - 1.0 for name, value in expected.items() if reference[name] > 0},
            price=target.spread(plan.price, before, price=True) if plan else {},
            sensing_seconds=account.new_sensing_seconds(),
            probing_seconds=account.new_probing_seconds(),
            deciding_seconds=account.deciding.last_seconds,
            resizing_seconds=account.resizing.last_seconds if plan is not None and plan.step == self._step else 0.0,
        )

    # What it came to.

    def _summarise(self) -> Summary:
        account, spent, steps = self._account, self._spent(), min(self._step, self._parts.total_steps)
        landed, reason = self._landing(spent, steps)
        drops = drop_counts(self._ledger)
        return Summary(
            landed=landed,
            steps=self._step,
            total_steps=self._parts.total_steps,
            widths=self.widths,
            dense_widths=dict(self._dense_widths),
            dense_flops=self._dense["flops"],
            final_flops=spent["flops"],
            final_flops_ratio=spent["flops"] / self._dense["flops"] if self._dense["flops"] else 1.0,
            final_params=self._num_params(),
            train_flops=account.train_flops,
            overhead_flops=account.overhead_flops,
            overhead_flops_ratio=account.overhead_flops / account.train_flops if account.train_flops else 0.0,
            seconds=account.seconds,
            overhead_seconds=account.overhead_seconds,
            attach_seconds=account.attach.seconds,
            sensing_seconds=account.sensing.seconds,
            deciding_seconds=account.deciding.seconds,
            resizing_seconds=account.resizing.seconds,
            resizes=account.resizes,
            limit=self._parts.target.limit,
            spent=spent,
            metered=self._parts.metering.read(),
            sources={**self._parts.header["modelled"], **self._parts.metering.sources},
            break_even_step=break_even_step(account.segments()),
            reason=reason,
            probing_seconds=account.probing_seconds,
            probing_flops=account.probing_flops,
            probed_steps=account.probed_steps,
            dropped_units=len(drops),
            regrown_units=len(return_counts(self._ledger)),
            dropped_again=sum(count > 1 for count in drops.values()),
        )

    def _num_params(self) -> int:
        return sum(parameter.numel() for parameter in self._parts.model.parameters())

    def _landing(self, spent: Mapping[str, float], steps: int) -> tuple[bool, str]:
        """Whether the run landed, and why or why not."""
        total_steps, target = self._parts.total_steps, self._parts.target
        if self._num_params() != spent["params"]:
            return False, (
                f"the model has {self._num_params():,} parameters, but its widths account for {spent['params']:,.0f}: "
                "it was changed by something other than this loop"
            )
        early = f"ended after {steps} of {total_steps} steps" if steps < total_steps else "ended"
        for resource, limit in target.limit.items():
            seen, dense = target.expected(resource, self.widths), target.expected(resource, self._dense_widths)
            if seen > limit * (1 + max(1e-12, self._parts.metering.margin(resource))):
                over = f"over {limit / dense:.1%}" if resource not in METERED else f"over {amount(limit, resource)}"
                return False, f"{early} at {seen / dense:.1%} of the dense {resource}, {over}"
        if self._landed and self._plan is not None:
            return True, f"landed at step {self._plan.step}: {self._plan.reason}"
        if all(limit >= target.expected(name, self._dense_widths) for name, limit in target.limit.items()):
            return True, "the dense model is within budget"
        return False, f"within budget after {steps} of {total_steps} steps, but the last decision was not made"
