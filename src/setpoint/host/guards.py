"""Guards: whether optimizers still step, and whether model and copies are still those that were attached."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, final

from torch import Tensor, nn
from torch.optim import Optimizer

from setpoint.actuator.tensors import named_tensors
from setpoint.distributed import is_sharded_tensor
from setpoint.errors import LoopError
from setpoint.groups.group import Group
from setpoint.messages import warn

_MOVES = 3
"""Weight changes between backward passes, not made by this optimizer, before we warn."""
_PASSES = 64
"""Backward passes without a step, each with gradients of its own, before we warn."""


class _Watch:
    """Counts of one optimizer, and of the one parameter of it that is looked at."""

    def __init__(self) -> None:
        self.steps = self.passes = self.moves = 0
        self._last_version: int | None = None
        self._gradient: weakref.ref[Tensor] | None = None

    def stepped(self) -> None:
        self.steps, self.passes, self.moves, self._last_version = self.steps + 1, 0, 0, None

    def passed(self, parameter: Tensor) -> None:
        # In-place updates raise the version, whoever makes them; a gradient that adds up stays the same object.
        version, gradient = parameter._version, parameter.grad
        self.moves += self._last_version is not None and version != self._last_version
        self.passes += self._gradient is None or self._gradient() is not gradient
        self._last_version, self._gradient = version, None if gradient is None else weakref.ref(gradient)


@final
class Unseen:
    """Counts backward passes since the last step of each optimizer; warns once if something else trains the model.

    It looks at the first trained parameter of each optimizer. Passes whose gradients add up for one step count once,
    and those in the closure of a step not at all.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._watches = {optimizer: _Watch() for optimizer in optimizers}
        self._within_step = False
        self._handles: list[Any] = []
        own = weakref.ref(self)  # a parameter must not keep a loop alive

        def passed(optimizer: weakref.ref[Optimizer], parameter: Tensor) -> None:
            unseen, stepping = own(), optimizer()
            if unseen is not None and stepping is not None and not unseen._within_step:
                unseen._passed(stepping, parameter)

        watched: set[int] = set()
        for optimizer in optimizers:
            held = (parameter for settings in optimizer.param_groups for parameter in settings["params"])
            # fully_shard delivers gradients past the hooks of its parameters.
            trained = (p for p in held if p.requires_grad and p.is_leaf and not is_sharded_tensor(p))
            parameter = next((p for p in trained if id(p) not in watched), None)
            if parameter is not None:
                watched.add(id(parameter))
                hook = partial(passed, weakref.ref(optimizer))
                self._handles.append(parameter.register_post_accumulate_grad_hook(hook))

    @property
    def passes(self) -> int:
        """Backward passes since the last step, of the optimizer that has seen most."""
        return max(watch.passes for watch in self._watches.values())

    def step_begins(self) -> None:
        """An optimizer is about to step; it may run backward passes in a closure."""
        self._within_step = True

    def step_ends(self, optimizer: Optimizer) -> None:
        self._within_step = False
        self._watches[optimizer].stepped()

    def _passed(self, optimizer: Optimizer, parameter: Tensor) -> None:
        watch = self._watches[optimizer]
        watch.passed(parameter)
        if watch.moves < _MOVES and watch.passes < _PASSES:
            return
        self.stop()
        moved = "the weights move" if watch.moves >= _MOVES else f"{watch.passes} backward passes were made"
        others = ", as the others do," if any(other.steps > watch.steps for other in self._watches.values()) else ""
        warn(
            f"{moved}, but {type(optimizer).__name__}, given to attach, does not step{others} (it has {watch.steps} "
            "times so far): Setpoint acts on the steps of that very optimizer only. Where another one trains the model "
            "now, call loop.detach() and attach with that"
        )

    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


class Unchanged:
    """A model and its copies as they were when they were attached."""

    def __init__(self, model: nn.Module, copies: Sequence[nn.Module]) -> None:
        self._model, self._copies, self._before = model, copies, named_tensors(model)

    def check(self, groups: tuple[Group, ...]) -> None:
        """Check that the tensors of these groups are the same objects, of the size that they were cut to.

        Of copies, and of weights sharded over ranks, names and sizes are looked at. LoopError says what has changed.
        """
        lengths = {(place.tensor, place.dim): len(place.index) for group in groups for place in group.slices}
        now = named_tensors(self._model)
        if change := _misfit(now, lengths) or self._exchanged(now, {name for name, _ in lengths}):
            raise _changed("the model", change)
        for number, copy in enumerate(self._copies):
            tensors = {name.removeprefix("module."): tensor for name, tensor in named_tensors(copy).items()}
            if change := _misfit(tensors, lengths):
                raise _changed(f"copies[{number}] ({type(copy).__name__})", change)

    def _exchanged(self, now: Mapping[str, Tensor], cut: set[str]) -> str:
        # A weight that was tied to one of these, or is now, would change its size with it.
        ours = {id(tensors[name]) for name in cut for tensors in (self._before, now)}
        for name, tensor in now.items():
            before = self._before.get(name)
            # Optimizers know parameters by identity: another object is a weight that they do not train.
            exchanged = tensor is not before and isinstance(tensor, nn.Parameter) and not is_sharded_tensor(tensor)
            if exchanged and (id(tensor) in ours or id(before) in ours):
                return f"{name!r} is another tensor"
        return ""


def _changed(what: str, change: str) -> LoopError:
    return LoopError(
        f"{what} was changed: {change} since attach. Nothing was cut now; loop.detach() lets training go on as it is, "
        "and attach prunes the model as it will be then"
    )


def _misfit(tensors: Mapping[str, Tensor], lengths: Mapping[tuple[str, int | None], int]) -> str:
    """The first tensor that is not there or of another size; "" if there is none."""
    for (name, dim), length in lengths.items():
        if name not in tensors:
            return f"it has no tensor {name!r} any more (parametrizations and torch.nn.utils.prune rename weights)"
        shape = tuple(tensors[name].shape)
        if dim is not None and (dim >= len(shape) or shape[dim] != length):
            return f"{name!r} has shape {shape}, where dim {dim} should have {length} entries"
    return ""
