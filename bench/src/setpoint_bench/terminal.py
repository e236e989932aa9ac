"""A benchmark at a terminal: cells trained or timed under progress bars, with what its user should know on stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from setpoint.messages import counted
from setpoint_bench.environment import code_version
from setpoint_bench.progress import ProgressBars, turns_bar
from setpoint_bench.report.columns import MOST_LOAD
from setpoint_bench.results import held
from setpoint_bench.runner import Outcome, check_budgets, finished, make_data_ready, run
from setpoint_bench.task import BenchError, Task
from setpoint_bench.timing import measure, with_timed
from setpoint_bench.training import Cell
from setpoint_bench.worker import METHOD_FILE, source_hash


def train_cells(
    cells: Sequence[Cell],
    out: Path,
    workers: int,
    make_task: Callable[[], Task] | None,
    own_methods: Mapping[str, str],
) -> Outcome:
    """Train what the folder does not hold yet, under progress bars."""
    done = finished(cells, out)
    make_data_ready(cell for cell in cells if cell not in done)
    check_budgets(cell for cell in cells if cell not in done)
    task = cells[0].task
    other = sum(result.environment.get("code") != code_version() for result in done.values())
    told = f"; {len(done)} of them are there already" if done else ""
    told += f", {other} made by other code than today's" if other else ""
    for name, target in own_methods.items():
        mine = [result for result in done.values() if result.method == name]
        changed = sum(result.environment.get(METHOD_FILE) != source_hash(target) for result in mine)
        told += f", {changed} of {name} by another version of its file" if changed else ""
    who = ", ".join(dict.fromkeys(cell.method.name for cell in cells))
    size = f"{counted(len(cells), 'run')} of {counted(task.steps, 'step')}"
    ahead = counted((len(cells) - len(done)) * task.steps, "step")
    print(f"{task.name}: {size} ({who}), results in {out}{told}", file=sys.stderr)
    print(f"about {ahead} ahead; Ctrl-C is safe, and the same command goes on from there", file=sys.stderr)
    with held(out), ProgressBars([cell for cell in cells if cell not in done]) as bars:
        return run(cells, out, bars, workers=workers, make_task=make_task, own_methods=own_methods)


def time_cells(cells: Sequence[Cell], out: Path) -> Outcome:
    """Measure what the finished runs among these take; their results come with the seconds that were measured."""
    done = finished(with_timed(cells, out), out)
    if not done:
        raise BenchError(f"{out} holds none of these runs: run them first, with the same command without --timing")
    if len(done) > sum(cell in done for cell in cells):
        print("runs that were timed before are timed again: seconds compare within one measurement", file=sys.stderr)
    missing = [cell.name for cell in cells if cell not in done]
    if missing:
        print(f"not timed, since they are not finished: {', '.join(missing)}", file=sys.stderr)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > MOST_LOAD:
        print(f"the machine is not idle (load average {load:.1f}): these seconds may mislead", file=sys.stderr)
    with held(out), turns_bar(f"timing {counted(len(done), 'run')} of {cells[0].task.name}") as after_turn:
        timings = measure(done, out, after_turn)
    return Outcome(
        tuple(
            replace(result, seconds=timing.seconds, overhead_seconds=timing.own_seconds, clock="interleaved")
            for result, timing in zip(done.values(), timings, strict=True)
        ),
        rounds=tuple(timing.rounds for timing in timings),
    )
