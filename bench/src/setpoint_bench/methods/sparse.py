"""Methods that mask single weights of the dense model while it trains: GMP, static, SNIP, SET, RigL."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import final

from torch import Tensor, nn
from torch.optim import Optimizer

from setpoint_bench.baselines.rule import Rule
from setpoint_bench.course import Course, Pruner
from setpoint_bench.masked import Masked
from setpoint_bench.results import Result
from setpoint_bench.task import BenchError, Task, dense_widths


@final
@dataclass(frozen=True)
class Sparse:
    """The dense model with masks on its weights, whose *theoretical* FLOPs meet the budget.

    Args:
        name: name on the command line and in result files.
        rule: chooses the active weights.
        paper: where it comes from.
        density: kept fraction of the maskable weights in place of a budget; 0 to go by the budget.
        learning_rate: peak of the schedule, relative to the task's.
        family: kind of method, for reports.
        needs: nothing.
    """

    name: str
    rule: Rule
    paper: str
    density: float = 0.0
    learning_rate: float = 1.0
    family: str = "sparse"
    needs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.density <= 1:
            raise BenchError(f"density is a share of the weights, up to 1, got {self.density:g}")

    @property
    def sized(self) -> bool:
        """Unless it has a density of its own."""
        return not self.density

    def course(self, task: Task, budget: float, needed: Mapping[str, Result]) -> Course:
        """The dense widths."""
        return Course(task.with_learning_rate_factor(self.learning_rate), dense_widths(task))

    def begin(
        self, task: Task, model: nn.Module, budget: float, batches: Iterator[tuple[Tensor, Tensor]]
    ) -> tuple[Optimizer, Pruner | None]:
        """Masks on the model's weights."""
        optimizer = task.optimizer(model)
        density = self.density or None
        pruner = Masked(
            model, optimizer, self.rule, task.example(), total_steps=task.steps, budget=budget, density=density
        )
        return optimizer, pruner
