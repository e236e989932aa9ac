"""Timing: what each finished run takes on an idle machine, from a few steps of each of its stages, taken in turns."""

from __future__ import annotations

import dataclasses
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch

from setpoint.spending.seconds import Stopwatch
from setpoint_bench.environment import environment
from setpoint_bench.method import Method, method_named
from setpoint_bench.own_random import OwnRandom
from setpoint_bench.report.folder import SCHEMA, TIMING, read_timings
from setpoint_bench.report.summary import DENSE
from setpoint_bench.results import FILE, Result, append_line
from setpoint_bench.runner import needed_cells
from setpoint_bench.stages import Stage, built, load_stages
from setpoint_bench.task import BenchError, Task
from setpoint_bench.training import Cell, begin

WARM_UP_STEPS = 2
STEPS_PER_TURN = 4
ROUNDS = 5

Shape = tuple[object, ...]
"""What decides how long a step takes: the shapes of all tensors, and for masked models the cell."""
AGAIN: Shape = ("dense again",)
Step = Callable[[], None]


@dataclass(frozen=True)
class Timing:
    """What one run takes, everything counted.

    With n_i the steps of its stage i and s_ir the median seconds of a step of that stage in round r, a
    round says `sum_i n_i s_ir + own`, where `own` is the method's own seconds as the run itself measured them,
    at its own number of threads.

    Args:
        task: name of the task.
        method: name of the method.
        budget: fraction of the dense FLOPs per step; None where the method has none.
        seed: seed of the run.
        seconds: the median over the rounds.
        rounds: what each round says, in seconds; those of all runs belong together.
        own_seconds: the part that the method itself spends beside plain training steps.
        stage_steps: optimizer steps of each stage.
        step_seconds: median seconds of a step of each stage.
        load: the machine's load average over a minute, before and after; None where it is unknown.
        control: what the dense model's first steps took in the second of their two turns in a round, by the first;
            none where it is not among the runs. It should be 1: how far it is not is how far shares can be believed.
        environment: what the numbers depend on.
        date: when it was measured, ISO 8601 in UTC.
        schema: version of this format.
    """

    task: str
    method: str
    budget: float | None
    seed: int
    seconds: float
    rounds: tuple[float, ...]
    own_seconds: float
    stage_steps: tuple[int, ...]
    step_seconds: tuple[float, ...]
    load: tuple[float, float] | None
    control: tuple[float, ...]
    environment: Mapping[str, str | int]
    date: str
    schema: int = field(default=SCHEMA)


@dataclass(frozen=True, eq=False)
class Subject:
    """A kind of step to be timed.

    Args:
        steps: makes the training that takes such steps.
        device: where it runs.
    """

    steps: Callable[[], Step]
    device: torch.device


def with_timed(cells: Sequence[Cell], out: Path) -> tuple[Cell, ...]:
    """The cells, and those of their task that the folder holds seconds of: only what took turns can be compared.

    Raises:
        BenchError: the folder holds seconds of a method of the user's own that is not among the cells.
        ReportError: the folder's timings are of another version.
    """
    task, split = cells[0].task, cells[0].split
    known = {cell.method.name: cell.method for cell in cells}

    def named(method: str) -> Method:
        try:
            return known.get(method) or method_named(method)
        except BenchError as error:
            raise BenchError(
                f"{out} holds seconds of {method}, and only what is timed together compares: name it among the "
                f"methods, as module.py:function, or delete its lines from {TIMING}"
            ) from error

    before = (
        Cell(task, named(method), budget, seed, split)
        for name, method, budget, seed in read_timings(out, [])
        if name == task.name
    )
    return tuple(dict.fromkeys((*cells, *before)))


