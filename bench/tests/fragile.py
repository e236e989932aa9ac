"""A task whose training breaks in the middle for every seed but 0, in one way or another."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from setpoint_bench.results import Result
from setpoint_bench.simple_task import Data, SimpleTask
from setpoint_bench.task import Split
from setpoint_bench.tasks.digits import digits
from setpoint_bench.training import Cell, Progress
from setpoint_bench.worker import Failure

GOOD_BATCHES = 12


def fragile(way: str, epochs: int = 1) -> SimpleTask:
    """A narrow digits task that breaks for seeds other than 0.

    Args:
        way: "raise" an error, "die" by a signal as for want of memory, or "interrupt" whoever made the process.
        epochs: passes over the training images.
    """
    task = digits(epochs=epochs, width=4)
    return replace(task, data=Fragile(task.data, way))


@dataclass(frozen=True)
class Fragile:
    """Data that break after a dozen batches."""

    data: Data
    way: str

    @property
    def num_train(self) -> int | None:
        """As many as there are."""
        return self.data.num_train

    def example(self, batch: int) -> Tensor:
        """The usual example."""
        return self.data.example(batch)

    def split(self, split: Split) -> tuple[Tensor, Tensor]:
        """The usual split."""
        return self.data.split(split)

    def batches(self, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The usual batches for seed 0; for others the end."""
        for number, found in enumerate(self.data.batches(batch, seed)):
            if seed and number == GOOD_BATCHES:
                if self.way == "raise":
                    raise RuntimeError("the data\nbroke")
                who, how = (os.getpid(), signal.SIGKILL) if self.way == "die" else (os.getppid(), signal.SIGINT)
                os.kill(who, how)
            yield found


class Notes:
    """An observer that writes down what it is told."""

    def __init__(self) -> None:
        self.turns: list[tuple[str, int]] = []
        self.endings: list[tuple[str, Result | Failure]] = []

    def __call__(self, cell: Cell, progress: Progress) -> None:
        """Note a turn."""
        self.turns.append((cell.name, progress.step))

    def ended(self, cell: Cell, ending: Result | Failure) -> None:
        """Note an ending."""
        self.endings.append((cell.name, ending))
