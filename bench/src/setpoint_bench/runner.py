"""The runner: every cell in a process of its own, several at a time, finished ones kept and never done twice."""

from __future__ import annotations

import multiprocessing.connection
import os
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Protocol, runtime_checkable

from setpoint.messages import counted
from setpoint_bench.fingerprint import fingerprint
from setpoint_bench.method import Method, method_named
from setpoint_bench.own_random import OwnRandom
from setpoint_bench.results import FILE, Result, append_result, load_results, mend
from setpoint_bench.simple_task import SimpleTask
from setpoint_bench.task import BenchError, Split
from setpoint_bench.training import Cell, Progress, train
from setpoint_bench.worker import Failure, Worker


@runtime_checkable
class Observer(Protocol):
    """Who is told how the cells get on."""

    def __call__(self, cell: Cell, progress: Progress) -> None:
        """A cell has done a turn."""
        ...

    def ended(self, cell: Cell, ending: Result | Failure) -> None:
        """A cell has ended, well or not."""
        ...


@dataclass(frozen=True)
class Outcome:
    """What a benchmark came to.

    Args:
        results: of all finished cells, those of earlier runs too, in the order of the grid.
        failures: cells that could not be finished, and why.
    """

    results: tuple[Result, ...]
    failures: tuple[Failure, ...] = ()


def grid(
    task: SimpleTask, methods: Iterable[Method], budgets: Iterable[float], seeds: Iterable[int], split: Split = "test"
) -> tuple[Cell, ...]:
    """All cells, seed by seed, what is needed first; a method that no budget changes runs once a seed.

    A method that needs another one's result brings that one's cell along, whether it was asked for or not.

    Raises:
        BenchError: for a seed below 0.
    """
    budgets = tuple(budgets)
    cells: dict[Cell, None] = {}
    for seed in seeds:
        if seed < 0:
            raise BenchError(f"a seed is 0 or above, got {seed}")
        for method in methods:
            for budget in budgets if method.sized else (None,):
                for cell in with_needed(Cell(task, method, budget, seed, split)):
                    cells.setdefault(cell)
    return tuple(cells)


def with_needed(cell: Cell) -> tuple[Cell, ...]:
    """A cell after all those that it needs, and those that they need."""
    before = [each for needed in needed_cells(cell).values() for each in with_needed(needed)]
    return (*dict.fromkeys(before), cell)


def needed_cells(cell: Cell) -> dict[str, Cell]:
    """The cells whose results a cell needs, by method; a method without a budget has one cell for all."""
    methods = [method_named(name) for name in cell.method.needs]
    return {
        method.name: Cell(cell.task, method, cell.budget if method.sized else None, cell.seed, cell.split)
        for method in methods
    }


def finished(cells: Sequence[Cell], out: Path) -> dict[Cell, Result]:
    """The folder's results of these cells, except for runs that continue one that is gone or newer.

    Raises:
        BenchError: the folder is of another version, or holds runs of another length or split of these
            tasks, or of tasks of their names with another model, recipe or data: a folder compares like with like.
    """
    by_key = {(each.task, each.method, each.budget, each.seed): each for each in load_results(out)}
    for cell in cells:
        for result in by_key.values():
            steps = result.steps if result.task_steps is None else result.task_steps
            if result.task == cell.task.name and (steps, result.split) != (cell.task.steps, cell.split):
                raise BenchError(
                    f"{out} holds {result.task} runs of {counted(steps, 'step')} on {result.split}; these are "
                    f"{counted(cell.task.steps, 'step')} on {cell.split}: name another folder with --out"
                )
    for task in dict.fromkeys(cell.task for cell in cells):
        known = {each.fingerprint for each in by_key.values() if each.task == task.name and each.fingerprint}
        if known - ({fingerprint(task)} if known else set()):
            raise BenchError(
                f"{out} holds runs of a task {task.name} with another model, recipe or data than it has now, and they "
                "would not compare: name another folder with --out, or change the task back"
            )
    return {cell: by_key[_key(cell)] for cell in cells if _up_to_date(cell, by_key)}


def _key(cell: Cell) -> tuple[str, str, float | None, int]:
    return cell.task.name, cell.method.name, cell.budget, cell.seed


