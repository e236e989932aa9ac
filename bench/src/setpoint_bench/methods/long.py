"""Methods that prune while they train, for longer: the FLOPs that they save are spent on more steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from torch import nn

from setpoint_bench.course import Batches, Begun, Course
from setpoint_bench.methods.in_training import Setpoint
from setpoint_bench.results import Result
from setpoint_bench.simple_task import SimpleTask


@final
@dataclass(frozen=True)
class Long:
    """A method that prunes in training, for as many steps as another method's training FLOPs pay for.

    `steps = floor(steps of the task * training FLOPs of `pays` / training FLOPs of the method in these steps)`. The
    learning rate and the cuts fall at the same shares of the longer run. Its widths may differ a little on the way, so
    that it may end some tenths of a per cent off these FLOPs.
    """

    name: str
    prunes: Setpoint
    pays: str = "dense"

    @property
    def family(self) -> str:
        return self.prunes.family

    @property
    def sized(self) -> bool:
        return self.prunes.sized

    @property
    def paper(self) -> str:
        return self.prunes.paper

    @property
    def needs(self) -> tuple[str, ...]:
        """The run whose FLOPs it may spend, and the run that says what a step costs."""
        return self.pays, self.prunes.name

    def course(self, task: SimpleTask, budget: float, needed: Mapping[str, Result]) -> Course:
        share = needed[self.pays].train_flops / needed[self.prunes.name].train_flops
        return self.prunes.course(task.with_steps(max(1, int(task.steps * share))), budget, needed)

    def begin(self, task: SimpleTask, model: nn.Module, budget: float, batches: Batches) -> Begun:
        return self.prunes.begin(task, model, budget, batches)
