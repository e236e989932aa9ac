"""The catalogue: every task by name, from the files of `setpoint_bench.tasks` or a file of the user's own."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import setpoint_bench.tasks
from setpoint.messages import a_type, did_you_mean
from setpoint.report.target import call_own, is_own_function
from setpoint_bench.simple_task import SimpleTask
from setpoint_bench.task import PLAIN, BenchError, fits_a_folder

MakeTask = Callable[[Path | None], SimpleTask]
"""Makes a task at its own length, on the data in a folder or in the usual places."""

M = TypeVar("M", bound=Callable[..., SimpleTask])
_MADE: dict[tuple[str, str], MakeTask] = {}
"""What the decorator saw, by module and name of the task."""


def task(name: str, about: str = "", **settings: Any) -> Callable[[M], M]:
    """Decorate a function that makes a task: the catalogue then has it under this name.

    The file in the folder of `setpoint_bench.tasks` is all that a new task needs. One function may carry several
    names, each with settings of its own.

    Args:
        name: on the command line and in result files.
        about: what it is in a sentence; by default the first line of the function's docstring.
        settings: further arguments of the function.
    """

    def register(make: M) -> M:
        made = partial(make, **settings)
        made.__doc__ = about or make.__doc__
        _MADE[make.__module__, name] = made
        return make

    return register


@cache
def tasks() -> dict[str, MakeTask]:
    """The tasks that come with the benchmark, by name.

    Raises:
        BenchError: two files have a task of one name.
    """
    folder = setpoint_bench.tasks
    found: dict[str, MakeTask] = {}
    for each in pkgutil.iter_modules(folder.__path__, f"{folder.__name__}."):
        import_module(each.name)
        for (module, name), make in _MADE.items():
            if module != each.name:
                continue
            if name in found:
                raise BenchError(f"{module} has a task {name}, which another file has too: give it another name")
            found[name] = make
    return dict(sorted(found.items()))


def task_named(
    name: str, *, epochs: int | None = None, steps: int | None = None, data: Path | None = None
) -> SimpleTask:
    """The task of that name, or the user's own.

    Raises:
        BenchError: there is no such task, or its length is not given that way.
    """
    for option, value in (("--epochs", epochs), ("--steps", steps)):
        if value is not None and value < 1:
            raise BenchError(f"{option} must be at least 1, got {value}")
    if epochs is not None and steps is not None:
        raise BenchError("a run is as long as --epochs or as --steps says: give one of them")
    usual = _usual(name, data)
    if steps is not None:
        return usual.with_steps(steps)
    if epochs is None:
        return usual
    return usual.with_epochs(epochs)


def _usual(name: str, data: Path | None) -> SimpleTask:
    known: Mapping[str, MakeTask] = tasks()
    if name in known:
        return known[name](data)
    if not is_own_function(name):
        hint = did_you_mean(name, known)
        raise BenchError(f"unknown task {name!r}: {hint}use {', '.join(known)}, or your own as module.py:function")
    if data is not None:
        raise BenchError(f"--data is for the tasks that come with Setpoint: {name} finds its data itself")
    made = call_own(name)
    if not isinstance(made, SimpleTask):
        raise BenchError(f"{name} returned {a_type(made)}: return a setpoint_bench.simple_task.SimpleTask")
    if not fits_a_folder(made.name):
        raise BenchError(f"{name} returned a task named {made.name!r}, which cannot name a folder: {PLAIN}")
    return made
