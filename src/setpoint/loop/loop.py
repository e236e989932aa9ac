"""A loop: what the user has of a run - what to ask it, what to report, how to save it, and how it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, final

import numpy as np
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.optim import Optimizer

from setpoint.actuator.in_state_dict import ATTACHED, RESUMING, WITHIN_BUDGET, note_attached
from setpoint.actuator.optimizer_check import check_state
from setpoint.cost.budget import Budget
from setpoint.distributed import unwrapped
from setpoint.errors import CheckpointError, GroupError, LoopError, NotBegunError, RankError
from setpoint.groups.group import Group
from setpoint.host.find import real_optimizer
from setpoint.host.host import Host
from setpoint.ledger import Ledger
from setpoint.loop.calls import FirstSteps
from setpoint.loop.candidates import Inputs
from setpoint.loop.control import Control, Parts
from setpoint.loop.first_batch import FirstBatch
from setpoint.loop.hooks import StepHooks
from setpoint.loop.losses import Losses
from setpoint.loop.resume import AGAIN, load_state, state_of
from setpoint.loop.summary import Event, Explanation, Summary, explain, summarise, warn_of_miss
from setpoint.sensor.reading import Reading
from setpoint.spending.metrics import line
from setpoint.spending.spending import Spending


@final
class Loop:
    """The running control loop, which changes at every step; `setpoint.attach` makes one.

    The loop works through the optimizers' own hooks. The sensor reads before a step (`sensed_every` says before which).
    A decision after a step is a reading, a plan, a change and a ledger entry. After the last decision the loop only
    counts. A `with` block finishes the loop at its end; after an exception the block only detaches the loop.

    Without an example the run begins at the first optimizer step: what depends on it raises a
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
    (True, {'0': 32}, {'0': 15}, 1)
    """

    def __init__(self, host: Host) -> None:
        self.host, self.losses = host, Losses()
        self.summary: Summary | None = None
        """What `finish` returned, or None before."""
        self._control: Control | None = None
        self._first: FirstBatch | None = None
        self._failed = ""  # why it could not begin
        self._callbacks: dict[object, Callable[[Any], None]] = {}
        self._at_detach = ExitStack()
        self._hooks = StepHooks(host.optimizers, self._before_first_step, lambda: None, self._loading)
        note_attached(host.model)  # from here on no other loop may attach, also while this one waits

    def __repr__(self) -> str:
        return line(self.metrics(), finished=self.summary is not None)

    # How it begins.

    def wait(self, first: FirstBatch) -> None:
        """Begin at the first optimizer step, with the batch that this has recorded until then."""
        self._first = first
        self.at_detach(first.stop)

    def watch(self, inputs: Inputs, listen: Callable[..., object], *, outside: bool, method: str) -> None:
        """Compare the first steps with the example."""
        self.at_detach(FirstSteps(self.host.model, listen, inputs, self._hooks, outside, method).stop)

    def at_detach(self, stop: Callable[[], None]) -> None:
        self._at_detach.callback(stop)

    def begin(self, parts: Parts) -> None:
        """Begin with these parts, before the first optimizer step or in it."""
        self._control = control = Control(self.host, parts, self.losses, self._hooks, self._callbacks)
        # Behind the discovery: only groups say which tensors are cut, and must have moments of their shape.
        for optimizer in self.host.optimizers:
            check_state(optimizer, self.host.model, control.dense)
        # From here on the hooks call the control itself: one frame less at every step.
        self._hooks.before, self._hooks.after = control.before_step, control.after_step

    def _before_first_step(self, grad_scale: Tensor | None) -> None:
        assert self._first is not None, "without an example the first batch is recorded"
        try:
            if not self._first.begin(self._hooks.unseen.passes):
                return
        except BaseException as error:
            # After Ctrl-C the next step is another try. Of several ranks, the others have failed by now.
            ends = isinstance(error, Exception) or self.host.ranks.count > 1
            if ends:
                self.detach()
                self._control = None
            then = "was detached: correct this, and call attach again" if ends else "begins at the next optimizer step"
            self._failed = f"the loop could not begin ({type(error).__name__}: {error}), and {then}"
            raise
        self.control.before_step(grad_scale)

    def _loading(self, optimizer: Optimizer, saved: dict[str, Any]) -> None:
        if self._control is not None:
            check_state(optimizer, self.host.model, self._control.dense, saved)

    @property
    def control(self) -> Control:
        """What runs at every step; NotBegunError before the first step, where `attach` was given no example."""
        if self._control is None:
            raise NotBegunError(
                "the loop begins at the first optimizer step, as attach was given no example: ask it after that step"
            )
        return self._control

    @property
    def spending(self) -> Spending:
        """What the run may spend and has spent."""
        return self.control.spending

    # What the user may ask.

    @property
    def ledger(self) -> Ledger:
        """Every decision so far."""
        ledger = self.control.ledger
        self.losses.complete(ledger)
        return ledger

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups that may be pruned, at their present widths."""
        return self.control.groups

    @property
    def widths(self) -> dict[str, int]:
        """Active units by group."""
        return self.control.widths

    @property
    def dense_widths(self) -> dict[str, int]:
        """Units by group of the dense model."""
        return dict(self.spending.dense_widths)

    @property
    def origin(self) -> dict[str, Int[np.ndarray, " units"]]:
        """By group, the index that each active unit has in the dense model."""
        return {name: units.copy() for name, units in self.control.actuator.origin.items()}

    @property
    def masks(self) -> dict[str, Bool[Tensor, "..."]]:
        """Mask of each masked weight tensor by name, True = active; empty where whole units are cut."""
        return {name: mask.clone() for name, mask in self.control.actuator.masks.items()}

    @property
    def price(self) -> float:
        """The Lagrange multiplier of the budget that leads, loss per unit of its resource; 0 before a decision."""
        limits, plan, widths = self.spending.limits, self.control.state.plan, self.widths
        return float(limits.prices(plan.price, widths).get(limits.binding(widths), 0.0)) if plan else 0.0

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return 0 if self._control is None else self._control.step

    @property
    def budget_met(self) -> bool:
        """Whether the last decision has been made, as predicted within budget; after `finish` what the summary says."""
        if self.summary is not None:
            return self.summary.budget_met
        return self._control is not None and self._control.state.budget_met

    @property
    def budget(self) -> Budget | tuple[Budget, ...]:
        """The budget, or several; none with a `Price` or a `Tolerance`. May be changed until the last decision.

        It takes what `attach` takes. The change is bumpless: the reference continues from what a step costs now. A
        `BudgetError` says that the budget cannot be met, a `LoopError` that it is frozen.
        """
        budgets = self.spending.budgets
        return budgets[0] if len(budgets) == 1 else budgets

    @budget.setter
    def budget(self, budget: Any) -> None:
        from setpoint.spending.changes import change_budget  # late: few runs change theirs

        met = self.budget_met or self.control.finished
        change_budget(self.spending, budget, self.groups, self.step, budget_met=met)
        self.control.go_on()

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run; may be changed until `finish`, and the rest is planned again."""
        return self.spending.run_steps

    @total_steps.setter
    def total_steps(self, total_steps: int) -> None:
        if self.control.finished:
            raise LoopError("the run is finished: total_steps cannot be changed any more")
        from setpoint.spending.changes import change_total_steps

        change_total_steps(self.spending, total_steps, self.groups, self.step)
        self.control.go_on()

    def observe(self, *, loss: Tensor | float | None = None, val: Tensor | float | None = None) -> None:
        """Report the training or validation loss of the coming step, before `optimizer.step()`: a number or a tensor.

        A tensor stays on its device until a decision needs it; one of several elements raises a `ValueError`.
        """
        self.losses.observe(self.step + 1, loss, val, keep=not self.budget_met)

    def metrics(self) -> dict[str, float]:
        """Numbers of the run by name (docs/watching.md): the same names at every step, none before `begin`."""
        if self._control is None:
            return {}
        return {**self._control.metrics(), "budget_met": float(self.budget_met)}

    def on_step(self, callback: Callable[[Event], None]) -> Callable[[], object]:
        """Call a function after each step with its entry or None, and at the end with the summary; returns a stop."""
        key = object()  # the same function may be added twice
        self._callbacks[key] = callback
        return partial(self._callbacks.pop, key, None)

    def reading(self) -> Reading:
        """What the sensor reads now, on this rank; no decision is made on this reading."""
        return self.control.sensor.read(self.control.sensor_state, self.groups, self.step)

    def explain(self, group: str, origin: int) -> Explanation:
        """What happened to the unit of a group that has this index in the dense model, and why.

        Raises:
            GroupError: for a group that is not pruned here, or a unit that it never had; for single weights.
        """
        if not self.control.actuator.by_unit:
            raise GroupError("single weights are counted, not listed: see loop.masks and num_dropped in loop.ledger")
        return explain(self.control, group, origin, self.price, self.spending.limits.binding(self.widths))

    def state_dict(self) -> dict[str, Any]:
        """The loop's state, for `load_state_dict`; model and optimizers are saved with it.

        The state holds tensors, numbers and strings only, so `torch.load(..., weights_only=True)` reads it. PyTorch's,
        NumPy's and Python's global random generators are among them.

        Raises:
            CheckpointError: when a sensor or controller of your own keeps what cannot be stored.
            LoopError: in the middle of a step.
        """
        if self._hooks.within_step:
            raise LoopError("a checkpoint in the middle of a step cannot be resumed: take it after optimizer.step()")
        return state_of(self.control)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the state of a loop attached with the same arguments: shrink the dense model, and continue.

        It is loaded before the states of the model, its copies and the optimizers, which then have the right shapes.
        All of it is checked before anything is changed. The global random generators continue, too.

        Raises:
            CheckpointError: when the state is of another model, budget or length of run, or is no state of a loop.
            LoopError: when this loop has made a step already.
        """
        if self.step or len(self.ledger) or self.control.finished:
            raise LoopError(
                f"only a freshly attached loop can take over a state, this one is at step {self.step}: {AGAIN}"
            )
        load_state(self.control, state)

    def check_saved_with(self, name: str, parts: Sequence[Any]) -> None:
        """Check that a run file has the model, optimizers and copies, whose tensors the loop's state has not."""
        saved = {id(unwrapped(part) if isinstance(part, nn.Module) else real_optimizer(part)) for part in parts}
        host = self.host
        for what, needed in {"model": [host.model], "optimizer": host.optimizers, "copy": host.named_copies}.items():
            if not {id(part) for part in needed} <= saved:
                raise CheckpointError(f"{name!r} is of no use without its {what}: save_run(path, {what}=..., ...)")

    @contextmanager
    def restored_on_error(self, what: str, *others: Any) -> Iterator[None]:
        """Inside, states are loaded on all ranks or on none: after an exception loop, model and `others` are as before.

        Tensors that `fully_shard` has sharded are not put back.
        """
        from setpoint.checkpoint.run_file import snapshot  # late: only a run that loads something needs it

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
        if self._control is None:
            raise NotBegunError(
                self._failed
                or "no optimizer step was made since attach, so that nothing was found and nothing pruned: check that "
                "the loader has batches, and that the attached optimizer is the one that steps"
            )
        control = self._control
        if control.finished:
            raise LoopError("finish() has been called already: its result is in loop.summary")
        control.end_visit()  # before the hooks go: units that visit must not stay in the finished model
        self.detach()
        control.finished = True
        self.summary = done = summarise(control)
        self.ledger.end(done.steps, done.total_steps, budget_met=done.budget_met, reason=done.reason, note=done.note)
        warn_of_miss(done, self._hooks.unseen.passes)
        if done.budget_met:
            WITHIN_BUDGET.add(self.host.model)
        control.notify(done)
        return done

    def detach(self) -> None:
        """Take the hooks away and leave the model as it is; may be called again."""
        self._at_detach.close()
        self._hooks.remove()
        if self._control is not None:
            self._control.stop()
        ATTACHED.discard(self.host.model)
        RESUMING.discard(self.host.model)

    def __enter__(self) -> Loop:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            if kind is None and not (self._control is not None and self._control.finished):
                self.finish()
        finally:
            self.detach()
