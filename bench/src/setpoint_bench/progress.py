"""A benchmark at a terminal: cells trained, and suites checked, under a bar with the time left."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import rich.progress
import rich.text
from rich.console import Console

from setpoint.messages import counted
from setpoint.report.numbers import duration
from setpoint_bench.coverage import Verdict
from setpoint_bench.environment import code_version
from setpoint_bench.results import Result, held
from setpoint_bench.runner import Outcome, check_budgets, finished, make_data_ready, run, run_interleaved
from setpoint_bench.simple_task import SimpleTask
from setpoint_bench.training import Cell, Progress
from setpoint_bench.worker import Failure


class ProgressBars:
    """The observer that draws: one bar over all cells with the time left, and a line for each that has ended.

    Where stderr is no terminal, only the lines appear.
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


def train_cells(
    cells: Sequence[Cell],
    out: Path,
    workers: int,
    make_task: Callable[[], SimpleTask] | None,
    own_methods: Mapping[str, str],
    *,
    interleaved: bool = False,
) -> Outcome:
    """Train what the folder does not hold yet, under a progress bar: in processes, or in turns in this one."""
    done = finished(cells, out)
    make_data_ready(cell for cell in cells if cell not in done)
    check_budgets(cell for cell in cells if cell not in done)
    task = cells[0].task
    other = sum(result.environment.get("code") != code_version() for result in done.values())
    told = f"; {len(done)} of them are there already" if done else ""
    told += f", {other} made by other code than today's" if other else ""
    who = ", ".join(dict.fromkeys(cell.method.name for cell in cells))
    size = f"{counted(len(cells), 'run')} of {counted(task.steps, 'step')}"
    ahead = counted((len(cells) - len(done)) * task.steps, "step")
    print(f"{task.name}: {size} ({who}), results in {out}{told}", file=sys.stderr)
    print(f"about {ahead} ahead; Ctrl-C is safe, and the same command continues there", file=sys.stderr)
    with held(out), ProgressBars([cell for cell in cells if cell not in done]) as bars:
        if interleaved:
            return Outcome(run_interleaved(cells, out, bars))
        return run(cells, out, bars, workers=workers, make_task=make_task, own_methods=own_methods)
