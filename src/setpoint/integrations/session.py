"""A session: what the callback of every framework does with a run - begin, look after each step, finish."""

from collections.abc import Iterable, Sequence
from inspect import signature
from typing import Any

from torch import nn

from setpoint.attach import attach
from setpoint.checkpoint.resumable import resumable
from setpoint.cost.budget import Budget, parse_budget
from setpoint.distillation.teacher import Teacher
from setpoint.distillation.teaching import as_teacher
from setpoint.errors import LoopError, NotBegunError
from setpoint.host.find import real_optimizers
from setpoint.loop.carrying import KEY, brought
from setpoint.loop.loop import Loop
from setpoint.loop.summary import Summary


class Session:
    """Prunes the model that a framework's trainer trains; it changes with each run.

    A framework's callback is a `Session` that maps events to calls: `prepare` before a checkpoint is loaded, `begin`
    when it has been loaded, `stepped` after each optimizer step, and `finish` after the last checkpoint, which still
    holds the loop's state. After an exception it calls `stop`.

    Args:
        budget: as for `attach`.
        settings: further arguments of `attach`. They win over what the trainer says.

    Attributes:
        loop: the loop of the present run or the last one; None before.
        summary: the summary of the last run; None before its end.

    Raises:
        TypeError: for a setting that `attach` does not take.
        BudgetError: for what is no budget.

    >>> Session("50% flops").loop is None
    True
    """

    module = ""
    """Name of the part that is pruned; all by default."""

    def __init__(self, budget: Any, **settings: Any) -> None:
        signature(attach).bind_partial(**settings)  # what attach does not take is refused now, too
        self.budget, self.settings = budget, settings
        self.goal = parse_budget(budget)  # what is no budget is refused here, and not when training begins
        budgets = self.goal if isinstance(self.goal, Sequence) else [self.goal]
        # One budget says how long the run is, the other what a step takes.
        self.has_run_budget = {one.per for one in budgets if isinstance(one, Budget)} == {"step", "run"}
        self.loop: Loop | None = None
        self.summary: Summary | None = None
        self.trainer: Any = None  # set where a framework's events do not name it

    def prepare(self, *models: nn.Module, callbacks: Iterable[Any] = ()) -> None:
        """Let models, averages too, take the sizes of any checkpoint that is loaded into them.

        Raises:
            LoopError: where several of the trainer's callbacks prune.
        """
        if sum(isinstance(callback, Session) for callback in callbacks) > 1:
            raise LoopError(f"{type(self).__name__} was given to the Trainer twice: give it once, with all budgets")
        self.stop()
        for model in models:
            resumable(model)
        if self.settings.get("teacher") is True and models:  # before a checkpoint is loaded into the model
            self.settings["teacher"] = as_teacher(models[0].get_submodule(self.module), True)

    def begin(self, model: nn.Module, optimizers: Any, **known: Any) -> None:
        """Attach to what trains now.

        Args:
            model: in its wrappers, as the training loop calls it.
            optimizers: one or several.
            known: what the trainer knows of `attach`'s arguments: `total_steps`, None where it does not know, and the
                averages that it keeps as `copies`.

        Raises:
            LoopError: where nobody knows how many steps there will be, or where the checkpoint that was loaded is of a
                run that has spent its budget; and what `attach` raises.
        """
        self.stop()
        self.loop = self.summary = None
        settings = {"resume": True, **known, **self.settings}
        if settings.get("total_steps") is None:
            raise LoopError(
                "the trainer does not know how many optimizer steps it will make (its data has no length, or it stops "
                f"by the clock): give {type(self).__name__}(..., total_steps=N), or the trainer a number of steps"
            )
        if not settings["resume"]:  # as the user has asked for: nothing to warn of
            for optimizer in real_optimizers(optimizers):
                optimizer.param_groups[0].pop(KEY, None)
        if teacher := settings.get("teacher"):
            taught_by = teacher.model if isinstance(teacher, Teacher) else teacher
            if isinstance(taught_by, nn.Module):  # the trainer may have moved the model
                taught_by.to(next(model.parameters()).device)
        self.loop = attach(model, optimizers, self.budget, **settings)
        if not (self.has_run_budget and settings["resume"]):
            return
        # A loop without an example takes the state over in its first step, so it does not know of its end before.
        state = brought(optimizers[0] if isinstance(optimizers, Sequence) else optimizers)
        if self.stepped() if state is None else state["now"]["step"] >= state["spending"]["plan"]["length"]:
            self.stop()
            raise LoopError(
                "the checkpoint is of a run that has spent its budget: nothing is left to train, so load the model "
                "from the checkpoint"
            )

    def stepped(self) -> bool:
        """Whether the trainer is to stop, since the run has spent its budget; asked after each optimizer step."""
        return self.loop is not None and self.has_run_budget and 0 < self.loop.step >= self.loop.total_steps

    def metrics(self) -> dict[str, float]:
        """What the loop measures, for the trainer's own log."""
        return {} if self.loop is None else {f"setpoint/{name}": value for name, value in self.loop.metrics().items()}

    def finish(self) -> None:
        """End the run and keep its summary; a second call changes nothing."""
        if self.loop is None or self.summary is not None:
            return
        try:
            self.summary = self.loop.finish()
        except NotBegunError:  # no step was left to make
            self.loop.detach()

    def stop(self) -> None:
        """Take the loop off the model, as an exception has ended its run; may be called again."""
        if self.loop is not None:
            self.loop.detach()