def measure(
    done: Mapping[Cell, Result], out: Path, after_turn: Callable[[float], None], *, rounds: int = ROUNDS
) -> tuple[Timing, ...]:
    """Time finished runs, and write what they take to `timing.jsonl` in their folder.

    In each round every kind of step is trained for a turn of a few steps, by a model made for it and gone
    afterwards, so that the machine's moods hit all alike. Equal shapes are timed once for all runs.
    A masked model is trained as its method trains it, since its steps are more than plain ones.
    The dense model, by which all others are divided, has two turns a round: their mean counts, and how far they are
    apart is the control.

    Args:
        done: finished cells and their results.
        out: the folder that they are in.
        after_turn: told after each turn which share of all turns is done.
        rounds: how often every kind of step has its turn.

    Raises:
        BenchError: a run has left no stages to time, or those of another model.
    """
    courses = {cell: _course(cell, result, out, done) for cell, result in done.items()}
    subjects = {shape: subject for course in courses.values() for _, shape, subject in course}
    dense = next((course[0][1] for cell, course in courses.items() if cell.method.name == DENSE), None)
    if dense is not None:
        subjects[AGAIN] = subjects[dense]
    before = _load()
    seconds: dict[Shape, list[float]] = {shape: [] for shape in subjects}
    for turn in range(rounds * len(subjects)):
        # Every other round goes backwards, so that none always follows the same one.
        order = list(subjects) if turn // len(subjects) % 2 == 0 else list(reversed(subjects))
        shape = order[turn % len(subjects)]
        seconds[shape].append(_step_seconds(subjects[shape]))
        after_turn((turn + 1) / (rounds * len(subjects)))
    load = None if before is None else (before, _load() or 0.0)
    control: tuple[float, ...] = ()
    if dense is not None:
        twice = list(zip(seconds[dense], seconds[AGAIN], strict=True))
        control = tuple(again / once for once, again in twice)
        seconds[dense] = [statistics.fmean(each) for each in twice]
    timings = tuple(
        _timing(cell, done[cell], [(steps, seconds[shape]) for steps, shape, _ in course], load, control)
        for cell, course in courses.items()
    )
    for timing in timings:
        append_line(out / TIMING, dataclasses.asdict(timing))
    return timings


def _course(cell: Cell, result: Result, out: Path, done: Mapping[Cell, Result]) -> list[tuple[int, Shape, Subject]]:
    """Steps, shape and kind of each stage of a run."""
    stages = [stage for stage in load_stages(out / result.folder) if stage.num_steps]
    if sum(stage.num_steps for stage in stages) != result.steps:
        raise BenchError(
            f"{out / result.folder} does not hold the stages of its run, to time them: delete its line from {FILE} "
            "and run it again"
        )
    course = [(stage.num_steps, _shape(stage), _plain(cell.task, stage)) for stage in stages]
    if result.density is not None:
        needed = {name: done[each] for name, each in needed_cells(cell).items() if each in done}
        course[-1] = (stages[-1].num_steps, (cell.name,), _masked(cell, out, needed))
    return course


def _shape(stage: Stage) -> Shape:
    return tuple((name, *shape) for name, shape in stage.shapes.items())


def _plain(task: Task, stage: Stage) -> Subject:
    """Ordinary training steps of a stage's model."""

    def steps() -> Step:
        model = built(stage, task)
        optimizer, batches = task.optimizer(model), task.batches(seed=0)
        schedule = task.schedule(optimizer)

        def step() -> None:
            inputs, targets = next(batches)
            torch.autograd.backward(task.loss(model, inputs, targets))
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()

        return step

    return Subject(steps, task.device)


def _masked(cell: Cell, out: Path, needed: Mapping[str, Result]) -> Subject:
    """Steps of the method itself, its masks at work."""

    def steps() -> Step:
        run = begin(cell, out, needed)
        return lambda: run.turn(1)

    return Subject(steps, cell.task.device)


def _step_seconds(subject: Subject) -> float:
    """Median seconds of a step, in one turn."""
    watch, found = Stopwatch(synchronize=True), []
    with OwnRandom(0).drawing():
        step = subject.steps()
        for number in range(WARM_UP_STEPS + STEPS_PER_TURN):
            with watch:
                step()
            if number >= WARM_UP_STEPS:
                found.append(watch.last_seconds)
    return statistics.median(found)


def _timing(
    cell: Cell,
    result: Result,
    course: Sequence[tuple[int, Sequence[float]]],
    load: tuple[float, float] | None,
    control: tuple[float, ...],
) -> Timing:
    """One run's timing from the step seconds of its stages, by round."""
    plain = (
        sum(steps * each for (steps, _), each in zip(course, by_stage, strict=True)) for by_stage in _by_round(course)
    )
    rounds = tuple(each + result.overhead_seconds for each in plain)
    return Timing(
        task=result.task,
        method=result.method,
        budget=result.budget,
        seed=result.seed,
        seconds=statistics.median(rounds),
        rounds=rounds,
        own_seconds=result.overhead_seconds,
        stage_steps=tuple(steps for steps, _ in course),
        step_seconds=tuple(statistics.median(each) for _, each in course),
        load=load,
        control=control,
        environment=environment(cell.task),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _by_round(course: Sequence[tuple[int, Sequence[float]]]) -> Iterator[tuple[float, ...]]:
    return zip(*(each for _, each in course), strict=True)


def _load() -> float | None:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
