"""A course: what a method trains, for how long, and what acts on the model meanwhile."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol, final, runtime_checkable

from torch import Tensor, nn
from torch.optim import Optimizer

from setpoint.ledger import Ledger
from setpoint_bench.results import Result
from setpoint_bench.simple_task import SimpleTask, dense_widths


@dataclass(frozen=True)
class Course:
    """Where a method begins and which recipe it follows from there.

    Args:
        task: the task with the steps and the learning rate of this method.
        widths: widths of the model to build, by name as in `SimpleTask.dimensions`.
        goes_on_from: name of the method whose trained model is loaded into it, and whose FLOPs, seconds and
            steps are counted as this one's; "" to train from scratch.
        notes: what a reader of the result must know, such as a search that is not counted.
        taught_by: name of the method whose trained model teaches this one, and counts likewise; "" without a teacher.
        alpha: the teacher's share of the loss.
        temperature: by which logits are divided.
    """

    task: SimpleTask
    widths: Mapping[str, int]
    goes_on_from: str = ""
    notes: str = ""
    taught_by: str = ""
    alpha: float = 0.5
    temperature: float = 2.0


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a pruner came to; `None` means that the notion does not apply to it.

    Args:
        widths: active units by group at the end.
        dense_widths: the same at the start.
        dense_flops: FLOPs per step of the model that pruning began with.
        claimed_flops: FLOPs per step of the finished model by the pruner's own cost.
        overhead_flops: FLOPs of all optimizer steps aside, the pruner's own.
        overhead_seconds: the pruner's own seconds.
        resizes: how many times the model was cut.
        budget_met: whether the budget was met.
        break_even_step: first step at which the seconds saved exceed the overhead.
        density: kept fraction of the weights that may be masked.
        theoretical_flops: FLOPs of one step of the finished model if only weights that are not masked cost any.
        theoretical_train_flops: the same for the whole run.
        notes: what a reader of the result must know.
        ledger: every decision, if one was kept.
    """

    widths: Mapping[str, int] = field(default_factory=dict)
    dense_widths: Mapping[str, int] = field(default_factory=dict)
    dense_flops: float | None = None
    claimed_flops: float | None = None
    overhead_flops: float = 0.0
    overhead_seconds: float = 0.0
    resizes: int = 0
    budget_met: bool | None = None
    break_even_step: int | None = None
    density: float | None = None
    theoretical_flops: float | None = None
    theoretical_train_flops: float | None = None
    notes: str = ""
    ledger: Ledger | None = None


@runtime_checkable
class Pruner(Protocol):
    """What acts on a model while it trains, through the optimizer's own hooks."""

    @property
    def widths(self) -> Mapping[str, int]:
        """Active units by group; whenever they change, the model has been cut."""
        ...

    def observe(self, loss: Tensor) -> None:
        """Told the loss of each step before the optimizer moves; must not wait for the device."""
        ...

    def finish(self) -> Outcome:
        """End its work, once the last step is done."""
        ...


Batches = Iterator[tuple[Tensor, Tensor]]
Begun = tuple[Optimizer, Pruner | None]
"""An optimizer, and what acts on the model as it trains, if anything."""


@dataclass(frozen=True, kw_only=True)
class OneModel:
    """A method that trains the dense model for the task's steps, and prunes nothing; what differs is overridden.

    Its members are those of `setpoint_bench.method.Method`.
    """

    learning_rate: float = 1.0
    family: str = ""
    paper: str = ""
    sized: bool = True
    needs: tuple[str, ...] = ()

    def course(self, task: SimpleTask, budget: float, needed: Mapping[str, Result]) -> Course:
        return Course(task.with_learning_rate_factor(self.learning_rate), dense_widths(task))

    def begin(self, task: SimpleTask, model: nn.Module, budget: float, batches: Batches) -> Begun:
        return task.optimizer(model), None


@final
class AlreadyCut:
    """The pruner that has done its work before the first step."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome

    @property
    def widths(self) -> dict[str, int]:
        return dict(self.outcome.widths)

    def observe(self, loss: Tensor) -> None:
        """Nothing more to decide."""

    def finish(self) -> Outcome:
        return self.outcome
