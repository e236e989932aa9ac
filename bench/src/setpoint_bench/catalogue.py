"""The tasks by name, with their length and data chosen on the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from setpoint.report.own_function import is_own_function, named_errors, own_function
from setpoint_bench.simple_task import SimpleTask
from setpoint_bench.task import PLAIN, BenchError, Task, fits_a_folder
from setpoint_bench.tasks.cifar10 import cifar10, cifar10_mini, cifar10_resnet18, cifar10_wrn22_2
from setpoint_bench.tasks.digits import digits
from setpoint_bench.tasks.finetune import finetune
from setpoint_bench.tasks.finetune_text import finetune_text
from setpoint_bench.tasks.mnist import mnist
from setpoint_bench.tasks.shakespeare import shakespeare, shakespeare_10m, shakespeare_mini
from setpoint_bench.tasks.smnist import scifar, smnist


def _digits(data: Path | None) -> SimpleTask:
    if data is not None:
        raise BenchError("--data is for tasks that read a folder: the digits come with scikit-learn")
    return digits()


TASKS: Mapping[str, Callable[[Path | None], SimpleTask]] = {
    "digits": _digits,
    "mnist": mnist,
    "cifar10-mini": cifar10_mini,
    "cifar10": cifar10,
    "cifar10-wrn22-2": cifar10_wrn22_2,
    "cifar10-resnet18": cifar10_resnet18,
    "shakespeare-mini": shakespeare_mini,
    "shakespeare": shakespeare,
    "shakespeare-10m": shakespeare_10m,
    "smnist": smnist,
    "smnist-196": partial(smnist, length=196),
    "psmnist": partial(smnist, permuted=True),
    "psmnist-196": partial(smnist, length=196, permuted=True),
    "scifar": scifar,
    "pscifar": partial(scifar, permuted=True),
    "finetune": finetune,
    "finetune-text": finetune_text,
}


def with_length(name: str, length: int | None) -> str:
    """The name of a task whose sequences have this length; its own where that is None.

    Raises:
        BenchError: the task has no such length.

    >>> with_length("smnist", 196), with_length("smnist", 784), with_length("digits", None)
    ('smnist-196', 'smnist', 'digits')
    """
    if length is None:
        return name
    found = name if length == 784 else f"{name}-{length}"
    if f"{name}-196" not in TASKS or found not in TASKS:
        raise BenchError(f"--length is 784 or 196, of smnist and psmnist: got {length} for {name}")
    return found


def task_named(name: str, *, epochs: int | None = None, steps: int | None = None, data: Path | None = None) -> Task:
    """The task of that name, or the user's own.

    Args:
        name: one of `TASKS`, or `module.py:function` for a function that takes nothing and returns a task.
        epochs: passes over the data, where the data have passes; None for the task's own choice.
        steps: optimizer steps; None for the task's own choice.
        data: folder that holds the data; None for the usual places.

    Raises:
        BenchError: there is no such task, or its length is not given that way.
    """
    for option, value in (("--epochs", epochs), ("--steps", steps)):
        if value is not None and value < 1:
            raise BenchError(f"{option} must be at least 1, got {value}")
    if epochs is not None and steps is not None:
        raise BenchError("a run is as long as --epochs or as --steps says: give one of them")
    task = _task(name, data)
    if steps is not None:
        return task.with_steps(steps)
    if epochs is None:
        return task
    if not isinstance(task, SimpleTask):
        raise BenchError(f"{task.name} has no epochs: give its length as --steps N")
    return task.with_epochs(epochs)


def _task(name: str, data: Path | None) -> Task:
    """The task at its own length."""
    if name in TASKS:
        return TASKS[name](data)
    if not is_own_function(name):
        raise BenchError(f"unknown task {name!r}: use {', '.join(TASKS)}, or your own as module.py:function")
    if data is not None:
        raise BenchError(f"--data is for the tasks that come with Setpoint: {name} finds its data itself")
    with named_errors(name):
        task = own_function(name)()
    if not isinstance(task, Task):
        raise BenchError(f"{name} returned {type(task).__name__}: return a setpoint_bench.simple_task.SimpleTask")
    if not fits_a_folder(task.name):
        raise BenchError(f"{name} returned a task named {task.name!r}, which cannot name a folder: {PLAIN}")
    return task
