"""The tasks by name, with their length and data chosen on the command line."""

from __future__ import annotations

from pathlib import Path

from setpoint.bench.cifar10 import Cifar10
from setpoint.bench.digits import Digits
from setpoint.bench.shakespeare import Shakespeare
from setpoint.bench.task import BenchError, Task

TASKS = ("digits", "cifar10", "shakespeare")


def task_named(name: str, *, epochs: int | None = None, steps: int | None = None, data: Path | None = None) -> Task:
    """The task of that name.

    Args:
        name: one of `TASKS`.
        epochs: passes over the data, for tasks on images; None for the task's own choice.
        steps: optimizer steps, for tasks on text; None for the task's own choice.
        data: folder that holds the data; None for the usual places.

    Raises:
        BenchError: there is no such task, or its length is not given that way.
    """
    for option, value in (("--epochs", epochs), ("--steps", steps)):
        if value is not None and value < 1:
            raise BenchError(f"{option} must be at least 1, got {value}")
    if name == "shakespeare":
        if epochs is not None:
            raise BenchError("shakespeare has no epochs: give its length as --steps N")
        return Shakespeare(data=data) if steps is None else Shakespeare(steps=steps, data=data)
    if name in TASKS and steps is not None:
        raise BenchError(f"the length of {name} is given as --epochs E, not --steps")
    if name == "digits":
        return Digits() if epochs is None else Digits(epochs=epochs)
    if name == "cifar10":
        return Cifar10(data=data) if epochs is None else Cifar10(epochs=epochs, data=data)
    raise BenchError(f"unknown task {name!r}: use {', '.join(TASKS)}")
