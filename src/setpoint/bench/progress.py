"""Progress bars on stderr: one per cell of a benchmark with loss and score, or one over all models; with time left."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType

import rich.progress
from rich.console import Console

from setpoint.bench.coverage import Verdict
from setpoint.bench.training import Cell, Progress


class ProgressBars:
    """A context manager to hand to `run`: called with a cell and its progress, it moves the cell's bar.

    Args:
        cells: all cells of the benchmark; each gets its bar when its seed begins.
    """

    def __init__(self, cells: Sequence[Cell]) -> None:
        self._bars = _bars()
        self._several_seeds = len({cell.seed for cell in cells}) > 1
        self._task_of: dict[Cell, rich.progress.TaskID] = {}

    def __enter__(self) -> ProgressBars:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bars.stop()

    def __call__(self, cell: Cell, progress: Progress) -> None:
        """Move the cell's bar."""
        if cell not in self._task_of:
            self._task_of[cell] = self._bars.add_task(self._label(cell), total=progress.total_steps, state="")
        self._bars.update(self._task_of[cell], completed=progress.step, state=_state(progress))

    def _label(self, cell: Cell) -> str:
        budget = "" if cell.budget is None else f" at {cell.budget:g}"
        seed = f", seed {cell.seed}" if self._several_seeds else ""
        return f"{cell.method.name}{budget}{seed}"


@contextmanager
def sweep_bar(name: str, total: int) -> Iterator[Callable[[Verdict], None]]:
    """A bar over the models of a suite, which moves by one when it is called with a verdict."""
    with _bars() as bars:
        bar = bars.add_task(name, total=total, state="")
        failed = 0

        def after(verdict: Verdict) -> None:
            nonlocal failed
            failed += not verdict.passed
            bars.update(bar, advance=1, state=f"{verdict.model}, {failed} failed")

        yield after


def _bars() -> rich.progress.Progress:
    return rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(bar_width=24),
        rich.progress.TaskProgressColumn(),
        rich.progress.TimeRemainingColumn(elapsed_when_finished=True),
        rich.progress.TextColumn("{task.fields[state]}"),
        console=Console(stderr=True),
    )


def _state(progress: Progress) -> str:
    """Loss and validation score as text."""
    parts = [] if progress.loss is None else [f"loss {progress.loss:.3f}"]
    score = progress.score
    if score is not None and score.accuracy is not None:
        parts.append(f"validation {100 * score.accuracy:.1f} %")
    elif score is not None:
        parts.append(f"validation {score.loss:.3f}")
    return ", ".join(parts)
