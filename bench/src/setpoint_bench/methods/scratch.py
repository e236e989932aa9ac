"""Methods that prune nothing: the dense model, and small ones trained from scratch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import nn

from setpoint_bench.counter import step_flops
from setpoint_bench.course import Batches, Begun, Course
from setpoint_bench.results import Result
from setpoint_bench.simple_task import SimpleTask, dense_widths
from setpoint_bench.sizing import small_widths


@final
@dataclass(frozen=True)
class Dense:
    """The full model, trained as it is: what pruning is measured against."""

    name: str = "dense"
    learning_rate: float = 1.0
    family: str = "dense"
    sized: bool = False
    paper: str = ""
    needs: tuple[str, ...] = ()

    def course(self, task: SimpleTask, budget: float, needed: Mapping[str, Result]) -> Course:
        return Course(task.with_learning_rate_factor(self.learning_rate), dense_widths(task))

    def begin(self, task: SimpleTask, model: nn.Module, budget: float, batches: Batches) -> Begun:
        return task.optimizer(model), None


@final
@dataclass(frozen=True)
class Small:
    """A uniformly narrower model trained from scratch at the budget: the honest rival of pruning.

    Args:
        learning_rate: peak of the schedule, relative to the task's for fresh weights.
    """

    name: str = "small"
    learning_rate: float = 1.0
    family: str = "small"
    sized: bool = True
    paper: str = ""
    needs: tuple[str, ...] = ()

    def course(self, task: SimpleTask, budget: float, needed: Mapping[str, Result]) -> Course:
        return Course(task.from_scratch().with_learning_rate_factor(self.learning_rate), small_widths(task, budget))

    def begin(self, task: SimpleTask, model: nn.Module, budget: float, batches: Batches) -> Begun:
        return task.optimizer(model), None


@final
@dataclass(frozen=True)
class SmallLong:
    """The small model, trained for as many steps as Setpoint's whole training FLOPs pay for.

    `steps = round(training FLOPs of Setpoint / FLOPs of a step of the small model)`, schedule stretched with them.
    Its learning rate deserves the same tuning as everyone's: `small-long@learning_rate=0.5` halves it.

    Args:
        needs: the run whose FLOPs it may spend.
    """

    name: str = "small-long"
    learning_rate: float = 1.0
    family: str = "small"
    sized: bool = True
    paper: str = ""
    needs: tuple[str, ...] = ("setpoint",)

    def course(self, task: SimpleTask, budget: float, needed: Mapping[str, Result]) -> Course:
        widths = small_widths(task, budget)
        longer = task.from_scratch().with_steps(_affordable_steps(task, widths, needed["setpoint"]))
        return Course(longer.with_learning_rate_factor(self.learning_rate), widths)

    def begin(self, task: SimpleTask, model: nn.Module, budget: float, batches: Batches) -> Begun:
        return task.optimizer(model), None


def _affordable_steps(task: SimpleTask, widths: Mapping[str, int], spent: Result) -> int:
    """Steps of a model of these widths that cost what another run has spent in training."""
    per_step = step_flops(task.build(widths, torch.device("meta")), task.example())
    return max(1, round(spent.train_flops / per_step))
