"""A loop: after each step of the user's training it senses, decides, acts and records."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any
from weakref import WeakSet

import numpy as np
from jaxtyping import Bool, Float64, Int
from torch import Tensor, nn

from setpoint.controller.plan import Observation, Plan, Regrowing, regrows
from setpoint.cost.budget import Budget
from setpoint.errors import GroupError, LoopError
from setpoint.groups.group import Group, widths_of
from setpoint.ledger import Entry, Ledger
from setpoint.loop.acting import act
from setpoint.loop.agreement import decisions, shared_reading, together
from setpoint.loop.change import go_on_with, reopen_if_over
from setpoint.loop.closing import summarise
from setpoint.loop.explanation import Explanation, explain
from setpoint.loop.hooks import StepHooks
from setpoint.loop.interrupt import uninterrupted
from setpoint.loop.joining import Joining
from setpoint.loop.parts import Parts
from setpoint.loop.planning import planned
from setpoint.loop.ranking import Ranking
from setpoint.loop.recompiling import Recompiling
from setpoint.loop.record import only_kept, refusal, spread, with_drops, with_returns
from setpoint.loop.regrowth import Regrowth
from setpoint.loop.sensing import reads_by_hooks, release, sense
from setpoint.loop.state import check_loading, resume, state_of
from setpoint.loop.summary import Summary
from setpoint.loop.watch import LossWatch
from setpoint.loop.weights import Weights
from setpoint.loop.wrapper import check_step
from setpoint.sensor.probe import Probe
from setpoint.sensor.reading import Reading
from setpoint.spending.spending import Spending

ATTACHED: WeakSet[nn.Module] = WeakSet()
"""Models that a loop is at work on."""


class Loop:
    """The running control loop; `attach` makes one.

    It works through the optimizers' own hooks: `sensor.update` before a step (in long runs not before each,
    see `sensed_every`), and after it, whenever the controller is due, a reading, a decision, a cut and a
    ledger entry. After the landing it only counts. Used as a context manager it finishes at the end, and only
    detaches if there was an exception.

    Args:
        parts: what it is made of.
        spending: what it is held to, and what has been spent so far.
    """

    def __init__(self, parts: Parts, spending: Spending) -> None:
        self._parts = parts
        self._spending = spending
        self._groups = parts.groups
        self._dense_widths = widths_of(parts.groups)
        self._weights = Weights(parts) if parts.sparsity is not None else None
        self._origin = {g.name: np.arange(g.num_units) for g in parts.groups if self._weights is None}
        self._sensor_state = parts.sensor.init(parts.groups, parts.model)
        self._controller_state = parts.controller.init(parts.groups)
        spending.sensing_flops = parts.sensor.flops(parts.groups, parts.model)  # as the model is held from here on
        self._ledger = Ledger(parts.header)
        self._step = self._skipped = self._again = 0
        self._begun = self._overdue = self._waits = self._landed = self._finished = False
        self._reading: Reading | None = None
        self._plan: Plan | None = None
        self._worth: dict[str, Float64[np.ndarray, " units"]] = {}
        self._summary: Summary | None = None
        self._watch, self._ranking = LossWatch(), Ranking()
        self._regrowth = Regrowth(parts, spending.account) if regrows(parts.controller) else None
        averaging, steps = parts.averaging, lambda: self._step
        self._joining = None if averaging is None else Joining(averaging, parts.ranks, steps, self._after_missed_step)
        self._recompiling = Recompiling(spending.account, len(parts.groups))
        self._hooks = StepHooks(parts.optimizers, self._before_step, self._after_step, partial(check_loading, parts))
        ATTACHED.add(parts.model)
        spending.begin()

    # What the user may ask.

    @property
    def ledger(self) -> Ledger:
        """Every decision so far."""
        self._watch.complete(self._ledger)
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
        if self._weights is not None:
            return self._weights.origin
        return {name: origin.copy() for name, origin in self._origin.items()}

    @property
    def masks(self) -> dict[str, Bool[Tensor, "..."]]:
        """By name of each masked weight tensor, True = active; empty where whole units are cut."""
        return {} if self._weights is None else {name: mask.clone() for name, mask in self._weights.masks.items()}

    @property
    def price(self) -> float:
        """The Lagrange multiplier of the budget that leads, loss per unit of its resource; 0 before a decision."""
        target, widths = self._spending.target, self.widths
        prices = target.prices(self._plan.price, widths) if self._plan else {}
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

    @property
    def budget(self) -> Budget | tuple[Budget, ...]:
        """The budget, or several; none with a `Price` or a `Tolerance`. May be set anew until the landing.

        The change is bumpless: the reference goes on from what a step costs now, down to the new limit. A
        `BudgetError` says that it cannot be met, a `LoopError` that it is frozen.
        """
        budgets = self._spending.budgets
        return budgets[0] if len(budgets) == 1 else budgets

    @budget.setter
    def budget(self, budget: Budget | Sequence[Budget]) -> None:
        self._spending.check_open(self._step, landed=self._landed or self._finished)
        go_on_with(self, self._spending.with_budget(budget, self._groups, self._step))

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run; may be set anew until `finish`, and what is left is planned afresh."""
        return self._spending.total_steps

    @total_steps.setter
    def total_steps(self, total_steps: int) -> None:
        if self._finished:
            raise LoopError("the run is finished: total_steps cannot be changed any more")
        go_on_with(self, self._spending.with_total_steps(total_steps, self._groups, self._step))

    def observe(self, *, loss: Tensor | float | None = None, val: Tensor | float | None = None) -> None:
        """Tell the loop the loss of the coming step, before `optimizer.step()`; it comes to the host only when needed.

        Args:
            loss: training loss, a number or a tensor of one element.
            val: validation loss, the same.

        Raises:
            ValueError: for a tensor of several elements.
        """
        self._watch.observe(self._step + 1, loss, val, keep=not self._landed)

    def explain(self, group: str, origin: int) -> Explanation:
        """What became of a unit, and why.

        Args:
            group: name of the group.
            origin: index of the unit in the dense model.

        Raises:
            GroupError: for a group that is not pruned here, or a unit that it never had; for single weights.
        """
        if self._weights is not None:
            raise GroupError("single weights are counted, not listed: see loop.masks and num_dropped in loop.ledger")
        plan = self._plan
        entry = (plan.step, plan.reason, self.price) if plan else (None, "", math.nan)
        saliency = self._reading.saliency if self._reading else {}
        resource = self._spending.target.binding(self.widths)
        groups, origin_of = self._parts.groups, self._origin
        return explain(self._ledger, groups, origin_of, group, origin, self._worth, saliency, entry, resource)

    def state_dict(self) -> dict[str, Any]:
        """All that the loop remembers, for `load_state_dict`; model and optimizers are saved beside it.

        It holds tensors, numbers and strings only, so that `torch.load(..., weights_only=True)` reads it. The states of
        PyTorch's, NumPy's and Python's global random generators are among them.

        Raises:
            CheckpointError: when a sensor or controller of your own keeps what cannot be stored.
            LoopError: in the middle of a step.
        """
        return state_of(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state: shrink the dense model and its optimizers as they were, and go on from there.

        Load it before the states of the model, its copies and the optimizers, which then have the right
        shapes. Everything is checked before anything is changed. The global random generators go on from where they
        were, too.

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
        if self._waits and not self._landed:
            warnings.warn(
                "decisions were due while ranks had run out of batches inside join(), and all were never back: the run "
                "has not landed. Use one join() for each epoch, and ranks of about as many batches",
                stacklevel=2,
            )
        self._watch.complete(self._ledger)
        known = (self._parts, self._spending, self._ledger, self._groups, self._step, self._plan, self._watch)
        self._summary = summarise(*known, self._weights)
        return self._summary

    def detach(self) -> None:
        """Take the hooks away and leave the model as it is; may be called again."""
        self._hooks.remove()
        release(self)
        self._spending.meter.stop()
        self._recompiling.stop()
        if self._joining is not None:
            self._joining.stop()
        if self._regrowth is not None:
            self._regrowth.stop()
        if self._weights is not None:
            self._weights.stop()
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
        with uninterrupted():
            self._ahead_of_step(grad_scale)

    def _after_step(self) -> None:
        with uninterrupted():
            self._behind_step(self._joining is None or self._joining.all_made())

    def _after_missed_step(self) -> None:
        with uninterrupted():
            self._behind_step(all_made=False)

    def _ahead_of_step(self, grad_scale: Tensor | None) -> None:
        check_step(self._parts, first=not self._begun)
        if self._joining is not None:
            self._joining.check(self._parts.controller, reads_by_hooks(self._sensor_state))
        self._begun = True
        if self._regrowth is not None:
            self._regrowth.end_probe(grad_scale)
        sense(self, grad_scale)
        if self._weights is not None:
            self._weights.before_step()

    def _behind_step(self, all_made: bool) -> None:
        self._step += 1
        self._spending.stepped()
        regrowth, total_steps = self._regrowth, self.total_steps
        if regrowth is not None:
            regrowth.ease()
        if self._weights is not None:
            self._weights.after_step()
        if self._step == total_steps + 1:
            warnings.warn(
                f"attach was told total_steps={total_steps}, and this is step {self._step}: training goes on, "
                "but Setpoint makes no more decisions",
                stacklevel=2,
            )
        elif self._step <= total_steps and not self._landed:
            due = self._parts.controller.due(self._step, total_steps) or self._step == self._again
            if (due or self._overdue) and all_made:
                self._decide(due)
            self._waits = self._waits or due and not all_made
            self._overdue = self._overdue or self._waits
            if regrowth is not None and not (self._landed or self._spending.meter.peak_wanted):
                regrowth.begin_probe(
                    self._step,
                    total_steps,
                    lambda: self._spending.spare_flops(self._step, self.widths),
                )
        elif self._step < total_steps:
            reopen_if_over(self)
        else:
            self._spending.read_joules(self.widths)
        self._begin_step()

    def _begin_step(self) -> None:
        """The next step begins: on the clock, unless it is watched for its bytes; with resting units it is not."""
        coming, total_steps = self._step + 1, self.total_steps
        due = coming <= total_steps and self._parts.controller.due(coming, total_steps)
        if self._weights is not None:
            self._weights.look(due and not self._landed)
        self._spending.prepare(self._watched(coming, due) and not (self._landed or self._finished))

    def _watched(self, coming: int, due: bool) -> bool:
        """Whether a coming step should be watched for its bytes: the last without resting units before a decision."""
        controller, total_steps = self._parts.controller, self.total_steps
        if self._regrowth is None or not isinstance(controller, Regrowing) or not regrows(controller):
            return due
        ahead = coming <= total_steps and controller.probe_due(coming, total_steps)
        return (due or ahead) and not self._regrowth.probing and not self._spending.meter.peak_known

    def _decide(self, due: bool) -> None:
        """Read, decide, act and record. After a bad reading, try again at the next step."""
        ranks, plan, alike = self._parts.ranks, None, {}
        self._overdue, self._waits = True, False  # also if anything is raised from here on
        with self._spending.deciding:
            reading = shared_reading(ranks, self._read, self._watch, self._step)
            self._watch.complete(self._ledger)
            self._spending.metered(self.widths)
            why_not = refusal(reading)
            if why_not is None:
                if self._weights is None:
                    alike = self._ranking.correlations(self._reading, reading, self._groups, self._parts.model)
                with together(ranks, f"the plan after step {self._step}") as facts:
                    probe = self._regrowth.probe(self._step) if self._regrowth is not None else None
                    seen = self._observation(reading, probe, alike)
                    held = self._controller_state
                    state, plan, again = planned(self._parts, self._spending, self._watch, self._groups, held, seen)
                    facts["plan"] = decisions(plan)
                self._again = again or self._again
        if plan is not None:
            self._spending.learned(plan.flops)
            origin, before = self._origin, self.widths
            regrown, note = act(self, plan, state, reading)
            reason = f"{plan.reason}; {note}" if note else plan.reason
            entry = self._entry(reason, plan, before)
            if self._weights is not None:
                self._ledger.append(self._weights.told(entry))
            else:
                entry = replace(entry, rank_correlation=alike)
                self._ledger.append(with_returns(with_drops(entry, plan, reading, origin), plan, probe))
                self._worth = spread(only_kept(plan.worth, plan), regrown)
                saliency = spread(only_kept(reading.saliency, plan), regrown)
                self._reading = replace(reading, saliency=saliency, slope={}, norm={})
                self._ranking.note(self._reading, self._groups, self._parts.model)
            self._spending.read_joules(self.widths)
            self._plan, self._landed, self._overdue = plan, plan.landed, False
            if self._landed and self._regrowth is not None:
                self._regrowth.release()
        elif due and why_not is not None:
            self._ledger.append(self._entry(why_not, self._plan, self.widths))

    def _read(self) -> Reading:
        """A reading whose skipped steps count from the last one."""
        reading = self._parts.sensor.read(self._sensor_state, self._groups, self._step)
        if self._weights is not None:
            reading = self._weights.patterned(reading, self._groups)
        before, self._skipped = self._skipped, reading.skipped_steps
        return replace(reading, skipped_steps=reading.skipped_steps - before)

    def _observation(self, reading: Reading, probe: Probe | None, alike: Mapping[str, float]) -> Observation:
        last_dropped = self._regrowth.last_dropped if self._regrowth is not None else {}
        watch, step = self._watch, self._step
        return self._spending.observation(
            step,
            self._groups,
            reading,
            probe=probe,
            last_dropped=last_dropped,
            rank_correlation=alike,
            loss=watch.loss,
            val=watch.val,
            excess=watch.excess(step),
        )

    def _entry(self, reason: str, plan: Plan | None, before: Mapping[str, int]) -> Entry:
        """An entry on the present widths; `plan` is the last one, `before` are the widths that the meters read."""
        entry = self._spending.entry(self._step, plan, self._groups, before, reason)
        return replace(entry, loss=self._watch.loss, val=self._watch.val)
