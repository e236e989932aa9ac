"""Methods that prune nothing: the dense model, small ones from scratch, and another pretrained one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final

from setpoint_bench.course import Course, OneModel
from setpoint_bench.results import Result
from setpoint_bench.simple_task import SimpleTask, dense_widths
from setpoint_bench.sizing import small_widths


@final
@dataclass(frozen=True)
class Dense(OneModel):
    """The full model, trained as it is: what pruning is measured against.

    Args:
        share: its steps, as a share of the task's.
    """

    name: str = "dense"
    share: float = 1.0
    family: str = field(default="dense", kw_only=True)
    sized: bool = field(default=False, kw_only=True)

    def course(self, task: SimpleTask, budget: float, needed: Mapping[str, Result]) -> Course:
        own = task.with_steps(max(1, round(self.share * task.steps)))
        return Course(own.with_learning_rate_factor(self.learning_rate), dense_widths(task))


@final
@dataclass(frozen=True)
class Small(OneModel):
    """A uniformly narrower model trained from scratch at the budget: the honest rival of pruning.

    Args:
        learning_rate: peak of the schedule, relative to the task's for fresh weights.
    """

    name: str = "small"
    family: str = field(default="small", kw_only=True)

    def course(self, task: SimpleTask, budget: float, needed: Mapping[str, Result]) -> Course:
        return Course(task.from_scratch().with_learning_rate_factor(self.learning_rate), small_widths(task, budget))


@final
@dataclass(frozen=True)
class Neighbour(OneModel):
    """The smaller model, or another one, that the task names as its pretrained neighbour: trained as it is.

    Raises:
        BenchError: the task names none.
    """

    name: str = "neighbour"
    family: str = field(default="small", kw_only=True)
    sized: bool = field(default=False, kw_only=True)

    def course(self, task: SimpleTask, budget: float, needed: Mapping[str, Result]) -> Course:
        found = task.neighbour_task()
        return Course(found.with_learning_rate_factor(self.learning_rate), dense_widths(found), notes=found.name)
