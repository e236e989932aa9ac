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

    def __init__(self, optimizer: Optimizer) -> None:
        self.name, self.steps, self.passes, self.moves = type(optimizer).__name__, 0, 0, 0
        self._last_version: int | None = None
        self._gradient: weakref.ref[Tensor] | None = None

    def stepped(self) -> None:
        self.steps += 1
        self.passes = self.moves = 0
        self._last_version = None

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
        self._watches = [_Watch(optimizer) for optimizer in optimizers]
        self._number = {id(optimizer): number for number, optimizer in enumerate(optimizers)}
        self._within = False
        self._handles: list[Any] = []
        own = weakref.ref(self)  # a parameter must not keep a loop alive

        def passed(number: int, parameter: Tensor) -> None:
            unseen = own()
            if unseen is not None and not unseen._within:
                unseen._passed(unseen._watches[number], parameter)

        watched: set[int] = set()
        for number, optimizer in enumerate(optimizers):
            parameter = next((p for p in _trained(optimizer) if id(p) not in watched), None)
            if parameter is not None:
                watched.add(id(parameter))
                hook = partial(passed, number)
                self._handles.append(parameter.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]

    @property
    def passes(self) -> int:
        """Backward passes since the last step, of the optimizer that has seen most."""
        return max(watch.passes for watch in self._watches)

    def step_begins(self) -> None:
        """An optimizer is about to step; it may run backward passes in a closure."""
        self._within = True

    def step_ends(self, optimizer: Optimizer) -> None:
        self._within = False
        self._watches[self._number[id(optimizer)]].stepped()

    def _passed(self, watch: _Watch, parameter: Tensor) -> None:
        watch.passed(parameter)
        if watch.moves < _MOVES and watch.passes < _PASSES:
            return
        self.stop()
        moved = "the weights move" if watch.moves >= _MOVES else f"{watch.passes} backward passes were made"
        others = ", as the others do," if any(other.steps > watch.steps for other in self._watches) else ""
        warn(
            f"{moved}, but {watch.name}, given to attach, does not step{others} (it has {watch.steps} times so far): "
            "Setpoint acts on the steps of that very optimizer only. Where another one trains the model now, call "
            "loop.detach() and attach with that"
        )

    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _trained(optimizer: Optimizer) -> list[Tensor]:
    held = (parameter for settings in optimizer.param_groups for parameter in settings["params"])
    # fully_shard delivers gradients past the hooks of its parameters.
    return [p for p in held if p.requires_grad and p.is_leaf and not is_sharded_tensor(p)]


class Frozen:
    """Warns once when weights of a model are trained that were frozen at first."""

    def __init__(self, model: nn.Module) -> None:
        self._frozen = [(name, weakref.ref(p)) for name, p in model.named_parameters() if not p.requires_grad]

    def check(self) -> None:
        trained = [name for name, weight in self._frozen if (p := weight()) is not None and p.requires_grad]
        if not trained:
            return
        self._frozen = []
        more = f" and {len(trained) - 3} more" if len(trained) > 3 else ""
        warn(
            f"{', '.join(trained[:3])}{more} are trained now, and were frozen when the loop began: FLOPs are counted "
            "as they were then, so a step takes more than the loop reports. Call loop.detach(), and attach again"
        )


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
        change = _misfit(now, lengths) or self._exchanged(now, {name for name, _ in lengths})
        what = f"the model was changed: {change}" if change else ""
        for number, copy in enumerate(self._copies):
            tensors = {name.removeprefix("module."): tensor for name, tensor in named_tensors(copy).items()}
            if not what and (change := _misfit(tensors, lengths)):
                what = f"copies[{number}] ({type(copy).__name__}) was changed: {change}"
        if what:
            raise LoopError(
                f"{what} since attach. Nothing was cut now; loop.detach() lets training go on as it is, and attach "
                "prunes the model as it will be then"
            )

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


def _misfit(tensors: Mapping[str, Tensor], lengths: Mapping[tuple[str, int | None], int]) -> str:
    """The first tensor that is not there or of another size; "" if there is none."""
    for (name, dim), length in lengths.items():
        if name not in tensors:
            return f"it has no tensor {name!r} any more (parametrizations and torch.nn.utils.prune rename weights)"
        shape = tuple(tensors[name].shape)
        if dim is not None and (dim >= len(shape) or shape[dim] != length):
            return f"{name!r} has shape {shape}, where dim {dim} should have {length} entries"
    return ""
