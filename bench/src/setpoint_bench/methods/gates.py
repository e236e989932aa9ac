"""Gates trained in place of a saliency: the dense model with hard concrete gates, then one cut, then training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import final

from torch import Tensor, nn
from torch.optim import Optimizer

import setpoint
from setpoint_bench.baselines.scheduled import ScheduledController
from setpoint_bench.course import Course, Pruner
from setpoint_bench.gating import Gating
from setpoint_bench.looped import Looped
from setpoint_bench.results import Result
from setpoint_bench.score_sensor import ScoreSensor
from setpoint_bench.task import BenchError, Task, dense_widths


@final
@dataclass(frozen=True)
class Gates:
    """Hard concrete gates, trained with the weights and held to the budget by a Lagrangian; then one cut, and training.

    Args:
        name: name on the command line and in result files.
        end: share of the run in which gates are trained, at the dense model's cost.
        ramp: share of that in which the expected FLOPs come down to the budget.
        reach: how far a gate's logit can go in all: learning rate x steps of the gates.
        start: probability with which a unit is there at the start.
        learning_rate: peak of the weights' schedule, relative to the task's.
        paper: where it comes from.
        family: kind of method, for reports.
        sized: always.
        needs: nothing.

    Raises:
        BenchError: for a setting out of range.
    """

    name: str
    end: float = 0.6
    ramp: float = 0.5
    reach: float = 100.0
    start: float = 0.99
    learning_rate: float = 1.0
    paper: str = ""
    family: str = "open-loop"
    sized: bool = True
    needs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not (0 < self.end <= 1 and 0 < self.ramp <= 1 and 0 < self.start < 1 and self.reach > 0):
            raise BenchError(f"gates need 0 < end <= 1, 0 < ramp <= 1, 0 < start < 1 and a reach above 0, got {self!r}")

    def course(self, task: Task, budget: float, needed: Mapping[str, Result]) -> Course:
        """The dense widths."""
        return Course(task.with_learning_rate_factor(self.learning_rate), dense_widths(task))

    def begin(
        self, task: Task, model: nn.Module, budget: float, batches: Iterator[tuple[Tensor, Tensor]]
    ) -> tuple[Optimizer, Pruner | None]:
        """Gates, and a loop that cuts once they are settled."""
        optimizer = task.optimizer(model)
        gating = Gating(model, optimizer, ramp=self.ramp, reach=self.reach, start=self.start)
        loop = setpoint.attach(
            model,
            optimizer,
            setpoint.Budget.fraction(budget, of="flops"),
            example=task.example(),
            total_steps=task.steps,
            controller=ScheduledController(begin=self.end, end=self.end, num_cuts=1, ranking="all"),
            sensor=ScoreSensor(gating),
        )
        gating.start(loop)
        return optimizer, Looped(loop, gating)
