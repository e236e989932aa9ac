"""A host: how the live model is held - in one process, by `DistributedDataParallel`, by `fully_shard`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float64
from torch import nn
from torch.optim import Optimizer

from setpoint.distributed import Ranks
from setpoint.groups.group import Group
from setpoint.sensor.reading import Reading

Agreed = Callable[[], None]


class SharedLosses(Protocol):
    """The losses that each rank was given for itself; the loop's, which this folder lies below."""

    def unshared(self, step: int) -> Float64[np.ndarray, " n"]:
        """What this rank alone was given up to a step, as numbers whose mean over ranks `share` takes."""

    def share(self, step: int, means: Float64[np.ndarray, " n"]) -> None:
        """From here on know what all ranks together know."""


class Host(Protocol):
    """What a loop asks of the set-up that a model is trained in: `Local`, `DDP` or `FSDP`."""

    model: nn.Module
    """The model itself, without wrappers."""
    optimizers: tuple[Optimizer, ...]
    """Those that really step."""
    named_copies: tuple[Any, ...]
    """What the user has named as copies, averages mostly, in their own wrappers."""
    wrapped: bool
    """Whether `DistributedDataParallel` is around the model, or `fully_shard` in it."""
    compiled: bool
    """Whether any of it was compiled when it was given; code may be compiled later, or around it, too."""
    mesh: Any
    """The ranks that the weights are sharded over; None where each has all of them."""

    @property
    def copies(self) -> tuple[nn.Module, ...]:
        """Modules that are cut like the model."""

    @property
    def ranks(self) -> Ranks:
        """The processes that train the model together."""

    @property
    def device(self) -> torch.device: ...

    @property
    def single_process(self) -> bool:
        """Whether one process has all of the model and its gradients."""

    def together(self, what: str) -> AbstractContextManager[dict[str, Any]]:
        """All ranks do what is inside with the same outcome, or raise."""

    def unsharded(self) -> AbstractContextManager[None]:
        """Inside, model and copies are plain and unsharded on each rank."""

    def mean(self, read: Callable[[], Reading], losses: SharedLosses, step: int) -> Reading:
        """The mean reading over ranks, on which all decide; the losses are then the means over ranks, too."""

    def resizable(self, what: str, groups: Iterable[Group]) -> AbstractContextManager[Agreed]:
        """Inside, tensors of these groups may change their shape, on all ranks; `what` stands in messages.

        It yields a function to be called when all that can fail is done and can still be undone. At the end wrappers,
        shards and compiled code follow, wrappers also after an exception.

        Raises:
            RankError: if another rank failed or computed different shapes.
        """

    def begin(self, *, steps: Callable[[], int], missed: Callable[[], None], groups: tuple[Group, ...]) -> None:
        """A loop begins: `steps` counts its steps, `missed` is called for each that this rank made no part of."""

    def before_step(self, *, first: bool, regrows: bool, by_hooks: bool) -> None:
        """Check that the set-up is the one that was given, more closely at the first step, or raise LoopError.

        Ranks inside `join()` cannot send what regrowth, and a sensor that reads frozen weights by hooks, need.
        """

    def complete(self) -> bool:
        """Whether all ranks have made the step that is just over; asked once after each."""

    def stop(self) -> None:
        """Leave everything around the model as it was; may be called again."""
