"""Post-training pruning: the trained dense model is pruned, and fine-tuned for a share of the steps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, final, runtime_checkable

from torch import Tensor, nn
from torch.optim import Optimizer

from setpoint_bench.course import Course, Pruner
from setpoint_bench.results import Result
from setpoint_bench.task import BenchError, Task, dense_widths


@runtime_checkable
class Prunes(Protocol):
    """The part of a method that prunes: what begins with a model, whatever it was trained on before."""

    @property
    def sized(self) -> bool:
        """Whether it goes by the budget."""
        ...

    def begin(
        self, task: Task, model: nn.Module, budget: float, batches: Iterator[tuple[Tensor, Tensor]]
    ) -> tuple[Optimizer, Pruner | None]:
        """As in `Method`."""
        ...


@final
@dataclass(frozen=True)
class PostTraining:
    """Goes on from the finished dense run of the same seed; its steps, FLOPs and seconds count as this method's.

    The schedule is the task's own, compressed, with its peak: fine-tuning at the low rate at which training ended
    recovers less (learning-rate rewinding: Renda, Frankle, Carbin, "Comparing rewinding and fine-tuning in neural
    network pruning", ICLR 2020).

    Args:
        name: name on the command line and in result files.
        prunes: what prunes the trained model.
        paper: where it comes from.
        share: steps of fine-tuning, as a share of the task's steps.
        learning_rate: peak of the fine-tuning's schedule, relative to the task's.
        family: kind of method, for reports.
        needs: the dense run.
    """

    name: str
    prunes: Prunes
    paper: str
    share: float = 0.25
    learning_rate: float = 1.0
    family: str = "post-training"
    needs: tuple[str, ...] = ("dense",)

    def __post_init__(self) -> None:
        if not 0 < self.share < math.inf:
            raise BenchError(f"share is that of the task's steps, above 0 and finite, got {self.share:g}")

    @property
    def sized(self) -> bool:
        """Whether it goes by the budget."""
        return self.prunes.sized

    def course(self, task: Task, budget: float, needed: Mapping[str, Result]) -> Course:
        """The trained dense model, and a short schedule."""
        steps = max(1, round(self.share * task.steps))
        short = task.with_steps(steps).with_learning_rate_factor(self.learning_rate)
        return Course(short, dense_widths(task), goes_on_from="dense")

    def begin(
        self, task: Task, model: nn.Module, budget: float, batches: Iterator[tuple[Tensor, Tensor]]
    ) -> tuple[Optimizer, Pruner | None]:
        """Prune."""
        return self.prunes.begin(task, model, budget, batches)