def _up_to_date(cell: Cell, by_key: Mapping[tuple[str, str, float | None, int], Result]) -> bool:
    """Whether it is there, and was made from what it needs as that is now: one trained again outdates the next."""
    found = by_key.get(_key(cell))
    return found is not None and all(
        _up_to_date(each, by_key) and by_key[_key(each)].date <= found.date for each in needed_cells(cell).values()
    )


def make_data_ready(cells: Iterable[Cell]) -> None:
    """Draw one batch of each task, so that missing data are found, and loaded, before any worker starts.

    Raises:
        BenchError: the data are not there.
    """
    for task in dict.fromkeys(cell.task for cell in cells):
        next(task.batches(seed=0))


def check_budgets(cells: Iterable[Cell]) -> None:
    """Size the models of methods that need no other run, so that a budget out of reach is found before any training.

    Raises:
        BenchError: a method cannot meet its budget; the message says the least that it can.
    """
    for (task, method, budget), seed in {(cell.task, cell.method, cell.budget): cell.seed for cell in cells}.items():
        if budget is not None and not method.needs:
            with OwnRandom(seed).drawing():
                method.course(task, budget, {})


def run(
    cells: Sequence[Cell],
    out: Path,
    observer: Observer,
    *,
    workers: int = 1,
    make_task: Callable[[], SimpleTask] | None = None,
    own_methods: Mapping[str, str] = MappingProxyType({}),
) -> Outcome:
    """Train the cells that the folder does not hold yet, each in a fresh process.

    Each finished cell is written to `out` at once, so that whatever ends the run, a kill included,
    costs only the cells under way, and the same call continues there. A cell that fails keeps none
    of the others from running, but for those that need its result.

    Args:
        cells: what to train, as `grid` gives them.
        out: folder of the results.
        observer: is told of every turn and every ending.
        workers: processes at a time; they share the processor's threads evenly.
        make_task: makes the task of all cells in their processes, for one that cannot be sent there.
        own_methods: `module.py:function` of methods that the user's own files make, by their names; it is made there.

    Raises:
        BenchError: the folder holds other runs, or the data are missing.
    """
    out.mkdir(parents=True, exist_ok=True)
    mend(out / FILE)
    done = finished(cells, out)
    waiting = [cell for cell in cells if cell not in done]
    make_data_ready(waiting)
    threads = max(1, _processors() // workers)
    failures: dict[Cell, Failure] = {}
    running: dict[multiprocessing.connection.Connection, Worker] = {}
    try:
        while waiting or running:
            for cell, failure in _hopeless(waiting, failures).items():
                waiting.remove(cell)
                failures[cell] = failure
                observer.ended(cell, failure)
            for cell in _ready(waiting, done)[: workers - len(running)]:
                waiting.remove(cell)
                needed = {name: done[each] for name, each in needed_cells(cell).items()}
                worker = Worker(cell, out, needed, threads, make_task, own_methods.get(cell.method.name))
                running[worker.pipe] = worker
            for pipe in multiprocessing.connection.wait(list(running)) if running else ():
                worker = running[pipe]  # type: ignore[index]
                message = worker.receive()
                if isinstance(message, Progress):
                    observer(worker.cell, message)
                    continue
                del running[worker.pipe]
                if isinstance(message, Result):
                    append_result(out, message)
                    done[worker.cell] = message
                else:
                    failures[worker.cell] = message
                observer.ended(worker.cell, message)
    finally:
        for worker in running.values():
            worker.stop()
    return Outcome(tuple(done[cell] for cell in cells if cell in done), tuple(failures.values()))


def _ready(waiting: Sequence[Cell], done: Mapping[Cell, Result]) -> list[Cell]:
    return [cell for cell in waiting if all(needed in done for needed in needed_cells(cell).values())]


def _hopeless(waiting: Sequence[Cell], failures: Mapping[Cell, Failure]) -> dict[Cell, Failure]:
    """Cells that need one that has failed, or that needs one that has."""
    found: dict[Cell, Failure] = {}
    for cell in waiting:  # in the order of the grid: what is needed comes first
        for needed in needed_cells(cell).values():
            if needed in failures or needed in found:
                found[cell] = Failure(cell.name, f"not run, since it needs {needed.name}, which failed")
    return found


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_interleaved(cells: Sequence[Cell], out: Path, observer: Observer) -> tuple[Result, ...]:
    """Train the cells that the folder does not hold yet; those of one seed take turns, the least advanced first.

    Each finished cell is written to `out` at once, so an interruption costs only those under way. A
    cell that needs another's result begins when that one has ended.

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
