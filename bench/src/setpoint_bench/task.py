"""A task: data, a dense model, and a training recipe that every method is measured on."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from setpoint.errors import UsageError
from setpoint.messages import did_you_mean

Split = Literal["validation", "test"]
Metric = Literal["accuracy", "loss"]


class BenchError(UsageError):
    """A benchmark that cannot run as asked: unknown task or method, missing data, missing extra."""


@dataclass(frozen=True)
class Dimension:
    """One free width of a task's model.

    Args:
        dense: units of the dense model.
        multiple_of: step in which a model built from scratch chooses this width.
    """

    dense: int
    multiple_of: int = 1


@dataclass(frozen=True)
class Score:
    """What an evaluation found: mean loss in nats, and the share of right answers if there are any."""

    loss: float
    accuracy: float | None = None


@runtime_checkable
class Task(Protocol):
    """What a method needs to train a model and what the runner needs to judge it.

    The model is built from its widths alone, so that dense, small and pruned models are of one family.
    Everything random follows from the seed, and no data order depends on the method. A task is a value:
    equal tasks have equal hashes.
    """

    def __hash__(self) -> int: ...

    @property
    def name(self) -> str:
        """Name on the command line and in result files."""
        ...

    @property
    def device(self) -> torch.device:
        """Where model and batches lie."""
        ...

    @property
    def metric(self) -> Metric:
        """Which field of `Score` is reported."""
        ...

    @property
    def dimensions(self) -> Mapping[str, Dimension]:
        """The free widths of the model, by name."""
        ...

    @property
    def steps(self) -> int:
        """Optimizer steps of one run."""
        ...

    def num_samples(self) -> int:
        """Samples whose mean loss a step's gradient is of: images of a batch, or all tokens of its windows."""
        ...

    @property
    def steps_per_validation(self) -> int:
        """Optimizer steps between two looks at the validation data."""
        ...

    @property
    def dtype(self) -> str:
        """Name of the type that products are computed in."""
        ...

    def with_steps(self, steps: int) -> Task:
        """The same task in a run of so many steps, its schedule stretched or compressed."""
        ...

    def with_learning_rate_factor(self, factor: float) -> Task:
        """The same task at a learning rate `factor` times as high."""
        ...

    def from_scratch(self) -> Task:
        """The same task with the learning rate for narrower models of fresh weights."""
        ...

    def build(self, widths: Mapping[str, int], device: torch.device | None = None) -> nn.Module:
        """A fresh model of these widths, initialised from the global random state.

        Args:
            widths: by name, as in `dimensions`.
            device: where to build it, the task's own by default; on "meta" it has shapes only.
        """
        ...

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The recipe's optimizer."""
        ...

    def schedule(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        """The recipe's learning rate, stepped once per optimizer step."""
        ...

    def example(self) -> tuple[Tensor, ...]:
        """Positional inputs of the model, shaped like one training batch."""
        ...

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless training batches of inputs and targets, in an order fixed by the seed."""
        ...

    def loss(
        self, model: nn.Module, inputs: Shaped[Tensor, "batch ..."], targets: Shaped[Tensor, "batch ..."]
    ) -> Tensor:
        """Batch-mean training loss."""
        ...

    def evaluate(self, model: nn.Module, split: Split) -> Score:
        """Score of the model in evaluation mode; the mode is restored."""
        ...


def dense_widths(task: Task) -> dict[str, int]:
    """Widths of the task's dense model."""
    return {name: dimension.dense for name, dimension in task.dimensions.items()}


PLAIN = "use letters, digits and . _ - + @, not only dots"


def fits_a_folder(name: str) -> bool:
    """Whether a name can be part of a folder's name on every system, and leads nowhere else.

    >>> fits_a_folder("my-task.2"), fits_a_folder("../other"), fits_a_folder("a b")
    (True, False, False)
    """
    return re.fullmatch(r"[\w.+@-]*[\w+@-][\w.+@-]*", name, re.ASCII) is not None


def split_named(name: str) -> Split:
    """The split of that name.

    Raises:
        BenchError: there is none.
    """
    for split in get_args(Split):
        if split == name:
            return split  # type: ignore[no-any-return]
    raise BenchError(f"unknown split {name!r}: {did_you_mean(name, get_args(Split))}use {' or '.join(get_args(Split))}")
