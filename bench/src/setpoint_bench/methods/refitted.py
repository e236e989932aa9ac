"""Setpoint as it is, except that what reads the cut units is fitted anew at each cut."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import final

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from setpoint.actuator.mask import mask
from setpoint.controller.plan import Plan
from setpoint.groups.group import Group
from setpoint.groups.rng import preserved_rng_state
from setpoint.host.host import Host
from setpoint.loop.cutting import Cutting
from setpoint.one_shot.forward import run
from setpoint.one_shot.refit import find_readers, refit
from setpoint.one_shot.samples import first_batches
from setpoint.sensor.reading import Reading
from setpoint.spending.seconds import Stopwatch
from setpoint_bench.course import Course, Pruner
from setpoint_bench.looped import Looped
from setpoint_bench.methods.in_training import Setpoint
from setpoint_bench.results import Result
from setpoint_bench.task import BenchError, Task


@final
@dataclass(frozen=True)
class Refitted:
    """A loop of Setpoint's whose cuts come with a fit of the layers that read the cut units, as in `compress`.

    The loop chooses widths and units as ever; BatchNorm's statistics are renewed after each fit. The data of a fit are
    the next batches of the training. Forwards on them and the products of the fit count, as for `Fitted`.

    Args:
        name: name on the command line and in result files.
        trains: the method.
        num_samples: that a fit looks at.
        learning_rate: peak of the schedule, relative to the task's.
        family: kind of method, for reports.
        paper: none.
        sized: always.
        needs: nothing.

    Raises:
        BenchError: a fit is to look at no sample.
    """

    name: str
    trains: Setpoint = field(default_factory=Setpoint)
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
        return self.trains.course(task.with_learning_rate_factor(self.learning_rate), budget, needed)

    def begin(
        self, task: Task, model: nn.Module, budget: float, batches: Iterator[tuple[Tensor, Tensor]]
    ) -> tuple[Optimizer, Pruner | None]:
        """A loop with a budget, which cuts where the readers have been fitted."""
        optimizer, pruner = self.trains.begin(task, model, budget, batches)
        if not isinstance(pruner, Looped) or pruner.beside or not isinstance(pruner.loop.actuator, Cutting):
            raise BenchError(f"{self.name} fits readers where a loop cuts units, which {self.trains.name} does not do")
        fits = _Fits(self.num_samples, batches)
        pruner.loop.actuator.coordinates = fits
        return optimizer, Looped(pruner.loop, fits, pruner.notes)


@final
class _Fits:
    """The fits of one training, and what they took."""

    def __init__(self, num_samples: int, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        self.num_samples, self.batches = num_samples, batches
        self.watch, self.flops = Stopwatch(synchronize=True), 0.0

    def __call__(
        self, host: Host, groups: tuple[Group, ...], plan: Plan, reading: Reading, *, rest: bool
    ) -> AbstractContextManager[None]:
        """Fit the readers of the units that a plan drops, which are about to be cut."""
        keep = {name: units for name, units in plan.keep.items() if not units.all()}
        losing = tuple(group for group in groups if group.name in keep)
        # The counter knows attention by its products alone.
        with self.watch, FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            found: list[tuple[Tensor, Tensor]] = []
            while sum(len(inputs) for inputs, _ in found) < self.num_samples:
                found.append(next(self.batches))
            with preserved_rng_state(host.model):
                data = first_batches(found, self.num_samples, host.model)
                refit(host.model, find_readers(host.model, losing, keep), data)
                mask(host.model, None, losing, keep)
                run(host.model, data, "renewed")
        self.flops += counter.get_total_flops()
        return nullcontext()

    @property
    def seconds(self) -> float:
        """Seconds of all fits."""
        return self.watch.seconds

    def observe(self, loss: Tensor) -> None:
        """Nothing goes by the loss."""

    def remove(self) -> None:
        """There are no hooks."""
