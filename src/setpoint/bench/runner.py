"""The runner: trains the methods of a seed side by side, so that the machine's moods hit all alike."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from setpoint.bench.method import Method
from setpoint.bench.results import FILE, Result, append_result
from setpoint.bench.task import BenchError, Split, Task
from setpoint.bench.training import Cell, Progress, train


def grid(
    task: Task, methods: Iterable[Method], budgets: Iterable[float], seeds: Iterable[int], split: Split = "test"
) -> tuple[Cell, ...]:
    """All cells, seed by seed; a method that no budget changes runs once a seed."""
    return tuple(
        Cell(task, method, budget, seed, split)
        for seed in seeds
        for method in methods
        for budget in (budgets if method.sized else (None,))
    )


def run(cells: Sequence[Cell], out: Path, report: Callable[[Cell, Progress], None]) -> tuple[Result, ...]:
    """Train all cells; those of one seed take turns of a few steps, the least advanced first.

    Each finished cell is written to `out` at once, so an interruption costs only those under way.

    Args:
        cells: what to train.
        out: folder of the results.
        report: told about each cell after each of its turns.
    """
    out.mkdir(parents=True, exist_ok=True)
    _check_comparable(cells, out)
    results = []
    for seed in dict.fromkeys(cell.seed for cell in cells):
        running = {cell: train(cell, out) for cell in cells if cell.seed == seed}
        done = dict.fromkeys(running, 0.0)
        try:
            while running:
                cell = min(running, key=lambda each: done[each])
                try:
                    progress = next(running[cell])
                except StopIteration as finished:
                    del running[cell]
                    append_result(out, finished.value)
                    results.append(finished.value)
                    continue
                done[cell] = progress.step / progress.total_steps
                report(cell, progress)
        finally:
            for training in running.values():
                training.close()
    return tuple(results)


def _check_comparable(cells: Sequence[Cell], out: Path) -> None:
    """A folder compares runs of one length and split; others would be set against each other silently."""
    path = out / FILE
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # half a line after a crash
        for cell in cells:
            if row.get("task") == cell.task.name and (row.get("steps"), row.get("split")) != (
                cell.task.steps,
                cell.split,
            ):
                raise BenchError(
                    f"{out} holds {cell.task.name} runs of {row.get('steps')} steps on {row.get('split')}; these "
                    f"are {cell.task.steps} steps on {cell.split}: name another folder with --out"
                )
