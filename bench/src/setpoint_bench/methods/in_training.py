"""Methods that prune the dense model while it trains, whole units or single weights, through a Setpoint loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, final

from torch import Tensor, nn
from torch.optim import Optimizer

import setpoint
from setpoint.controller.plan import Controller
from setpoint.sensor.reading import Sensor
from setpoint_bench.course import Course, Pruner
from setpoint_bench.distillation import Distillation
from setpoint_bench.fading import Fading
from setpoint_bench.lasso import Lasso
from setpoint_bench.leave_outs import LeaveOuts
from setpoint_bench.looped import Companion, Looped
from setpoint_bench.results import Result
from setpoint_bench.revised import RevisedController
from setpoint_bench.rewarm import Rewarming
from setpoint_bench.switch_offs import SwitchOffs
from setpoint_bench.task import BenchError, Task, dense_widths


@final
@dataclass(frozen=True)
class Setpoint:
    """The dense model, pruned by a loop to the budget while it trains; a variant is another value of this class.

    Args:
        name: name on the command line and in result files.
        controller: decides what goes and when; None for Setpoint's own.
        sensor: makes what takes the readings; None for Setpoint's own.
        lasso: share of a group-lasso penalty in the first step's loss, below 1; 0 for none.
        rewarm: share of the run over which the learning rate rises again after each cut; 0 for none.
        distill: weight of the distillation from the model's own dense average after the first cut, below 1; 0 for none.
        switch_off: share of the units that are silent in a step, at random, until the loop has landed; 0 for none.
        leave_outs: batches on which a plan's units are left out to calibrate saliency across groups; 0 for none.
        fade: whether the units that are likely to go next fade until then.
        learning_rate: peak of the schedule, relative to the task's.
        paper: where the variant comes from.
        family: kind of method, for reports.
        resource: what the budget is a fraction of the dense model's, per step.
        granularity: "unit", or "weight" for masks on single weights, whose *theoretical* FLOPs meet the budget.
        sized: always.
        needs: nothing.

    Raises:
        BenchError: the lasso or the rewarming is no share.
    """

    name: str = "setpoint"
    controller: Controller[Any] | None = None
    sensor: Callable[[], Sensor[Any]] | None = None
    lasso: float = 0.0
    rewarm: float = 0.0
    distill: float = 0.0
    switch_off: float = 0.0
    leave_outs: int = 0
    fade: bool = False
    learning_rate: float = 1.0
    paper: str = ""
    family: str = "setpoint"
    granularity: str = "unit"
    resource: str = "flops"
    sized: bool = True
    needs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.lasso < 1:
            raise BenchError(f"lasso is the penalty's share of the loss, at least 0 and below 1, got {self.lasso:g}")
        if not 0 <= self.rewarm <= 1:
            raise BenchError(f"rewarm is a share of the run, from 0 to 1, got {self.rewarm:g}")
        if not 0 <= self.distill < 1:
            raise BenchError(f"distill is a weight, at least 0 and below 1, got {self.distill:g}")
        if not 0 <= self.switch_off < 1:
            raise BenchError(f"switch_off is a share of the units, at least 0 and below 1, got {self.switch_off:g}")
        if self.leave_outs < 0:
            raise BenchError(f"leave_outs is a number of batches, got {self.leave_outs}")

    def course(self, task: Task, budget: float, needed: Mapping[str, Result]) -> Course:
        """The dense widths."""
        return Course(task.with_learning_rate_factor(self.learning_rate), dense_widths(task))

    def begin(
        self, task: Task, model: nn.Module, budget: float, batches: Iterator[tuple[Tensor, Tensor]]
    ) -> tuple[Optimizer, Pruner | None]:
        """A loop with a budget."""
        optimizer = task.optimizer(model)
        controller, fading = self.controller, Fading(model, optimizer) if self.fade else None
        if fading is not None:
            controller = RevisedController(fading)
        elif self.leave_outs:
            controller = RevisedController(LeaveOuts(task, model, list(islice(batches, self.leave_outs))))
        loop = setpoint.attach(
            model,
            optimizer,
            setpoint.Budget.fraction(budget, of=self.resource),
            example=task.example(),
            total_steps=task.steps,
            controller=controller,
            sensor=None if self.sensor is None else self.sensor(),
            num_samples=task.num_samples(),
            granularity=self.granularity,
        )
        return optimizer, Looped(loop, fading.beside(loop) if fading else self._companion(task, model, optimizer, loop))

    def _companion(self, task: Task, model: nn.Module, optimizer: Optimizer, loop: setpoint.Loop) -> Companion | None:
        """What acts beside the loop."""
        if self.lasso:
            return Lasso(loop, model, optimizer, self.lasso)
        if self.rewarm:
            return Rewarming(loop, optimizer, max(1, round(self.rewarm * task.steps)))
        if self.distill:
            return Distillation(loop, model, optimizer, task, self.distill)
        if self.switch_off:
            return SwitchOffs(loop, model, optimizer, self.switch_off)
        return None
