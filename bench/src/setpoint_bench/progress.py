"""Progress on stderr: a bar with the time left, over cells of a benchmark or models of a suite."""

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
    """The observer that draws: one bar over all cells with the time left, and a line for each that has ended.

    Where stderr is no terminal, only the lines appear.

    Args:
        cells: all cells of the benchmark that are still to be run.
    """

    def __init__(self, cells: Sequence[Cell]) -> None:
        self._bars = _bars()
        self._shares = dict.fromkeys(cells, 0.0)
        self._bar = self._bars.add_task("all", total=float(len(cells)), state="")
        self._num_ended = 0

    def __enter__(self) -> ProgressBars:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bars.stop()

    def __call__(self, cell: Cell, progress: Progress) -> None:
        """Move the bar, and show the loss of the cell that has just done a turn."""
        self._shares[cell] = progress.step / progress.total_steps
        loss = "" if progress.loss is None else f", loss {progress.loss:.3f}"
        self._bars.update(self._bar, completed=sum(self._shares.values()), state=f"{cell.name}{loss}")

    def ended(self, cell: Cell, ending: Result | Failure) -> None:
        """Print a line on what the cell came to."""
        self._shares[cell] = 1.0
        self._num_ended += 1
        self._bars.update(self._bar, completed=sum(self._shares.values()))
        told = f"{cell.name}: {_ending(ending)} ({self._num_ended} of {len(self._shares)})"
        style = "red" if isinstance(ending, Failure) else ""
        self._bars.console.print(rich.text.Text(told, style=style), soft_wrap=True)


def _ending(ending: Result | Failure) -> str:
    if isinstance(ending, Failure):
        return ending.error
    value = f"{100 * ending.value:.2f} %" if ending.metric == "accuracy" else f"{ending.value:.4f}"
    return f"{ending.metric} {value} in {duration(ending.seconds)}"


@contextmanager
def sweep_bar(name: str, total: int) -> Iterator[Callable[[Verdict], None]]:
    """A bar over the models of a suite, which moves by one when it is called with a verdict."""
    with _bars() as bars:
        bar = bars.add_task(name, total=total, state="")
        yield lambda verdict: bars.update(bar, advance=1, state=verdict.model)


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
