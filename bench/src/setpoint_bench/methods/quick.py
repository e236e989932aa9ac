"""Setpoint as it is, except that of blocks of about equal worth the one goes whose FLOPs take longer on this device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, final

from torch import Tensor, nn
from torch.optim import Optimizer

from setpoint.controller.plan import Observation, Plan
from setpoint.controller.priced import PricedController, PricedState
from setpoint.cost.cost import Cost
from setpoint.cost.flops import flops_cost
from setpoint.groups.group import Group, widths_of
from setpoint.groups.trace import trace
from setpoint.resources.costing import cost_out
from setpoint_bench.course import Course, Pruner
from setpoint_bench.methods.in_training import Setpoint
from setpoint_bench.results import Result
from setpoint_bench.task import BenchError, Task


@final
@dataclass(frozen=True)
class Quick:
    """A loop whose controller sees each group's worth up to a share lower where its FLOPs take longer, or higher.

    With the seconds and the FLOPs that half of a group's units save in the dense model,

        r = seconds saved / FLOPs saved,    seen = saliency * clip(median r / r, 1 - share, 1 + share).

    So a worth is changed by the share at most. Seconds decide between two blocks whose worth differs by about twice the
    share or less. Operations
    are timed on this device before the training, as for a budget of latency; this counts as Setpoint's own work.

    Args:
        name: name on the command line and in result files.
        share: of the worth.
        learning_rate: peak of the schedule, relative to the task's.
        family: kind of method, for reports.
        paper: none.
        sized: always.
        needs: nothing.

    Raises:
        BenchError: the share is none.
    """

    name: str
    share: float = 0.05
    learning_rate: float = 1.0
    family: str = "setpoint"
    paper: str = ""
    sized: bool = True
    needs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise BenchError(f"share is a fraction of the worth, at least 0 and below 1, got {self.share:g}")

    def course(self, task: Task, budget: float, needed: Mapping[str, Result]) -> Course:
        """The dense widths."""
        return Setpoint().course(task.with_learning_rate_factor(self.learning_rate), budget, needed)

    def begin(
        self, task: Task, model: nn.Module, budget: float, batches: Iterator[tuple[Tensor, Tensor]]
    ) -> tuple[Optimizer, Pruner | None]:
        """A loop with a budget of FLOPs."""
        factors = self._factors(task, model)
        return Setpoint(controller=QuickController(factors)).begin(task, model, budget, batches)

    def _factors(self, task: Task, model: nn.Module) -> dict[str, float]:
        """By group, what its saliency is multiplied by."""
        found = trace(model, task.example())
        optimizer = task.optimizer(model)
        seconds = cost_out(model, [optimizer], task.example(), found.groups, {"latency"}).costs["latency"]
        flops, dense, rates = flops_cost(found), widths_of(found.groups), dict[str, float]()
        for group in found.groups:
            half = group.num_units // 2
            saved, fewer = seconds.saving(dense, group.name, half), flops.saving(dense, group.name, half)
            if fewer > 0:
                rates[group.name] = max(saved, 0.0) / fewer
        usual = median(rates.values())
        least, most = 1 - self.share, 1 + self.share
        return {name: min(max(usual / rate, least), most) if rate else most for name, rate in rates.items()}


@final
@dataclass(frozen=True)
class QuickController:
    """The priced controller, which sees each group's saliency times a factor.

    Args:
        factors: by group.
    """

    factors: Mapping[str, float]
    inner: PricedController = PricedController()

    def init(self, groups: tuple[Group, ...]) -> PricedState:
        """That of the priced controller."""
        return self.inner.init(groups)

    def due(self, step: int, total_steps: int) -> bool:
        """When the priced controller decides."""
        return self.inner.due(step, total_steps)

    def decide(
        self, state: PricedState, observation: Observation, cost: Cost, groups: tuple[Group, ...]
    ) -> tuple[PricedState, Plan]:
        """What the priced controller decides by these saliencies."""
        reading = observation.reading
        if reading is not None:
            saliency: dict[str, Any] = {
                name: values * self.factors.get(name, 1.0) for name, values in reading.saliency.items()
            }
            observation = replace(observation, reading=replace(reading, saliency=saliency))
        return self.inner.decide(state, observation, cost, groups)
