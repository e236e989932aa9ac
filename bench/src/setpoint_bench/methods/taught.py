"""Methods with a teacher: what trains, pruned or not, learns the answers of the finished dense model as well."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast, final

from torch import Tensor, nn

from setpoint.distillation import Teacher
from setpoint_bench.course import Batches, Begun, Course, Outcome
from setpoint_bench.methods.in_training import Looped, Setpoint
from setpoint_bench.methods.scratch import Dense
from setpoint_bench.results import Result
from setpoint_bench.simple_task import SimpleTask, dense_widths


@final
@dataclass(frozen=True)
class Taught:
    """A method that begins with the weights that the task starts with, and trains with a teacher.

    The teacher is the finished dense run of the same seed, whose steps, FLOPs and seconds count as this method's, as
    its own passes do.

    Args:
        trains: the method.
        alpha: the teacher's share of the loss.
        temperature: by which logits are divided.
    """

    name: str
    trains: Setpoint | Dense
    alpha: float = 0.5
    temperature: float = 2.0
    paper: str = "Hinton et al., Distilling the knowledge in a neural network, 2015"
    needs: tuple[str, ...] = ("dense",)

    @property
    def family(self) -> str:
        return self.trains.family

    @property
    def sized(self) -> bool:
        return self.trains.sized

    def course(self, task: SimpleTask, budget: float, needed: Mapping[str, Result]) -> Course:
        """The dense widths; the dense run's weights are the teacher's."""
        course = self.trains.course(task, budget, needed)
        return Course(cast(SimpleTask, _Lesson(course.task)), course.widths, goes_on_from="dense", notes=course.notes)

    def begin(self, task: SimpleTask, model: nn.Module, budget: float, batches: Batches) -> Begun:
        """Take the trained model for the teacher, and begin with fresh weights."""
        lesson = cast(_Lesson, task)
        teacher = Teacher(copy.deepcopy(model), alpha=self.alpha, temperature=self.temperature)
        model.load_state_dict(task.build(dense_widths(task)).state_dict())
        optimizer, pruner = self.trains.begin(lesson.task, model, budget, batches)
        if isinstance(pruner, Looped):
            teacher.loop = pruner.loop
        lesson.teachers.append(teacher)
        return optimizer, pruner or _Bill(teacher, dense_widths(task))


@final
@dataclass(frozen=True, eq=False)
class _Bill:
    """What prunes nothing, and counts the passes of a teacher where no loop does."""

    teacher: Teacher
    widths: Mapping[str, int]

    def observe(self, loss: Tensor) -> None:
        """Nothing to decide."""

    def finish(self) -> Outcome:
        return Outcome(widths=self.widths, dense_widths=self.widths, overhead_flops=self.teacher.flops)


@final
@dataclass(frozen=True)
class _Lesson:
    """A task as it is, but for its loss once there is a teacher."""

    task: SimpleTask
    teachers: list[Teacher] = field(default_factory=list, hash=False, compare=False)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "task":  # asked of a copy that is not filled yet
            raise AttributeError(name)
        return getattr(self.task, name)

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        if not self.teachers:
            return self.task.loss(model, inputs, targets)
        (teacher,) = self.teachers
        own = self.task.scores(model, inputs)
        with self.task.autocast():
            taught = teacher.logits(inputs)
        return teacher.loss((self.task.training_criterion or self.task.criterion)(own, targets), own, taught.float())
