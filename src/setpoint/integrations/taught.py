"""A Trainer of transformers whose model also learns from a teacher, which a callback cannot let it do."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from setpoint.actuator.model_shapes import was_cut
from setpoint.distillation.teacher import Teacher, logits_of
from setpoint.integrations.session import Session
from setpoint.one_shot.forward import without_training

_Trainer: Any = object  # not transformers' own: only integrations/transformers.py imports that


class Taught(_Trainer):  # type: ignore[misc]
    """A Trainer whose model also learns from a teacher; also a mixin.

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
        self._session()
        return super().train(*args, **settings)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        asked = {name: value for name, value in inputs.items() if name != "labels"}  # the Trainer may take them out
        learns = model.training and self.teacher.alpha > 0
        accumulated = self.current_gradient_accumulation_steps
        # Where the Trainer's loss is a part of one of all batches of the step, the teacher's must be a part, too.
        divides = learns and accumulated > 1 and self._divides_by_items(model, inputs, num_items_in_batch)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if learns:
            own, mask = logits_of(outputs), asked.get("attention_mask")
            fits = isinstance(mask, Tensor) and mask.shape == own.shape[:-1]
            taught = self.teacher.distance(own, self._teachers_logits(asked), mask if fits else None)
            taught = taught / accumulated if divides else taught
            loss = (1 - self.teacher.alpha) * loss + self.teacher.alpha * taught
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _divides_by_items(self, model: nn.Module, inputs: dict[str, Any], num_items: Any) -> bool:
        """Whether the loss is divided by the number of items in all batches of a step."""
        if self.compute_loss_func is not None:
            return True
        if not self.model_accepts_loss_kwargs or num_items is None:
            return False
        if self._divides is None:
            # Some heads of transformers take the number and leave it unused, so it is tried out, once.
            loss_of = super().compute_loss
            with without_training(model, "running"):
                one, half = (loss_of(model, dict(inputs), num_items_in_batch=n) for n in (num_items, 2 * num_items))
            if not bool(torch.isfinite(one)):
                return True  # a step that is skipped decides nothing
            self._divides = bool(half < 0.75 * one)
        return self._divides

    def _teachers_logits(self, inputs: dict[str, Any]) -> Tensor:
        self.teacher.model.to(self.args.device)
        self.teacher.loop = self._session().loop  # for the FLOPs of its forward
        with self.accelerator.autocast():
            return self.teacher.logits(**inputs)

    def _session(self) -> Session:
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, Session):
                return callback
        raise ValueError("SetpointTrainer prunes by its callback: give callbacks=[SetpointCallback(0.5)]")
