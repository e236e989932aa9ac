"""Methods that prune the dense model while it trains, whole units or single weights, through a Setpoint loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor, nn
from torch.optim import Optimizer

import setpoint
from setpoint.controller.plan import Controller
from setpoint.groups.example import num_samples
from setpoint.sensor.reading import Sensor
from setpoint.weights.taylor import WeightTaylorSensor
from setpoint_bench.course import Course, Pruner
from setpoint_bench.looped import Looped
from setpoint_bench.results import Result
from setpoint_bench.task import Task, dense_widths


@final
@dataclass(frozen=True)
class Setpoint:
    """The dense model, pruned by a loop to the budget while it trains; a variant is another value of this class.

    Args:
        name: name on the command line and in result files.
        controller: decides what goes and when; None for Setpoint's own.
        sensor: makes what takes the readings; None for Setpoint's own.
        learning_rate: peak of the schedule, relative to the task's.
        paper: where the variant comes from.
        family: kind of method, for reports.
        resource: what the budget is a fraction of the dense model's, per step.
        granularity: "unit", or "weight" for masks on single weights, whose *theoretical* FLOPs meet the budget.
        sized: always.
        needs: nothing.
    """

    name: str = "setpoint"
    controller: Controller[Any] | None = None
    sensor: Callable[[], Sensor[Any]] | None = None
    learning_rate: float = 1.0
    paper: str = ""
    family: str = "setpoint"
    granularity: str = "unit"
    resource: str = "flops"
    sized: bool = True
    needs: tuple[str, ...] = ()

    def course(self, task: Task, budget: float, needed: Mapping[str, Result]) -> Course:
        """The dense widths."""
        return Course(task.with_learning_rate_factor(self.learning_rate), dense_widths(task))

    def begin(
        self, task: Task, model: nn.Module, budget: float, batches: Iterator[tuple[Tensor, Tensor]]
    ) -> tuple[Optimizer, Pruner | None]:
        """A loop with a budget."""
        optimizer = task.optimizer(model)
        loop = setpoint.attach(
            model,
            optimizer,
            setpoint.Budget.fraction(budget, of=self.resource),
            example=task.example(),
            total_steps=task.steps,
            controller=self.controller,
            sensor=self._sensor(task),
            actuator=setpoint.Masking() if self.granularity == "weight" else None,
        )
        return optimizer, Looped(loop)

    def _sensor(self, task: Task) -> Sensor[Any] | None:
        """What takes the readings; attach's own default counts rows, so it is told where tokens are the samples."""
        if self.sensor is not None:
            return self.sensor()
        samples = task.num_samples()
        if samples == num_samples(task.example()):
            return None
        return WeightTaylorSensor(samples) if self.granularity == "weight" else setpoint.TaylorSensor(samples)
