"""An observer of runs for tests."""

from __future__ import annotations

from setpoint_bench.results import Result
from setpoint_bench.training import Cell, Progress
from setpoint_bench.worker import Failure


class Notes:
    """An observer that writes down what it is told."""

    def __init__(self) -> None:
        self.turns: list[tuple[str, int]] = []
        self.endings: list[tuple[str, Result | Failure]] = []

    def __call__(self, cell: Cell, progress: Progress) -> None:
        self.turns.append((cell.name, progress.step))

    def ended(self, cell: Cell, ending: Result | Failure) -> None:
        self.endings.append((cell.name, ending))
