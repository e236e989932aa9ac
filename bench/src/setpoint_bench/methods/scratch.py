"""Methods that prune nothing: the dense model, small ones from scratch, and another pretrained one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from torch import nn

from setpoint_bench.course import Batches, Begun, Course
from setpoint_bench.results import Result
from setpoint_bench.simple_task import SimpleTask, dense_widths
from setpoint_bench.sizing import small_widths


@final
@dataclass(frozen=True)
class Dense:
    """The full model, trained as it is: what pruning is measured against.

    Args:
        share: its steps, as a share of the task's.
    """

    name: str = "dense"
    learning_rate: float = 1.0
    share: float = 1.0
    family: str = "dense"
    sized: bool = False
    paper: str = ""
    needs: tuple[str, ...] = ()

    def course(self, task: SimpleTask, budget: float, needed: Mapping[str, Result]) -> Course:
        own = task.with_steps(max(1, round(self.share * task.steps)))
        return Course(own.with_learning_rate_factor(self.learning_rate), dense_widths(task))

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
class Neighbour:
    """The smaller model, or another one, that the task names as its pretrained neighbour: trained as it is.

    Raises:
        BenchError: the task names none.
    """

    name: str = "neighbour"
    learning_rate: float = 1.0
    family: str = "small"
    sized: bool = False
    paper: str = ""
    needs: tuple[str, ...] = ()

    def course(self, task: SimpleTask, budget: float, needed: Mapping[str, Result]) -> Course:
        found = task.neighbour_task()
        return Course(found.with_learning_rate_factor(self.learning_rate), dense_widths(found), notes=found.name)

    def begin(self, task: SimpleTask, model: nn.Module, budget: float, batches: Batches) -> Begun:
        return task.optimizer(model), None
