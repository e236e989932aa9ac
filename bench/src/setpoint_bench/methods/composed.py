"""A method composed of another one: where it starts, whether the dense run teaches it, and for how long it trains."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, final

from torch import nn

from setpoint_bench.course import Batches, Begun, Course
from setpoint_bench.results import Result
from setpoint_bench.simple_task import SimpleTask
from setpoint_bench.task import BenchError


@final
@dataclass(frozen=True)
class Composed:
    """Another method with another start, a teacher, or another length.

    Runs that it starts from or learns from are of the same task, budget and seed, and their steps, FLOPs and seconds
    count as this method's, once each. The schedule is always the task's own, stretched or compressed, with its peak: a
    trained model that continues at the low rate at which training ended recovers less (learning-rate rewinding: Renda,
    Frankle, Carbin, "Comparing rewinding and fine-tuning in neural network pruning", ICLR 2020).

    Args:
        trains: the method.
        start: the run whose finished model it starts from; "" for the weights that the task starts with.
        teacher: the run whose finished model's logits it learns as well, by `setpoint.distillation.Teacher`; "" for
            none.
        share: its steps, as a share of the task's; None for as many as the training FLOPs of the dense run pay for at
            the final size, a teacher's forwards (a third of a dense step) counted.
        pays: the run whose training FLOPs say how long it trains instead, by those that `trains` spends in the task's
            steps, runs before it apart. Widths may differ a little on the way, so that it may end some tenths of a per
            cent off.
        learning_rate: peak, relative to the peak that `trains` has.
        alpha: the teacher's share of the loss.
        temperature: by which logits are divided.
        kind: its family; "" for that of `trains`.

    Raises:
        BenchError: for a share that is no length.
    """

    name: str
    trains: Any  # a Method, which is defined by those that there are
    start: str = ""
    teacher: str = ""
    share: float | None = 1.0
    pays: str = ""
    learning_rate: float = 1.0
    alpha: float = 0.5
    temperature: float = 2.0
    kind: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        if self.share is not None and not 0 < self.share < math.inf:
            raise BenchError(f"share is that of the task's steps, above 0 and finite, got {self.share:g}")

    @property
    def family(self) -> str:
        return self.kind or str(self.trains.family)

    @property
    def paper(self) -> str:
        return self.source or str(self.trains.paper)

    @property
    def sized(self) -> bool:
        return bool(self.trains.sized)

    @property
    def needs(self) -> tuple[str, ...]:
        """The runs that it starts from, learns from, and spends as much as."""
        spent = (self.pays, self.trains.name) if self.pays else ()
        return tuple(dict.fromkeys(filter(None, (self.start, self.teacher, *spent, *self.trains.needs))))

    def course(self, task: SimpleTask, budget: float, needed: Mapping[str, Result]) -> Course:
        if self.pays:
            before = {self.trains.start, self.trains.teacher} - {""} if isinstance(self.trains, Composed) else ()
            spent = needed[self.trains.name].train_flops - sum(needed[name].train_flops for name in before)
            steps = int(task.steps * needed[self.pays].train_flops / spent)
        else:
            share = 1 / (budget + bool(self.teacher) / 3) if self.share is None else self.share
            steps = round(share * task.steps)
        own = task.with_steps(max(1, steps)).with_learning_rate_factor(self.learning_rate)
        course: Course = self.trains.course(own, budget, needed)
        if self.start:
            course = replace(course, goes_on_from=self.start)
        if self.teacher:
            course = replace(course, taught_by=self.teacher, alpha=self.alpha, temperature=self.temperature)
        return course

    def begin(self, task: SimpleTask, model: nn.Module, budget: float, batches: Batches) -> Begun:
        begun: Begun = self.trains.begin(task, model, budget, batches)
        return begun
