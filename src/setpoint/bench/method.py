"""A method: one way to get a trained model of a given size out of a task."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Protocol, runtime_checkable

from torch import Tensor, nn
from torch.optim import Optimizer

from setpoint.bench.course import Course, Pruner
from setpoint.bench.methods.in_training import Setpoint
from setpoint.bench.methods.scratch import Dense, Small
from setpoint.bench.results import Result
from setpoint.bench.task import BenchError, Task

__all__ = ["METHODS", "Dense", "Method", "Setpoint", "Small", "method_named"]


@runtime_checkable
class Method(Protocol):
    """Chooses a course, and what acts on the model while it trains. A method is a value."""

    @property
    def name(self) -> str:
        """Name on the command line and in result files."""
        ...

    @property
    def sized(self) -> bool:
        """Whether the result depends on the budget; the dense model's does not."""
        ...

    @property
    def paper(self) -> str:
        """Where the method comes from, or ""."""
        ...

    @property
    def needs(self) -> tuple[str, ...]:
        """Methods whose cell of the same task, budget and seed must be finished first."""
        ...

    def course(self, task: Task, budget: float, needed: Mapping[str, Result]) -> Course:
        """Where to begin and how long to train.

        Args:
            task: what to train.
            budget: fraction of the dense FLOPs per step.
            needed: the results of the cells that `needs` names, by method.

        Raises:
            BenchError: for a budget that it cannot meet; the message says the least that it can.
        """
        ...

    def begin(
        self, task: Task, model: nn.Module, budget: float, batches: Iterator[tuple[Tensor, Tensor]]
    ) -> tuple[Optimizer, Pruner | None]:
        """Make the optimizer, and put the pruner in place; the time that takes counts as the method's own.

        Args:
            task: the recipe, as the course says.
            model: built as the course says; it may be cut here.
            budget: fraction of the dense FLOPs per step.
            batches: training batches, for a method that looks at some before it begins.
        """
        ...


METHODS: tuple[Method, ...] = (Dense(), Small(), Setpoint())


def method_named(name: str) -> Method:
    """The method of that name, with other settings where the name says so: `rigl@density=0.1`.

    Raises:
        BenchError: there is none, or it has no such setting; the message lists those there are.
    """
    base, *settings = name.split("@")
    for method in METHODS:
        if method.name == base:
            return _with_settings(method, name, settings)
    raise BenchError(f"unknown method {name!r}: use {', '.join(method.name for method in METHODS)}")


def _with_settings(method: Method, name: str, settings: list[str]) -> Method:
    """The method under its full name with each `key=number` set."""
    if not settings:
        return method
    fields = dataclasses.fields(method)  # type: ignore[arg-type]
    known = {each.name for each in fields if isinstance(getattr(method, each.name), float)}
    values: dict[str, float] = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        if key not in known:
            some = ", ".join(f"@{each}=NUMBER" for each in sorted(known)) or "none"
            raise BenchError(f"unknown setting {key!r} of {method.name}: it has {some}")
        try:
            values[key] = float(value)
        except ValueError as error:
            raise BenchError(f"the setting {key!r} of {method.name} is a number, got {value!r}") from error
    return dataclasses.replace(method, name=name, **values)  # type: ignore[type-var]
