"""A method: one way to get a trained model of a given size out of a task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import nn

import setpoint
from setpoint.bench.sizing import small_widths
from setpoint.bench.task import BenchError, Task, dense_widths
from setpoint.loop import Loop


@runtime_checkable
class Method(Protocol):
    """Chooses the widths to start from, and what acts on the model while it trains."""

    @property
    def name(self) -> str:
        """Name on the command line and in result files."""
        ...

    @property
    def sized(self) -> bool:
        """Whether the result depends on the budget; the dense model's does not."""
        ...

    @property
    def family(self) -> str:
        """Kind of method: "dense", "small", "post-training", "open-loop", "sparse" or "setpoint"."""
        ...

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the methods whose cells, of the same task, budget and seed, must be finished before."""
        ...

    def widths(self, task: Task, budget: float) -> Mapping[str, int]:
        """Widths of the model to train from scratch."""
        ...

    def attach(self, task: Task, model: nn.Module, optimizer: torch.optim.Optimizer, budget: float) -> Loop | None:
        """The loop that prunes the model as it trains, if any; its time counts as the method's own."""
        ...


@dataclass(frozen=True)
class Dense:
    """The full model, trained as it is: what pruning is measured against."""

    name: str = field(default="dense", init=False)
    sized: bool = field(default=False, init=False)
    family: str = field(default="dense", init=False)
    needs: tuple[str, ...] = field(default=(), init=False)

    def widths(self, task: Task, budget: float) -> Mapping[str, int]:
        """The dense widths."""
        return dense_widths(task)

    def attach(self, task: Task, model: nn.Module, optimizer: torch.optim.Optimizer, budget: float) -> Loop | None:
        """Nothing."""
        return None


@dataclass(frozen=True)
class Small:
    """A uniformly narrower model trained from scratch at the budget: the honest rival of pruning."""

    name: str = field(default="small", init=False)
    sized: bool = field(default=True, init=False)
    family: str = field(default="small", init=False)
    needs: tuple[str, ...] = field(default=(), init=False)

    def widths(self, task: Task, budget: float) -> Mapping[str, int]:
        """Widths scaled by one factor to the budget."""
        return small_widths(task, budget)

    def attach(self, task: Task, model: nn.Module, optimizer: torch.optim.Optimizer, budget: float) -> Loop | None:
        """Nothing."""
        return None


@dataclass(frozen=True)
class Setpoint:
    """The dense model, pruned by Setpoint to the budget while it trains."""

    name: str = field(default="setpoint", init=False)
    sized: bool = field(default=True, init=False)
    family: str = field(default="setpoint", init=False)
    needs: tuple[str, ...] = field(default=(), init=False)

    def widths(self, task: Task, budget: float) -> Mapping[str, int]:
        """The dense widths."""
        return dense_widths(task)

    def attach(self, task: Task, model: nn.Module, optimizer: torch.optim.Optimizer, budget: float) -> Loop | None:
        """A loop with default settings and a FLOPs budget."""
        return setpoint.attach(
            model,
            optimizer,
            setpoint.Budget.fraction(budget, of="flops"),
            example=task.example(),
            total_steps=task.steps,
        )


METHODS: tuple[Method, ...] = (Dense(), Small(), Setpoint())


def method_named(name: str) -> Method:
    """The method of that name.

    Raises:
        BenchError: there is none; the message lists those there are.
    """
    for method in METHODS:
        if method.name == name:
            return method
    raise BenchError(f"unknown method {name!r}: use {', '.join(method.name for method in METHODS)}")
