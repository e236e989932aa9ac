"""A loop: after each step of the user's training it senses, decides, acts and records."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol, final, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.optim import Optimizer

from setpoint.actuator.actuator import Actuator
from setpoint.actuator.attached import ATTACHED, RESUMING, note_attached
from setpoint.actuator.optimizer_state import check_state
from setpoint.checkpoint.plain import plain, restored
from setpoint.checkpoint.snapshot import snapshot
from setpoint.controller.plan import Controller, Observation, Plan, Transferring
from setpoint.cost.budget import Budget
from setpoint.distributed import unwrapped
from setpoint.errors import CheckpointError, GroupError, LoopError, NotBegunError, RankError
from setpoint.groups.follow import Change, check_follows, follow
from setpoint.groups.group import Group, widths_of
from setpoint.groups.rng import check_rng_state, rng_state, set_rng_state
from setpoint.host.guards import Unchanged
from setpoint.host.host import Host
from setpoint.host.optimizers import real_optimizer
from setpoint.ledger import Entry, Ledger
from setpoint.loop.callbacks import LOG, Callbacks, Event, log_decision
from setpoint.loop.explain import Explanation, explain
from setpoint.loop.first_batch import FirstBatch
from setpoint.loop.hooks import StepHooks, uninterrupted
from setpoint.loop.losses import Losses
from setpoint.loop.record import decisions, highest_rate, recorded, refusal, waiting
from setpoint.loop.state import AGAIN, FORMAT, Part, RunState, check_format, check_same_run
from setpoint.loop.summary import Summary, summarise, warn_of_miss
from setpoint.messages import warn
from setpoint.sensor.reading import Reading, Sensor, sensed_every
from setpoint.spending.checks import change_budget, change_total_steps, check_open
from setpoint.spending.metrics import line, metrics
from setpoint.spending.spending import Spending


@runtime_checkable
class StandsBy(Protocol):
    """What is on model or optimizers beside the loop."""

    def stop(self) -> None:
        """Leave them alone; may be called again."""


_FRESH_STEPS = 50  # that are sensed before a last decision is made again
_NOT_BEGUN = "the loop begins at the first optimizer step, as attach was given no example: ask it after that step"


@dataclass(frozen=True, eq=False)
class Parts:
    """What a loop is made of once the model has been looked at.

    Args:
        sensor: reads saliencies.
        controller: decides.
        actuator: carries plans out; its groups are at dense widths.
        spending: what the run may spend and has spent.
        header: head of the ledger.
        facts: what must be the same in a run that goes on with this one's state.
        revocable: makes of the actuator one that can take its first cut back; None where nothing is taken back.
    """

    sensor: Sensor[Any]
    controller: Controller[Any]
    actuator: Actuator
    spending: Spending
    header: Mapping[str, Any]
    facts: Mapping[str, Any]
    revocable: Callable[[], Actuator] | None = None


@final
class Loop:
    """The running control loop, which changes at every step; `setpoint.attach` makes one.

    The loop works through the optimizers' own hooks. The sensor reads before a step (`sensed_every` says before which).
    A decision after a step is a reading, a plan, a change and a ledger entry. After the last decision the loop only
    counts. A `with` block finishes the loop at its end; after an exception the block only detaches the loop.

    Without an example the loop has no parts until the first optimizer step: what depends on them raises a
    `NotBegunError`, which is a `LoopError`.

    >>> import torch, setpoint
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
    >>> optimizer, x = torch.optim.SGD(model.parameters(), lr=0.1), torch.randn(8, 4)
    >>> loop = setpoint.attach(model, optimizer, "50% params", total_steps=30, example=(x,))
    >>> for _ in range(30):
    ...     model(x).square().mean().backward()
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    >>> loop.finish().budget_met, loop.dense_widths, loop.widths, len(loop.ledger)
    (True, {'0': 32}, {'0': 12}, 7)
    """

    def __init__(self, host: Host) -> None:
        self.host, self.losses = host, Losses()
        self._parts: Parts | None = None
        self._dense: tuple[Group, ...] = ()
        self._state, self._sensor_state, self._controller_state = RunState(), None, None
        self._ledger, self._callbacks = Ledger(), Callbacks()
        self._summary: Summary | None = None
        self._finished = self._checked_host = False
        self._unchanged = Unchanged(host.model, host.copies, ())
        self._first: FirstBatch | None = None
        self._stands_by: list[StandsBy] = []
        self._hooks = StepHooks(host.optimizers, self._before_step, self._after_step, self._loading)
        note_attached(host.model)

    def __repr__(self) -> str:
        return line(self.metrics(), finished=self._finished)

    # How it begins.

    def wait(self, first: FirstBatch) -> None:
        """Begin at the first optimizer step, with the batch that this has recorded until then."""
        self._first = first
        self.stand_by(first)

    def stand_by(self, part: StandsBy) -> None:
        """Stop this, too, when the loop is detached."""
        self._stands_by.append(part)

    def begin(self, parts: Parts) -> None:
        """Take these parts, before the first optimizer step or in it."""
        host, sensor, spending, dense = self.host, parts.sensor, parts.spending, parts.actuator.groups
        widths = widths_of(dense) if parts.actuator.by_unit else {}
        controller_state = parts.controller.init(dense)
        check_follows(controller_state, widths)
        sensor_state = sensor.init(dense, host.model)  # after what may fail, since it may leave hooks
        check_follows(sensor_state, widths)
        self._parts, self._dense = parts, dense
        self._controller_state, self._sensor_state = controller_state, sensor_state
        self._ledger = Ledger(parts.header)
        spending.account.sensing_flops = sensor.flops(dense, host.model)  # attach saw an unsharded model
        self._unchanged = Unchanged(host.model, host.copies, dense)
        host.begin(steps=lambda: self.step, missed=self._missed_step, groups=dense)
        spending.account.begin()

    @property
    def parts(self) -> Parts:
        """What the loop is made of.

        Raises:
            NotBegunError: before the first step, where `attach` was given no example.
        """
        if self._parts is None:
            raise NotBegunError(_NOT_BEGUN)
        return self._parts

    @property
    def sensor(self) -> Sensor[Any]:
        """What reads saliencies."""
        return self.parts.sensor

    @property
    def controller(self) -> Controller[Any]:
        """What decides."""
        return self.parts.controller

    @property
    def actuator(self) -> Actuator:
        """What carries plans out."""
        return self.parts.actuator

    @property
    def spending(self) -> Spending:
        """What the run may spend and has spent."""
        return self.parts.spending

    # What the user may ask.

    @property
    def ledger(self) -> Ledger:
        """Every decision so far."""
        if self._parts is None:
            raise NotBegunError(_NOT_BEGUN)
        self.losses.complete(self._ledger)
        return self._ledger

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups that may be pruned, at their present widths."""
        return self.actuator.groups

    @property
    def widths(self) -> dict[str, int]:
        """Active units by group."""
        return widths_of(self.groups)

    @property
    def dense_widths(self) -> dict[str, int]:
        """Units by group of the dense model."""
        return dict(self.spending.dense_widths)

    @property
    def origin(self) -> dict[str, Int[np.ndarray, " units"]]:
        """By group, the index that each active unit has in the dense model."""
        return {name: units.copy() for name, units in self.actuator.origin.items()}

    @property
    def masks(self) -> dict[str, Bool[Tensor, "..."]]:
        """Mask of each masked weight tensor by name, True = active; empty where whole units are cut."""
        return {name: mask.clone() for name, mask in self.actuator.masks.items()}

    @property
    def price(self) -> float:
        """The Lagrange multiplier of the budget that leads, loss per unit of its resource; 0 before a decision."""
        plan = self._state.plan
        return self.spending.limits.price(plan.price if plan else {}, self.widths)

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self._state.step

    @property
    def budget_met(self) -> bool:
        """Whether the last decision has been made, as predicted within budget; after `finish` what the summary says."""
        return self._state.budget_met if self._summary is None else self._summary.budget_met

    @property
    def summary(self) -> Summary | None:
        """What `finish` returned, or None before."""
        return self._summary

    @property
    def budget(self) -> Budget | tuple[Budget, ...]:
        """The budget, or several; none with a `Price` or a `Tolerance`. May be set anew until the last decision.

        It takes what `attach` takes. The change is bumpless: the reference goes on from what a step costs now, down to
        the new limit. A `BudgetError` says that the budget cannot be met, a `LoopError` that it is frozen.
        """
        budgets = self.spending.budgets
        return budgets[0] if len(budgets) == 1 else budgets

    @budget.setter
    def budget(self, budget: Any) -> None:
        check_open(self.spending, self.step, budget_met=self._state.budget_met or self._finished)
        change_budget(self.spending, budget, self.groups, self.step)
        self._go_on()

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run; may be set anew until `finish`, and what is left is planned afresh."""
        return self.spending.run_steps

    @total_steps.setter
    def total_steps(self, total_steps: int) -> None:
        if self._finished:
            raise LoopError("the run is finished: total_steps cannot be changed any more")
        change_total_steps(self.spending, total_steps, self.groups, self.step)
        self._go_on()

    def observe(self, *, loss: Tensor | float | None = None, val: Tensor | float | None = None) -> None:
        """Report the training or validation loss of the coming step, before `optimizer.step()`: a number or a tensor.

        A tensor stays on its device until a decision needs it; one of several elements raises a `ValueError`.
        """
        self.losses.observe(self.step + 1, loss, val, keep=not self._state.budget_met)

    def metrics(self) -> dict[str, float]:
        """Numbers of the run by name (docs/watching.md): the same names at every step, none before `begin`."""
        if self._parts is None:
            return {}
        found = metrics(self.spending, self.step, self._state.plan, self.widths, len(self._ledger))
        return {**found, "budget_met": float(self.budget_met)}

    def on_step(self, callback: Callable[[Event], None]) -> Callable[[], object]:
        """Call a function after each step with its entry or None, and at the end with the summary; returns a stop."""
        return self._callbacks.add(callback)

    def reading(self) -> Reading:
        """What the sensor reads now, on this rank; no decision is made on this reading."""
        return self.sensor.read(self._sensor_state, self.groups, self.step)

    def explain(self, group: str, origin: int) -> Explanation:
        """What happened to the unit of a group that has this index in the dense model, and why.

        Raises:
            GroupError: for a group that is not pruned here, or a unit that it never had; for single weights.
        """
        if not self.actuator.by_unit:
            raise GroupError("single weights are counted, not listed: see loop.masks and num_dropped in loop.ledger")
        resource, origins = self.spending.limits.binding(self.widths), self.actuator.origin
        return explain(self._state, self._ledger, self._dense, origins, group, origin, self.price, resource)

    def state_dict(self) -> dict[str, Any]:
        """The loop's state, for `load_state_dict`; model and optimizers are saved beside it.

        The state holds tensors, numbers and strings only, so `torch.load(..., weights_only=True)` reads it. PyTorch's,
        NumPy's and Python's global random generators are among them.

        Raises:
            CheckpointError: when a sensor or controller of your own keeps what cannot be stored.
            LoopError: in the middle of a step.
        """
        if self._hooks.within_step:
            raise LoopError("a checkpoint in the middle of a step cannot be resumed: take it after optimizer.step()")
        return {
            "format": FORMAT,
            "run": self._facts(),
            "now": self._state.state_dict(),
            "sensor": plain(self._sensor_state, "the sensor's state"),
            "controller": plain(self._controller_state, "the controller's state"),
            **{name: part.state_dict() for name, part in self._saved_parts(self.actuator).items()},
            "rng_state": {"rank": self.host.ranks.own, **rng_state()},
        }

    def _saved_parts(self, actuator: Actuator) -> dict[str, Part]:
        """What remembers something by itself."""
        return {"actuator": actuator, "losses": self.losses, "ledger": self._ledger, "spending": self.spending}

    def _facts(self) -> dict[str, Any]:
        """What must be the same in two runs of which one goes on with the other."""
        return {**self.parts.facts, **self.spending.facts()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the state of a loop that was attached with the same arguments: shrink the dense model, and go on.

        The loop's state is loaded before the states of the model, its copies and the optimizers, which then have the
        right shapes. All of it is checked before anything is changed. The global random generators go on, too.

        Raises:
            CheckpointError: when the state is of another model, budget or length of run, or is no state of a loop.
            LoopError: when this loop has made a step already.
        """
        if self.step or len(self.ledger) or self._finished:
            raise LoopError(
                f"only a freshly attached loop can take over a state, this one is at step {self.step}: {AGAIN}"
            )
        try:
            actuator, now, controller_state = self._checked(state)
        except CheckpointError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
            raise CheckpointError(
                f"this is not a state that loop.state_dict() returned, or a damaged one: {error!r}"
            ) from error
        self._parts, self._state, self._controller_state = replace(self.parts, actuator=actuator), now, controller_state
        for name, part in self._saved_parts(actuator).items():
            part.load_state_dict(state[name])
        # What points at the model is found again in the smaller one.
        live = self.sensor.init(self.groups, self.host.model)
        self._sensor_state = restored(state["sensor"], live, "the sensor's state", self.host.device)
        self.spending.account.sensing_flops = self.sensor.flops(self.groups, self.host.model)
        self.spending.prepare(False)
        if not self.actuator.by_unit:  # units that visit are in the state
            due = self.controller.due(self.step + 1, self.spending.planned_steps)
            self.actuator.prepare(self.step, due=due, open_still=not self._state.budget_met)
        rng = state["rng_state"]  # None where a framework keeps it itself
        if rng and int(rng["rank"]) == self.host.ranks.own:  # ranks that all drew the same were no several draws
            set_rng_state(rng)

    def _checked(self, state: Mapping[str, Any]) -> tuple[Actuator, RunState, Any]:
        """What a state leads to; nothing is changed yet."""
        check_format(state)
        check_same_run(state["run"], self._facts())
        for optimizer in self.host.optimizers:
            check_state(optimizer, self.host.model, self._dense)
        actuator, device = self.actuator, self.host.device
        if state["actuator"]["kind"] != actuator.kind and self.parts.revocable is not None:
            actuator = self.parts.revocable()  # as the first cut of a run whose loss is watched makes it
        parts = self._saved_parts(actuator)
        groups = actuator.check(state["actuator"])
        for name in ("losses", "ledger", "spending"):
            parts[name].check(state[name])
        restored(state["sensor"], self.sensor.init(groups, self.host.model), "the sensor's state", device)
        controller_state = restored(state["controller"], self.controller.init(groups), "the controller's state", device)
        if state["rng_state"] is not None:
            check_rng_state(state["rng_state"])
        return actuator, RunState.of(state["now"], widths_of(groups)), controller_state

    def check_saved_with(self, name: str, parts: Sequence[Any]) -> None:
        """Check that a run file has the model, optimizers and copies, whose tensors the loop's state has not."""
        saved = {id(unwrapped(part) if isinstance(part, nn.Module) else real_optimizer(part)) for part in parts}
        host = self.host
        for what, needed in {"model": [host.model], "optimizer": host.optimizers, "copy": host.averages.named}.items():
            if not {id(part) for part in needed} <= saved:
                raise CheckpointError(f"{name!r} is of no use without its {what}: save_run(path, {what}=..., ...)")

    @contextmanager
    def restored_on_error(self, what: str, *others: Any) -> Iterator[None]:
        """Inside, states are loaded on all ranks or on none: after an exception loop, model and `others` are as before.

        Tensors that `fully_shard` has sharded are not put back.
        """
        host = self.host
        put_back = snapshot(self, host.model, host.copies, host.optimizers, others)
        try:
            with host.together(what):
                yield
        except BaseException:
            if host.mesh is None:
                # Ranks fail together, so that wrappers are made for the old shapes on all of them.
                with suppress(RankError), host.resizable("putting back what was there before", self.groups):
                    put_back()
            raise

    # How it ends.

    def finish(self) -> Summary:
        """Check whether the budget is met, detach, and return the summary of the run.

        Raises:
            LoopError: when the loop has been finished before; before the first step, and then it stays attached.
        """
        if self._parts is None:
            raise NotBegunError(
                "no optimizer step was made since attach, so that nothing was found and nothing pruned: check that the "
                "loader has batches, and that the attached optimizer is the one that steps"
            )
        if self._finished:
            raise LoopError("finish() has been called already: its result is in loop.summary")
        self._end_visit()
        self.detach()
        self._finished = True
        masked = sum(int((~mask).sum()) for mask in self.actuator.masks.values())
        num_params = sum(parameter.numel() for parameter in self.host.model.parameters()) - masked
        self._summary = done = summarise(
            self._state, self.spending, self.ledger, self.actuator, num_params, self.dense_widths, self.losses
        )
        self.ledger.end(done.steps, done.total_steps, budget_met=done.budget_met, reason=done.reason)
        warn_of_miss(self._summary, self._state, self._hooks.unseen.passes)
        self._callbacks.notify(self._summary)
        return self._summary

    def detach(self) -> None:
        """Take the hooks away and leave the model as it is; may be called again."""
        for part in self._stands_by:
            part.stop()
        self._hooks.remove()
        if self._parts is not None:
            if self.host.ranks.count == 1:  # a rank that stops by itself must not wait for others to resize with it
                self._end_visit()
            self._release()
            self.spending.meter.stop()
            self.host.stop()
            self.actuator.stop()
        ATTACHED.discard(self.host.model)
        RESUMING.discard(self.host.model)

    def __enter__(self) -> Loop:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            if kind is None and not self._finished:
                self.finish()
        finally:
            self.detach()

    # What happens at every step.

    def _before_step(self, grad_scale: Tensor | None) -> None:
        if self._first is not None:
            self._begin_with_first_batch(self._first)
        with uninterrupted(), self._explained():
            by_hooks = self.sensor.hooked(self._sensor_state)
            brings_back = self.actuator.brings_back
            self.host.before_step(first=not self._checked_host, regrows=brings_back, by_hooks=by_hooks)
            self._checked_host = True
            self.actuator.before_step(grad_scale)
            self._sense(grad_scale)

    def _begin_with_first_batch(self, first: FirstBatch) -> None:
        try:
            first.begin(self._hooks.unseen.passes)
        except BaseException:
            self.detach()
            raise
        self._first = None

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Inside, an exception that comes of a model changed by others says so."""
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

    def _loading(self, optimizer: Optimizer, saved: dict[str, Any]) -> None:
        if self._parts is not None:
            check_state(optimizer, self.host.model, self._dense, saved)

    def _sense(self, grad_scale: Tensor | None) -> None:
        """Take in the step under way, if it is one of those that are read; after the last decision none is."""
        if self._state.budget_met or self.step >= self.spending.planned_steps:
            self._release()
        elif not self._sensed():
            self.sensor.forget(self._sensor_state)
        else:
            with self.spending.account.watch.sensing:
                self._sensor_state = self.sensor.update(self._sensor_state, self.groups, self.host.model, grad_scale)
            self.spending.account.sensed(self.spending.account.sensing_flops)

    def _sensed(self) -> bool:
        """Whether the next step is read; while a decision waits for a reading without NaN, so that none hides, each."""
        return self._state.overdue or self.step % sensed_every(self.spending.planned_steps) == 0

    def _due(self, step: int) -> bool:
        return step == self._state.again or self.controller.due(step, self.spending.planned_steps)

    def _release(self) -> None:
        """Take off the model what a sensor reads through; what other hands do to it matters no more."""
        self._hooks.unseen.stop()
        self.sensor.release(self._sensor_state)

    def _missed_step(self) -> None:
        """This rank had no batch for a step that others have made."""
        self._after_step(made=False)

    def _after_step(self, made: bool = True) -> None:
        with uninterrupted(), self._explained():
            made = made and self.host.complete()
            self._state = now = replace(self._state, step=self.step + 1)
            self.spending.stepped()
            self.actuator.after_step()
            step, total_steps = now.step, self.spending.planned_steps
            if step == self.total_steps + 1:
                warn(
                    f"the run was to have {self.total_steps:,} steps, and this is step {step:,}: training goes on, "
                    "but Setpoint makes no more decisions"
                )
            elif step <= total_steps and not now.budget_met:
                due = self._due(step)
                if (due or now.overdue) and made:
                    self._decide(due)
                waits = self._state.waits or due and not made
                self._state = replace(self._state, waits=waits, overdue=self._state.overdue or waits)
            elif step < total_steps:
                self._reopen_if_over()
            else:
                self.spending.read_joules(self.widths)
            self._begin_step()
        decided = len(self._ledger) > 0 and self._ledger[-1].step == self.step
        if decided and self.host.ranks.own == 0 and LOG.isEnabledFor(logging.INFO):
            log_decision(self._ledger[-1], self.metrics())
        self._callbacks.notify(self._ledger[-1] if decided else None)

    def _begin_step(self) -> None:
        """The next step begins."""
        step, total_steps = self.step, self.spending.planned_steps
        due = self._state.overdue or (step + 1 <= total_steps and self.controller.due(step + 1, total_steps))
        open_still = step <= total_steps and not (self._state.budget_met or self._finished)
        change, ordinary = self.actuator.prepare(step, due=due, open_still=open_still)
        self._follow(change)
        self.spending.prepare(ordinary and open_still)

    def _follow(self, change: Change) -> None:
        """All that remembers something by unit follows units that came for a probe, or went after it."""
        if change.keep or change.regrown:
            self._sensor_state = follow(self._sensor_state, change)
            self._controller_state = follow(self._controller_state, change)
            self._state = follow(self._state, change)
            self.spending.account.sensing_flops = self.sensor.flops(self.groups, self.host.model)

    def _end_visit(self) -> None:
        """Units that are there for a probe only leave the model."""
        self._follow(self.actuator.before_decision())

    def _decide(self, due: bool) -> None:
        """Read, decide, act, and record; after a bad reading, try again at the next step."""
        self._state = now = replace(self._state, overdue=True, waits=False)  # also if anything is raised from here on
        self._end_visit()
        before, origin = self.widths, self.actuator.origin if self.actuator.by_unit else {}
        with self.spending.account.watch.deciding:
            reading = self.host.mean(self._read, self.losses, now.step)
            self.losses.complete(self._ledger)
            self.spending.read_meters(before)
            problem = refusal(reading) or (self.spending.meter.waits if now.step < self.spending.planned_steps else "")
            if not problem:
                observation, state, plan = self._plan(reading)
        if not problem:
            change = self._act(plan, state, reading)
            entry = recorded(self._entry(plan, before, plan.reason), plan, change, reading, origin, observation.probe)
            self._ledger.append(entry)
            self.spending.decided(self.groups, plan.budget_met)
            self._state = replace(self._state.decided(plan, reading, change), again=plan.again or now.again)
        elif due:
            self._ledger.append(self._entry(now.plan, before, problem))
        if self._state.budget_met:
            self.actuator.release()
        elif not problem and self.spending.planned_steps != observation.planned_steps:  # a bill pays for fewer now
            self._go_on()

    def _plan(self, reading: Reading) -> tuple[Observation, Any, Plan]:
        """What the controller sees, its next state, and its plan, on which all ranks agree."""
        with self.host.together(f"the plan after step {self.step}") as facts:
            known = {**self.losses.known(self.step), **self.actuator.extras(self.step)}
            observation = self.spending.observation(self.step, self.groups, reading, **known)
            groups, note = waiting(self.groups, reading)
            state, plan = self.controller.decide(self._controller_state, observation, self.spending.cost, groups)
            facts["plan"] = decisions(plan)
        if note:
            plan = replace(plan, reason=f"{plan.reason}; {note}", drop_and_grow=0.0)
            warn(f"{note}, so that the other groups carry the cut")
        self.spending.account.learned(plan.flops)
        if plan.gave_way:
            warn(f"{plan.gave_way}, and the reference pauses until the next decision")
        return observation, state, plan

    def _act(self, plan: Plan, state: Any, reading: Reading) -> Change:
        """Carry a plan out; sensor and controller follow."""
        change = Change()
        watched = self.losses.watching and not self.spending.account.resizes
        if plan.drops() and watched and self.parts.revocable is not None:  # the loss may ask to take the cut back
            self._parts = replace(self.parts, actuator=self.parts.revocable(), revocable=None)
        if not plan.empty():
            smaller = Change(keep=plan.keep)  # followed first: whatever can fail comes before the model changes
            sensed, state = follow(self._sensor_state, smaller), follow(state, smaller)
            with self.spending.account.watch.resizing:
                change = self.actuator.act(plan, reading)
            larger = replace(change, keep={})
            self._sensor_state, state = follow(sensed, larger), follow(state, larger)
            self.losses.changed(self.step, cut=plan.drops())
            if self.actuator.by_unit:
                self.spending.resized(self.groups, self.sensor.flops(self.groups, self.host.model))
        self._controller_state = state
        return change

    def _entry(self, plan: Plan | None, before: Mapping[str, int], reason: str) -> Entry:
        """An entry on the present widths; `plan` is the last one, `before` are the widths that the meters read."""
        entry = self.spending.entry(self.step, plan, self.groups, before, reason)
        rate = highest_rate(self.host.optimizers)
        return replace(entry, loss=self.losses.loss, val=self.losses.val, learning_rate=rate)

    def _read(self) -> Reading:
        """A reading whose skipped steps count from the last one; of a model that was changed there is none."""
        self._unchanged.check(self.groups)
        reading, before = self.reading(), self._state.skipped
        self._state = replace(self._state, skipped=reading.skipped_steps)
        return replace(reading, skipped_steps=reading.skipped_steps - before)

    # What changes a run's goal.

    def _go_on(self) -> None:
        """Go on with another budget or length: without a bump, and without a last decision that held for other ones."""
        spending = self.spending
        if self._state.budget_met and spending.limit_run:
            self._reopen()
        spending.replan(self.step, self.widths)
        cost = spending.cost
        if spending.budgets and isinstance(self.controller, Transferring):
            present, limit = cost.total(self.widths), spending.limits.held[cost.resource]
            self._controller_state = self.controller.transferred(
                self._controller_state, step=self.step, total_steps=spending.planned_steps, present=present, limit=limit
            )

    def _reopen_if_over(self) -> None:
        """Where a decision would be due: decide again if meters say that the run will be over its budget."""
        if self.controller.due(self.step, self.spending.planned_steps) and self.spending.over(self.step, self.widths):
            self._reopen()

    def _reopen(self) -> None:
        """Take the last decision back, and decide again once some fresh steps have been sensed."""
        plan = self._state.plan
        if plan is not None:
            again = self.step + max(1, min(_FRESH_STEPS, (self.total_steps - self.step) // 10))
            self._state = replace(self._state, budget_met=False, plan=replace(plan, budget_met=False), again=again)
