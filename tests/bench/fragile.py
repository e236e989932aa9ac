"""A task whose narrow models break in the middle of training, in one way or another."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass

from torch import Tensor, nn

from setpoint.bench.digits import Digits
from setpoint.bench.results import Result
from setpoint.bench.training import Cell, Progress
from setpoint.bench.worker import Failure


@dataclass(frozen=True)
class Fragile(Digits):
    """Digits that train as usual until a model is narrower than dense.

    Args:
        way: "raise" an error, "die" by a signal as for want of memory, or "interrupt" whoever made the process.
    """

    way: str = "raise"

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """The usual loss of a dense model; the end of any other."""
        if model.get_parameter("stem.0.weight").shape[0] < self.width:
            if self.way == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.way == "interrupt":
                os.kill(os.getppid(), signal.SIGINT)
            else:
                raise RuntimeError("a narrow model\nbroke")
        return super().loss(model, inputs, targets)


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
