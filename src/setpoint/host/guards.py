"""Guards: whether optimizers still step, and whether model and copies are still those that were attached."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, final

import torch
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


@final
class Unseen:
    """Counts the backward passes since the last step that was seen, and warns once where other hands make the steps.

    Of each optimizer it looks at one parameter, the first that trains. Passes whose gradients add up for one step count
    once, and those in the closure of a step not at all. Parameters that `fully_shard` has sharded are not looked at:
    their gradients come by other ways.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        found = [_held(optimizer) for optimizer in optimizers]
        held = Counter(number for parameters in found for number in {id(p) for p in parameters})
        self._watches = {
            id(optimizer): _Watch(type(optimizer).__name__, [p for p in parameters if held[id(p)] == 1 or not n])
            for n, (optimizer, parameters) in enumerate(zip(optimizers, found, strict=True))
        }
        self._within = False
        own = weakref.ref(self)  # a parameter must not keep a loop alive

        def passed(number: int, parameter: Tensor) -> None:
            unseen = own()
            if unseen is not None and not unseen._within:
                unseen._passed(unseen._watches[number], parameter)

        self._handles: list[Any] = [
            watch.parameter.register_post_accumulate_grad_hook(partial(passed, number))  # type: ignore[no-untyped-call]
            for number, watch in self._watches.items()
            if watch.parameter is not None
        ]
        for watch in self._watches.values():
            watch.parameter = None  # neither must a loop keep a parameter

    @property
    def passes(self) -> int:
        """Backward passes since the last step, of the optimizer that has seen most."""
        return max(watch.passes for watch in self._watches.values())

    def step_begins(self) -> None:
        """An optimizer is about to step; it may run backward passes in a closure."""
        self._within = True

    def step_ends(self, optimizer: Optimizer) -> None:
        """An optimizer has stepped."""
        self._within = False
        self._watches[id(optimizer)].stepped()

    def _passed(self, watch: _Watch, parameter: Tensor) -> None:
        """A backward pass has come by."""
        watch.passed(parameter)
        if watch.moves < _MOVES and watch.passes < _PASSES:
            return
        self.stop()
        moved = "the weights move" if watch.moves >= _MOVES else f"{watch.passes} backward passes were made"
        others = ", as the others do," if any(other.steps > watch.steps for other in self._watches.values()) else ""
        warn(
            f"{moved}, but {watch.name}, given to attach, does not step{others} (it has {watch.steps} times so far): "
            "Setpoint acts on the steps of that very optimizer only. Where another one trains the model now, call "
            "loop.detach() and attach with that"
        )

    def stop(self) -> None:
        """Look no more; may be called again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


class _Watch:
    """What was seen of one optimizer, and of one of its parameters."""

    def __init__(self, name: str, parameters: Sequence[Tensor]) -> None:
        self.name, self.steps, self.passes, self.moves = name, 0, 0, 0
        self.parameter: Tensor | None = next(iter(parameters), None)
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


def _held(optimizer: Optimizer) -> list[Tensor]:
    every = (parameter for settings in optimizer.param_groups for parameter in settings["params"])
    # fully_shard delivers gradients past the hooks of its parameters.
    return [p for p in every if p.requires_grad and p.is_leaf and not is_sharded_tensor(p)]


class Trained:
    """Warns once when weights of a model are trained that were frozen at first."""

    def __init__(self, model: nn.Module) -> None:
        self._frozen = [(name, weakref.ref(p)) for name, p in model.named_parameters() if not p.requires_grad]

    def check(self) -> None:
        """Look whether any of them is trained now."""
        found = [
            name for name, reference in self._frozen if (weight := reference()) is not None and weight.requires_grad
        ]
        if not found:
            return
        self._frozen = []
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        warn(
            f"{', '.join(found[:3])}{more} are trained now, and were frozen when the loop began: FLOPs are counted as "
            "they were then, so a step takes more than the loop reports. Call loop.detach(), and attach again"
        )


class Unchanged:
    """A model and its copies as they were when they were attached.

    Args:
        groups: of the model, as they are now.
    """

    def __init__(self, model: nn.Module, copies: Sequence[object], groups: tuple[Group, ...]) -> None:
        self._model, self._before = model, named_tensors(model)
        self._ties, fits = _ties(self._before), _wide(groups)
        self._copies = {n: copy for n, copy in enumerate(copies) if not _misfit(_of_copy(copy), fits)}

    def check(self, groups: tuple[Group, ...]) -> None:
        """Check that tensors of these groups are the same, with the same ties and the size that they were cut to.

        Of copies, and of weights sharded over ranks, names and sizes are looked at. LoopError says what has changed.
        """
        if what := self._change(groups):
            raise LoopError(
                f"{what} since attach. Nothing was cut now; loop.detach() lets training go on as it is, and attach "
                "prunes the model as it will be then"
            )

    def _change(self, groups: tuple[Group, ...]) -> str:
        """What has changed, as the beginning of a sentence; "" if nothing has."""
        now = named_tensors(self._model)
        wide = _wide(groups)
        if found := _misfit(now, wide):
            name, misfit = found
            owner = name.rpartition(".")[0]
            instead = [repr(name) for name in now.keys() - self._before.keys() if name.startswith(f"{owner}.")]
            beside = f", but {', '.join(sorted(instead)[:3])}" if instead else ""
            return f"the model was changed: {misfit}{beside}"
        ties = _ties(now)
        for name in dict.fromkeys(name for name, _ in wide):
            before, tensor = self._before[name], now[name]
            # Optimizers know parameters by identity: another object is a weight that they do not train.
            if isinstance(before, nn.Parameter) and tensor is not before and not is_sharded_tensor(before):
                return f"the model was changed: {name!r} is another tensor"
            if other := next(iter(sorted(ties[name] ^ self._ties[name])), ""):
                are = "were tied" if other in ties[name] else "are tied no longer"
                return f"the model was changed: {name!r} and {other!r} {are}"
        for number, copy in self._copies.items():
            if found := _misfit(_of_copy(copy), wide):
                return f"copies[{number}] ({type(copy).__name__}) was changed: {found[1]}"
        return ""


def _wide(groups: Sequence[Group]) -> dict[tuple[str, int | None], int]:
    """By tensor and dim, how long it is where units lie in it."""
    return {(place.tensor, place.dim): len(place.index) for group in groups for place in group.slices}


def _of_copy(copy: object) -> dict[str, Tensor]:
    """Its tensors by the model's names."""
    tensors = named_tensors(copy) if isinstance(copy, nn.Module) else {}
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}


def _misfit(tensors: Mapping[str, Tensor], wide: Mapping[tuple[str, int | None], int]) -> tuple[str, str] | None:
    """The first tensor that is not there or of another size, and what is wrong with it."""
    for (name, dim), length in wide.items():
        if name not in tensors:
            return name, f"it has no tensor {name!r} any more"
        shape = tuple(tensors[name].shape)
        if dim is not None and (dim >= len(shape) or shape[dim] != length):
            return name, f"{name!r} has shape {shape}, where dim {dim} should have {length} entries"
    return None


def _ties(tensors: Mapping[str, Tensor]) -> dict[str, set[str]]:
    """By name, all names of tensors that begin at the same place in memory."""
    same: dict[Any, set[str]] = {}
    keys = {name: _place(tensor) for name, tensor in tensors.items()}
    for name, key in keys.items():
        same.setdefault(key, set()).add(name)
    return {name: same[key] for name, key in keys.items()}


def _place(tensor: Tensor) -> Any:
    """Where it begins, or the object itself where there is no such place."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and not tensor.is_meta
    return (tensor.device, tensor.data_ptr()) if plain and tensor.numel() else id(tensor)
