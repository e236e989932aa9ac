"""Methods that prune while they train, for longer: the FLOPs that they save are spent on more steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import final

from torch import Tensor, nn
from torch.optim import Optimizer

from setpoint_bench.course import Course, Pruner
from setpoint_bench.methods.in_training import Setpoint
from setpoint_bench.results import Result
from setpoint_bench.task import Task


@final
@dataclass(frozen=True)
class Long:
    """A method that prunes in training, for as many steps as the dense run's training FLOPs pay for.

    `steps = floor(steps of the task * training FLOPs of dense / training FLOPs of the method in these steps)`. The
    learning rate and the cuts fall at the same shares of the longer run. Its widths may differ a little on the way, so
    that it may end some tenths of a per cent beside these FLOPs.

    Args:
        name: name on the command line and in result files.
        prunes: the method.
    """

    name: str
    prunes: Setpoint

    @property
    def family(self) -> str:
        """That of what prunes."""
        return self.prunes.family

    @property
    def sized(self) -> bool:
        """Whether it goes by the budget."""
        return self.prunes.sized

    @property
    def paper(self) -> str:
        """Where what prunes comes from."""
        return self.prunes.paper

    @property
    def needs(self) -> tuple[str, ...]:
        """The run whose FLOPs it may spend, and the run that says what a step costs."""
        return "dense", self.prunes.name

    def course(self, task: Task, budget: float, needed: Mapping[str, Result]) -> Course:
        """The dense widths and a longer schedule."""
        share = needed["dense"].train_flops / needed[self.prunes.name].train_flops
        return self.prunes.course(task.with_steps(max(1, int(task.steps * share))), budget, needed)

    def begin(
        self, task: Task, model: nn.Module, budget: float, batches: Iterator[tuple[Tensor, Tensor]]
    ) -> tuple[Optimizer, Pruner | None]:
        """As what prunes."""
        return self.prunes.begin(task, model, budget, batches)
