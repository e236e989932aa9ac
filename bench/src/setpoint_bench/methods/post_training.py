"""Post-training pruning: the trained dense model is pruned, and fine-tuned for a share of the steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from torch import nn

from setpoint_bench.course import Batches, Begun, Course
from setpoint_bench.methods.in_training import Setpoint
from setpoint_bench.methods.sparse import Sparse
from setpoint_bench.methods.torch_pruning import TorchPruning
from setpoint_bench.results import Result
from setpoint_bench.simple_task import SimpleTask, dense_widths
from setpoint_bench.task import BenchError


@final
@dataclass(frozen=True)
class PostTraining:
    """Continues the finished dense run of the same seed; its steps, FLOPs and seconds count as this method's.

    The schedule is the task's own, compressed, with its peak: fine-tuning at the low rate at which training ended
    recovers less (learning-rate rewinding: Renda, Frankle, Carbin, "Comparing rewinding and fine-tuning in neural
    network pruning", ICLR 2020).

    Args:
        prunes: what prunes the trained model.
        share: steps of fine-tuning, as a share of the task's steps; None for as many as the training FLOPs of the dense
            run pay for at the final size, a teacher's forwards (a third of a dense step) counted.
        learning_rate: peak of the fine-tuning's schedule, relative to the task's.
    """

    name: str
    prunes: Setpoint | Sparse | TorchPruning
    paper: str
    share: float | None = 0.25
    learning_rate: float = 1.0
    family: str = "post-training"
    needs: tuple[str, ...] = ("dense",)

    def __post_init__(self) -> None:
        if self.share is not None and not 0 < self.share < math.inf:
            raise BenchError(f"share is that of the task's steps, above 0 and finite, got {self.share:g}")

    @property
    def sized(self) -> bool:
        return self.prunes.sized

    def course(self, task: SimpleTask, budget: float, needed: Mapping[str, Result]) -> Course:
        taught = isinstance(self.prunes, Setpoint) and self.prunes.teacher
        share = 1 / (budget + taught / 3) if self.share is None else self.share
        steps = max(1, round(share * task.steps))
        short = task.with_steps(steps).with_learning_rate_factor(self.learning_rate)
        return Course(short, dense_widths(task), goes_on_from="dense")

    def begin(self, task: SimpleTask, model: nn.Module, budget: float, batches: Batches) -> Begun:
        return self.prunes.begin(task, model, budget, batches)
