"""Hugging Face Trainer: `Trainer(..., callbacks=[SetpointCallback(0.5)])`, and one with a teacher."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from setpoint.actuator.lift import was_cut
from setpoint.arguments import check_settings
from setpoint.attach import attach
from setpoint.checkpoint.resumable import resumable
from setpoint.cost.parse import parse_budget
from setpoint.cost.tolerance import Tolerance
from setpoint.distillation.teacher import Teacher, logits_of
from setpoint.errors import LoopError, NotBegunError
from setpoint.integrations.bill import SPENT, came_spent, is_spent
from setpoint.integrations.huggingface import enable_huggingface
from setpoint.loop.loop import Loop
from setpoint.loop.summary import Summary
from setpoint.messages import warn
from setpoint.one_shot.forward import without_training

try:
    from transformers import Trainer, TrainerCallback
except ImportError as error:
    raise ImportError("setpoint.integrations.transformers needs transformers: pip install transformers") from error

_LOGGED = ("budget_met", "units", "overhead_flops_ratio")


class SetpointCallback(TrainerCallback):  # type: ignore[misc]
    """Prunes the model of a `Trainer` while it trains.

    Steps, inputs, accumulation and mixed precision are the Trainer's own. Its checkpoints carry sizes and the loop's
    state, so that `resume_from_checkpoint` goes on and `load_best_model_at_end` works. The Trainer's logs hold under
    `setpoint/` how many units there are, what a step costs as a share of dense, the share of Setpoint's own work, and
    whether the budget is met; `log_to(callback.loop, ...)` logs all that the loop measures.

    Args:
        budget: as `attach` takes it: 0.5 is half of the dense model's FLOPs.
        best_within_budget: whether the Trainer's best checkpoint is the best of those within the budget; by default
            an earlier, larger one may be the best, which is warned of when it is loaded.
        settings: further arguments of `attach`, such as `controller`, `sensor` or `copies`. With a bill, `total_steps`
            is the length of the dense run that a share of the bill is one of, by default `max_steps`: the Trainer stops
            when the bill is spent, so give it more.

    Attributes:
        loop: the loop at work; None before training.
        summary: the summary of the run; None before its end.

    >>> callback = SetpointCallback(0.5)
    >>> callback.loop is None
    True
    """

    def __init__(self, budget: Any = 0.5, *, best_within_budget: bool = False, **settings: Any) -> None:
        check_settings(settings, SetpointCallback, attach)
        # What is no budget, or none for a Trainer, is refused here, and not when the training begins.
        if isinstance(parse_budget(budget), Tolerance):
            raise ValueError(
                "a Tolerance needs the loss of each step, which a callback of the Trainer is not given: use a budget "
                "or a Price, or a loop of your own with loop.observe(loss)"
            )
        self.budget, self.settings, self.best_within_budget = budget, settings, best_within_budget
        self._was_within = True
        self.loop: Loop | None = None
        self.summary: Summary | None = None
        enable_huggingface()

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the model resumable before the Trainer loads anything into it."""
        resumable(kwargs["model"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach: at the first step, or to what a checkpoint has left."""
        handler, trainer = _callers(self)
        if sum(isinstance(each, SetpointCallback) for each in handler.callbacks) > 1:
            raise ValueError("a Trainer takes one SetpointCallback, and was given several: leave one")
        # First of all, so that what it adds to the logs is there when the others report them.
        handler.callbacks.remove(self)
        handler.callbacks.insert(0, self)
        wrapped = getattr(trainer, "model_wrapped", None)
        model = kwargs["model"] if wrapped is None else wrapped  # a compiled model has no truth value
        settings = {"resume": True, "total_steps": state.max_steps, **self.settings}
        if self.loop is not None:  # of a run that an exception has ended
            self.loop.detach()
        self.loop = self.summary = None
        self._was_within = True  # a run that goes on within its budget keeps its best checkpoint
        self.loop = attach(model, kwargs["optimizer"], self.budget, **settings)
        if settings["resume"] and came_spent(self.loop, kwargs["optimizer"]):
            self.loop.detach()
            # A Trainer makes one step before it looks whether it is to stop.
            raise LoopError(f"{SPENT}: nothing is left to train, so load the model from the checkpoint's folder")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop when the bill is spent; finish with the last step, before the Trainer loads its best model."""
        within = self.loop is not None and self.loop.budget_met
        if self.best_within_budget and within and not self._was_within:
            state.best_metric = state.best_model_checkpoint = state.best_global_step = None
        self._was_within = within
        if self.loop is not None and is_spent(self.loop):
            control.should_training_stop = True
            # What the Trainer does at its own last step, too.
            control.should_save |= args.save_strategy == "steps"
            control.should_evaluate |= args.eval_strategy == "steps" and args.eval_delay <= state.global_step
            best = args.save_strategy == "best" and args.eval_strategy == "steps"
            if args.save_strategy in ("steps", "epoch") or best:
                return  # the last checkpoint is yet to come, and holds the loop's state
        if state.global_step >= state.max_steps or control.should_training_stop:
            self._finish()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Finish where the evaluation after the last step was not the best, so that no checkpoint was saved."""
        if control.should_training_stop and args.save_strategy == "best":
            self._finish()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Finish after the last checkpoint, before the Trainer loads its best model."""
        if control.should_training_stop:
            self._finish()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add what the loop measures to what the Trainer logs."""
        if self.loop is not None and logs is not None and "loss" in logs:
            found = self.loop.metrics().items()
            metrics = {f"setpoint/{name}": value for name, value in found if name in _LOGGED or "cost_ratio/" in name}
            logs.update(metrics)
            if state.log_history:
                state.log_history[-1].update(metrics)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Finish where training has ended early, and compare with the model that the Trainer has loaded."""
        self._finish()
        if self.summary is not None and args.load_best_model_at_end and state.best_model_checkpoint:
            ours = self.summary.final_params + self.summary.masked_params
            if (loaded := sum(each.numel() for each in kwargs["model"].parameters())) > ours:
                warn(
                    f"the best checkpoint that the Trainer has loaded, {state.best_model_checkpoint}, has {loaded:,} "
                    f"parameters, and the model at the end of training had {ours:,}: it was saved before the last cut. "
                    "SetpointCallback(..., best_within_budget=True) counts only checkpoints within the budget"
                )

    def _finish(self) -> None:
        if self.loop is not None and self.summary is None:
            try:
                self.summary = self.loop.finish()
            except NotBegunError:  # there was nothing left to train
                self.loop.detach()


class SetpointTrainer(Trainer):  # type: ignore[misc]
    """A Trainer whose model also learns from a teacher, which a callback cannot let it do; also a mixin.

    While it trains, the loss is that of `setpoint.distillation.Teacher` with the Trainer's own; rows of logits count
    where `attention_mask` is 1. Evaluation keeps its loss. The FLOPs of the teacher's forward are counted as overhead.

    Args:
        args: of `Trainer`, a `SetpointCallback` among its callbacks.
        teacher: of which the logits have the shape of the model's. By default a frozen copy of the model as it is when
            the Trainer is made, which suits a dense model that was fine-tuned on the task before. A head that is new
            has nothing to teach: there give the fine-tuned dense model, or leave `SetpointTrainer` out.
        alpha: share of the teacher in the loss, from 0 to 1.
        temperature: T, above 0.
        settings: of `Trainer`.

    Attributes:
        teacher: the `Teacher`.

    Raises:
        ValueError: for settings out of range, a model that was cut before and no teacher, a model as its own teacher,
            no `SetpointCallback`, or logits that do not fit.

    >>> class Distilled(SetpointTrainer):  # or (SetpointTrainer, Seq2SeqTrainer)
    ...     pass
    """

    def __init__(
        self,
        *args: Any,
        teacher: nn.Module | None = None,
        alpha: float = 0.5,
        temperature: float = 2.0,
        **settings: Any,
    ) -> None:
        super().__init__(*args, **settings)
        if teacher is None and was_cut(self.model):
            raise ValueError("the model was cut before, so that no dense copy can teach it: give teacher=")
        if isinstance(teacher, nn.Module) and (self.model in teacher.modules() or teacher in self.model.modules()):
            raise ValueError("the teacher is the model that is pruned: leave teacher out to have a frozen copy of it")
        taught_by = copy.deepcopy(self.model) if teacher is None else teacher
        self.teacher = Teacher(taught_by, alpha=alpha, temperature=temperature)
        self._divides: bool | None = None

    def train(self, *args: Any, **settings: Any) -> Any:
        """Train as ever."""
        self._callback()
        return super().train(*args, **settings)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of the Trainer, and in training the teacher's."""
        asked = {name: value for name, value in inputs.items() if name != "labels"}  # the Trainer may take them out
        divides = False
        if model.training and self.teacher.alpha and self.current_gradient_accumulation_steps > 1:
            divides = self._divides_by_items(model, inputs, num_items_in_batch)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if model.training and self.teacher.alpha:
            own, mask = logits_of(outputs), asked.get("attention_mask")
            usable = isinstance(mask, Tensor) and mask.shape == own.shape[:-1]
            taught = self.teacher.distance(own, self._taught(asked), mask if usable else None)
            if divides:  # the loss is a part of one of all batches of the step, and so is the teacher's
                taught = taught / self.current_gradient_accumulation_steps
            loss = (1 - self.teacher.alpha) * loss + self.teacher.alpha * taught
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _divides_by_items(self, model: nn.Module, inputs: dict[str, Any], items: Any) -> bool:
        """Whether the loss is divided by the items of all batches of a step.

        Some heads of Transformers take their number and leave it unused, so it is tried out, once.
        """
        if self.compute_loss_func is not None:
            return True
        if not self.model_accepts_loss_kwargs or items is None:
            return False
        if self._divides is None:
            loss_of = super().compute_loss
            with without_training(model, "running"):
                one, half = (loss_of(model, dict(inputs), num_items_in_batch=number) for number in (items, 2 * items))
            if not bool(torch.isfinite(one)):
                return True  # a step that is skipped decides nothing
            self._divides = bool(half < 0.75 * one)
        return self._divides

    def _taught(self, inputs: Mapping[str, Any]) -> Tensor:
        self.teacher.model.to(self.args.device)
        self.teacher.loop = self._callback().loop
        with self.accelerator.autocast():
            return self.teacher.logits(**inputs)

    def _callback(self) -> SetpointCallback:
        found = [each for each in self.callback_handler.callbacks if isinstance(each, SetpointCallback)]
        if not found:
            raise ValueError("SetpointTrainer prunes by its callback: give callbacks=[SetpointCallback(0.5)]")
        return found[0]


def _callers(callback: SetpointCallback) -> tuple[Any, Any]:
    """The handler that calls a callback now, and its Trainer: no argument of an event names them."""
    handler = trainer = None
    frame = sys._getframe(1)
    while frame is not None and trainer is None:
        owner = frame.f_locals.get("self")
        if handler is None and callback in (getattr(owner, "callbacks", None) or ()):
            handler = owner
        elif handler is not None and getattr(owner, "callback_handler", None) is handler:
            trainer = owner
        frame = frame.f_back  # type: ignore[assignment]
    assert handler is not None, "a callback is called by its handler"
    return handler, trainer
