"""A host: how the live model is held - in one process, by `DistributedDataParallel`, by `fully_shard`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from setpoint.distributed import Ranks, unwrapped
from setpoint.errors import GroupError, LoopError
from setpoint.groups.group import Group
from setpoint.host.local import Agreed, Local, SharedLosses, check_plain
from setpoint.host.optimizers import Steps, real_optimizers
from setpoint.sensor.reading import Reading


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


def host_of(model: nn.Module, optimizer: Steps | Sequence[Steps], copies: Sequence[Any] | None = ()) -> Host:
    """How a model is held: it is taken out of `torch.compile` and `DistributedDataParallel` in any order.

    Raises:
        LoopError: for what is no module, and for any other wrapper for several devices.
        GroupError: for copies that are none.
        OptimizerError: for what is no optimizer, and for one that cannot follow a cut.
    """
    if not isinstance(model, nn.Module):
        raise LoopError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    outer, model = model, unwrapped(model)
    parallel = next((module for module in outer.modules() if isinstance(module, DistributedDataParallel)), None)
    sharded = check_plain(model)
    if sharded and parallel is not None:
        raise LoopError("fully_shard inside DistributedDataParallel is not supported: use one of the two")
    optimizers, named = real_optimizers(optimizer), _as_tuple(copies)
    compiled = any(hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in outer.modules())
    # Few runs are distributed: what they need is loaded by those alone.
    if parallel is not None:
        from setpoint.host.ddp import DDP

        return DDP(model, optimizers, named, compiled=compiled, parallel=parallel)
    if sharded:
        from setpoint.host.fsdp import FSDP

        return FSDP(model, optimizers, named, compiled=compiled)
    return Local(model, optimizers, named, compiled=compiled)


def _as_tuple(named: Any) -> tuple[Any, ...]:
    """What was given for copies; GroupError for what is no sequence."""
    if named is None:
        return ()
    one = isinstance(named, nn.Module) and not isinstance(named, nn.ModuleList)
    if one or hasattr(named, "shadow_params") or not isinstance(named, Iterable):
        raise GroupError(
            f"copies must be a sequence of modules or of objects with shadow_params, got {type(named).__name__}: "
            "write copies=(it,)"
        )
    return tuple(named)
