"""Progress bars on stderr, with the time left: over the cells of a benchmark, or over the models of a suite."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType

import rich.progress
import rich.text
from rich.console import Console

from setpoint.report.numbers import duration
from setpoint_bench.coverage import Verdict
from setpoint_bench.results import Result
from setpoint_bench.training import Cell, Progress
from setpoint_bench.worker import Failure


class ProgressBars:
    """The observer that draws: a bar over all cells with the time left, one for each under way, a line for each end.

    Where stderr is no terminal, only the lines appear.

    Args:
        cells: all cells of the benchmark that are still to be run.
    """

    def __init__(self, cells: Sequence[Cell]) -> None:
        self._bars = _bars()
        self._shares = dict.fromkeys(cells, 0.0)
        self._all = self._bars.add_task("all", total=float(len(cells)), state="")
        self._bar_of: dict[Cell, rich.progress.TaskID] = {}
        self._num_ended = self._num_failed = 0

    def __enter__(self) -> ProgressBars:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bars.stop()

    def __call__(self, cell: Cell, progress: Progress) -> None:
        """Move the cell's bar, and the one over all."""
        if cell not in self._bar_of:
            self._bar_of[cell] = self._bars.add_task(cell.name, total=progress.total_steps, state="")
        self._bars.update(self._bar_of[cell], completed=progress.step, state=_state(progress))
        self._shares[cell] = progress.step / progress.total_steps
        self._tell()

    def ended(self, cell: Cell, ending: Result | Failure) -> None:
        """Take the cell's bar away, and print a line on what it came to."""
        if cell in self._bar_of:
            self._bars.remove_task(self._bar_of.pop(cell))
        self._shares[cell] = 1.0
        self._num_ended += 1
        self._num_failed += isinstance(ending, Failure)
        self._tell()
        left = self._bars.tasks[0].time_remaining
        told = f"{self._num_ended} of {len(self._shares)}"
        told += f", {duration(left)} left" if left else ""
        style = "red" if isinstance(ending, Failure) else ""
        text = rich.text.Text(f"{cell.name}: {_ending(ending)} ({told})", style=style)
        self._bars.console.print(text, soft_wrap=True)

    def _tell(self) -> None:
        failed = f", {self._num_failed} failed" if self._num_failed else ""
        self._bars.update(
            self._all, completed=sum(self._shares.values()), state=f"{self._num_ended} of {len(self._shares)}{failed}"
        )


def _ending(ending: Result | Failure) -> str:
    """What a cell came to, in words."""
    if isinstance(ending, Failure):
        return ending.error
    value = f"{100 * ending.value:.2f} %" if ending.metric == "accuracy" else f"{ending.value:.4f}"
    return f"{ending.metric} {value} in {duration(ending.seconds)}"


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


@contextmanager
def turns_bar(name: str) -> Iterator[Callable[[float], None]]:
    """A bar that is called with the share that is done."""
    with _bars() as bars:
        bar = bars.add_task(name, total=1.0, state="")
        yield lambda share: bars.update(bar, completed=share)


def _bars() -> rich.progress.Progress:
    """Bars whose time left is judged by the last ten minutes: cells differ in pace."""
    return rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(bar_width=24),
        rich.progress.TaskProgressColumn(),
        rich.progress.TimeRemainingColumn(elapsed_when_finished=True),
        rich.progress.TextColumn("{task.fields[state]}"),
        console=Console(stderr=True),
        speed_estimate_period=600.0,
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
