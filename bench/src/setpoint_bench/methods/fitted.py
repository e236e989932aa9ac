"""Cuts whose readers are fitted anew: `setpoint.compress`, before the first step or on the way through the training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import final

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

import setpoint
from setpoint.controller.schedule import Schedule
from setpoint.spending.seconds import Stopwatch
from setpoint_bench.counter import step_flops
from setpoint_bench.course import Course, Outcome, Pruner
from setpoint_bench.results import Result
from setpoint_bench.task import BenchError, Task, dense_widths


@final
@dataclass(frozen=True)
class Fitted:
    """The model is cut by `setpoint.compress`, which fits the layers that read the cut units anew in closed form.

    The data of a cut are the next batches of the training. Forwards on them count, and the matrix products of scores
    and fits; their decompositions and inverses do not, which are a few per cent of these.

    Args:
        name: name on the command line and in result files.
        schedule: the cuts on its way down, along its reference; None for one cut before the first step.
        even: the same share of all groups stays.
        num_samples: that a cut looks at.
        learning_rate: peak of the schedule, relative to the task's.
        family: kind of method, for reports.
        paper: none.
        sized: always.
        needs: nothing.

    Raises:
        BenchError: a cut is to look at no sample.
    """

    name: str
    schedule: Schedule | None = None
    even: bool = False
    num_samples: int = 512
    learning_rate: float = 1.0
    family: str = "setpoint"
    paper: str = ""
    sized: bool = True
    needs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise BenchError(f"num_samples is at least 1, got {self.num_samples}")

    def course(self, task: Task, budget: float, needed: Mapping[str, Result]) -> Course:
        """The dense widths."""
        return Course(task.with_learning_rate_factor(self.learning_rate), dense_widths(task))

    def begin(
        self, task: Task, model: nn.Module, budget: float, batches: Iterator[tuple[Tensor, Tensor]]
    ) -> tuple[Optimizer, Pruner | None]:
        """Cut at once, or from the optimizer's steps on."""
        cuts = _Cuts(self, model, batches, step_flops(model, task.example()))
        if self.schedule is None:
            cuts.cut(budget)
            return task.optimizer(model), cuts
        optimizer = task.optimizer(model)
        cuts.follow(self.schedule, optimizer, budget, task.steps)
        return optimizer, cuts


class _Cuts:
    """The cuts of one training, and what they took; changes at the optimizer's steps."""

    def __init__(
        self, method: Fitted, model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], dense_flops: int
    ) -> None:
        self.method, self.model, self.batches = method, model, batches
        self.dense_flops = float(dense_flops)
        self.watch, self.flops, self.resizes, self.step = Stopwatch(synchronize=True), 0.0, 0, 0
        self.widths: dict[str, int] = {}
        self.dense_widths: dict[str, int] = {}
        self.settled = False

    def follow(self, schedule: Schedule, optimizer: Optimizer, budget: float, steps: int) -> None:
        """Cut after the steps of a schedule at which it decides, down to what it says then."""

        def after_step(*_: object) -> None:
            self.step += 1
            if schedule.due(self.step, steps) and not self.settled:
                self.cut(schedule.at(self.step, steps, start=1.0, limit=budget), optimizer)
                self.settled = schedule.settled(self.step, steps)

        optimizer.register_step_post_hook(after_step)

    def cut(self, share: float, optimizer: Optimizer | None = None) -> None:
        """Bring the model to a share of its dense FLOPs."""
        # The counter knows attention by its products alone.
        with self.watch, FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            batches: list[tuple[Tensor, Tensor]] = []
            samples = 0
            while samples < self.method.num_samples:
                batches.append(next(self.batches))
                samples += len(batches[-1][0])
            found = setpoint.compress(
                self.model,
                batches,
                setpoint.Budget.fraction(share, of="flops"),
                even=self.method.even,
                num_samples=self.method.num_samples,
                optimizer=optimizer,
                verify=not self.resizes,
            )
        self.dense_widths = self.dense_widths or dict(found.dense_widths)
        self.widths = dict(found.widths)
        self.flops += counter.get_total_flops()
        self.resizes += 1

    def observe(self, loss: Tensor) -> None:
        """Nothing is decided by the loss."""

    def finish(self) -> Outcome:
        """What the cuts came to."""
        return Outcome(
            widths=self.widths,
            dense_widths=self.dense_widths,
            dense_flops=self.dense_flops,
            overhead_flops=self.flops,
            overhead_seconds=self.watch.seconds,
            resizes=self.resizes,
            budget_met=True,  # compress raises where it is not
        )
