"""Interleaved runs: the methods of a seed take turns in one process, so that the machine's moods hit all alike."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path

from setpoint_bench.results import FILE, Result, append_result, mend
from setpoint_bench.runner import Observer, finished, needed_cells
from setpoint_bench.training import Cell, Progress, train


def run_interleaved(cells: Sequence[Cell], out: Path, observer: Observer) -> tuple[Result, ...]:
    """Train the cells that the folder does not hold yet; those of one seed take turns, the least advanced first.

    Each finished cell is written to `out` at once, so an interruption costs only those under way. A
    cell that needs another's result begins when that one has ended.

    Args:
        cells: what to train, as `grid` gives them.
        out: folder of the results.
        observer: told about each cell after each of its turns, and at its end.

    Raises:
        BenchError: the folder holds runs of another version, length or split.
    """
    out.mkdir(parents=True, exist_ok=True)
    mend(out / FILE)
    done = finished(cells, out)
    for seed in dict.fromkeys(cell.seed for cell in cells):
        _run_seed([cell for cell in cells if cell.seed == seed and cell not in done], out, done, observer)
    return tuple(done[cell] for cell in cells)


def _run_seed(waiting: list[Cell], out: Path, done: dict[Cell, Result], observer: Observer) -> None:
    """Train the cells of one seed, and add their results to `done`."""
    running: dict[Cell, Generator[Progress, None, Result]] = {}
    advance: dict[Cell, float] = {}
    try:
        while waiting or running:
            for cell in list(waiting):
                needed = needed_cells(cell)
                if all(each in done for each in needed.values()):
                    waiting.remove(cell)
                    running[cell] = train(cell, out, {name: done[each] for name, each in needed.items()})
                    advance[cell] = 0.0
            cell = min(running, key=lambda each: advance[each])
            try:
                progress = next(running[cell])
            except StopIteration as end:
                del running[cell]
                done[cell] = replace(end.value, task_steps=cell.task.steps)
                append_result(out, done[cell])
                observer.ended(cell, done[cell])
                continue
            advance[cell] = progress.step / progress.total_steps
            observer(cell, progress)
    finally:
        for training in running.values():
            training.close()
