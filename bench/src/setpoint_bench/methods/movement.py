"""Movement pruning of units: the dense model, cut along a schedule by scores that training adds up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import final

from torch import Tensor, nn
from torch.optim import Optimizer

import setpoint
from setpoint_bench.baselines.scheduled import ScheduledController
from setpoint_bench.course import Course, Pruner
from setpoint_bench.looped import Looped
from setpoint_bench.movement_scores import MovementScores
from setpoint_bench.results import Result
from setpoint_bench.score_sensor import ScoreSensor
from setpoint_bench.task import Task, dense_widths


@final
@dataclass(frozen=True)
class Movement:
    """Units of lowest movement go along a cubic schedule, by default those of each layer ranked among themselves.

    Args:
        name: name on the command line and in result files.
        controller: says when and how far.
        learning_rate: peak of the schedule, relative to the task's.
        paper: where it comes from.
        family: kind of method, for reports.
        sized: always.
        needs: nothing.
    """

    name: str
    controller: ScheduledController = ScheduledController()
    learning_rate: float = 1.0
    paper: str = ""
    family: str = "open-loop"
    sized: bool = True
    needs: tuple[str, ...] = ()

    def course(self, task: Task, budget: float, needed: Mapping[str, Result]) -> Course:
        """The dense widths."""
        return Course(task.with_learning_rate_factor(self.learning_rate), dense_widths(task))

    def begin(
        self, task: Task, model: nn.Module, budget: float, batches: Iterator[tuple[Tensor, Tensor]]
    ) -> tuple[Optimizer, Pruner | None]:
        """A loop, and scores beside it."""
        optimizer = task.optimizer(model)
        scores = MovementScores(model, optimizer)
        loop = setpoint.attach(
            model,
            optimizer,
            setpoint.Budget.fraction(budget, of="flops"),
            example=task.example(),
            total_steps=task.steps,
            controller=self.controller,
            sensor=ScoreSensor(scores),
        )
        scores.start(loop)
        return optimizer, Looped(loop, scores)
