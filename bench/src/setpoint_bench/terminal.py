"""A benchmark at a terminal: cells trained under a progress bar, with what its user should know on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from setpoint.messages import counted
from setpoint_bench.environment import code_version
from setpoint_bench.interleaved import run_interleaved
from setpoint_bench.progress import ProgressBars
from setpoint_bench.results import held
from setpoint_bench.runner import Outcome, check_budgets, finished, make_data_ready, run
from setpoint_bench.simple_task import SimpleTask
from setpoint_bench.training import Cell


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
    print(f"about {ahead} ahead; Ctrl-C is safe, and the same command goes on from there", file=sys.stderr)
    with held(out), ProgressBars([cell for cell in cells if cell not in done]) as bars:
        if interleaved:
            return Outcome(run_interleaved(cells, out, bars))
        return run(cells, out, bars, workers=workers, make_task=make_task, own_methods=own_methods)
