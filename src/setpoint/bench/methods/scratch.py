"""Methods that prune nothing: the dense model, and small ones trained from scratch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import final

from torch import Tensor, nn
from torch.optim import Optimizer

from setpoint.bench.course import Course, Pruner
from setpoint.bench.results import Result
from setpoint.bench.sizing import small_widths
from setpoint.bench.task import Task, dense_widths

Begun = tuple[Optimizer, Pruner | None]
"""An optimizer, and what acts on the model as it trains, if anything."""


@final
@dataclass(frozen=True)
class Dense:
    """The full model, trained as it is: what pruning is measured against."""

    name: str = "dense"
    sized: bool = False
    paper: str = ""
    needs: tuple[str, ...] = ()

    def course(self, task: Task, budget: float, needed: Mapping[str, Result]) -> Course:
        """The dense widths."""
        return Course(task, dense_widths(task))

    def begin(self, task: Task, model: nn.Module, budget: float, batches: Iterator[tuple[Tensor, Tensor]]) -> Begun:
        """Nothing but the optimizer."""
        return task.optimizer(model), None


@final
@dataclass(frozen=True)
class Small:
    """A uniformly narrower model trained from scratch at the budget: the honest rival of pruning."""

    name: str = "small"
    sized: bool = True
    paper: str = ""
    needs: tuple[str, ...] = ()

    def course(self, task: Task, budget: float, needed: Mapping[str, Result]) -> Course:
        """Widths scaled by one factor to the budget."""
        return Course(task, small_widths(task, budget))

    def begin(self, task: Task, model: nn.Module, budget: float, batches: Iterator[tuple[Tensor, Tensor]]) -> Begun:
        """Nothing but the optimizer."""
        return task.optimizer(model), None
