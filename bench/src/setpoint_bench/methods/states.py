"""Methods for state-space models: they drop states and nothing else, or begin with few."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final

from torch import nn

import setpoint
from setpoint.controller.schedule import Schedule
from setpoint.cost.cost import params_cost
from setpoint.groups.group import Group
from setpoint_bench.course import Batches, Begun, Course, OneModel
from setpoint_bench.methods.in_training import Looped
from setpoint_bench.results import Result
from setpoint_bench.simple_task import SimpleTask, dense_widths
from setpoint_bench.task import BenchError


@final
@dataclass(frozen=True)
class Hankel:
    """States balanced and dropped by Setpoint, to a FLOPs budget or to an exact number in each layer on average.

    Args:
        states: mean number of states of a layer at the end; 0: whatever meets the budget.
        settle: share of the run by which the last states are gone; the first go from a fifth of that on.
    """

    name: str = "hankel"
    states: float = 0.0
    settle: float = 0.3
    family: str = "setpoint"
    paper: str = ""
    needs: tuple[str, ...] = ()

    @property
    def sized(self) -> bool:
        """Unless it has a number of states of its own."""
        return not self.states

    def course(self, task: SimpleTask, budget: float, needed: Mapping[str, Result]) -> Course:
        return Course(task, dense_widths(task))

    def begin(self, task: SimpleTask, model: nn.Module, budget: float, batches: Batches) -> Begun:
        optimizer, groups = task.optimizer(model), _states(task, model)
        limit = setpoint.Budget.fraction(budget, of="flops")
        if self.states:
            least = params_cost(model, groups).total({group.name: round(self.states) for group in groups})
            limit = setpoint.Budget.total(least, of="params")
        schedule = Schedule() if self.settle == Schedule().settle else Schedule(self.settle / 5, self.settle)
        loop = setpoint.attach(
            model,
            optimizer,
            limit,
            example=task.example(),
            total_steps=task.steps,
            groups=groups,
            controller=setpoint.PricedController(schedule),
        )
        return optimizer, Looped(loop)


@final
@dataclass(frozen=True)
class FewStates(OneModel):
    """A model that begins with few states: the rival of dropping them.

    Args:
        states: of each layer.
    """

    name: str = "few-states"
    states: float = 28.0
    family: str = field(default="small", kw_only=True)
    sized: bool = field(default=False, kw_only=True)

    def course(self, task: SimpleTask, budget: float, needed: Mapping[str, Result]) -> Course:
        """The dense widths, but for the states.

        Raises:
            BenchError: for a task without states.
        """
        widths = dense_widths(task)
        if "states" not in widths:
            raise BenchError(f"task {task.name} has no states: use smnist or smnist-196")
        return Course(task.with_learning_rate_factor(self.learning_rate), {**widths, "states": round(self.states)})


def _states(task: SimpleTask, model: nn.Module) -> tuple[Group, ...]:
    """The groups of states.

    Raises:
        BenchError: there are none.
    """
    groups = tuple(group for group in setpoint.find_groups(model, task.example()) if group.kind == "state")
    if not groups:
        raise BenchError(f"task {task.name} has no states: use smnist or smnist-196")
    return groups
