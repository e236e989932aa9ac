"""Unseen: a model that goes on training while none of the optimizers that its loop watches steps."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any, final

from torch import Tensor
from torch.optim import Optimizer

from setpoint.distributed import is_sharded_tensor
from setpoint.messages import warn

_MOVES = 3
"""So often weights move between backward passes by other hands before that is said."""
_PASSES = 64
"""So many backward passes without a step, each with gradients of its own, before that is said."""


@final
class Unseen:
    """Counts the backward passes since the last step that was seen, and warns once where other hands make the steps.

    Of each optimizer it looks at one parameter, the first that trains. Passes whose gradients add up for one step count
    once, and those in the closure of a step not at all. Parameters that `fully_shard` has sharded are not looked at:
    their gradients come by other ways.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        found = [_held(each) for each in optimizers]
        held = Counter(number for each in found for number in {id(p) for p in each})
        self._watches = {
            id(each): _Watch(type(each).__name__, [p for p in parameters if held[id(p)] == 1 or not n])
            for n, (each, parameters) in enumerate(zip(optimizers, found, strict=True))
        }
        self._within = False
        own = weakref.ref(self)  # a parameter must not keep a loop alive

        def passed(number: int, parameter: Tensor) -> None:
            unseen = own()
            if unseen is not None and not unseen._within:
                unseen._passed(unseen._watches[number], parameter)

        self._handles: list[Any] = [
            each.parameter.register_post_accumulate_grad_hook(partial(passed, number))  # type: ignore[no-untyped-call]
            for number, each in self._watches.items()
            if each.parameter is not None
        ]
        for each in self._watches.values():
            each.parameter = None  # neither must a loop keep a parameter

    @property
    def passes(self) -> int:
        """Backward passes since the last step, of the optimizer that has seen most."""
        return max(each.passes for each in self._watches.values())

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
        others = ", as the others do," if any(each.steps > watch.steps for each in self._watches.values()) else ""
        warn(
            f"{moved}, but {watch.name}, given to attach, does not step{others} (it has {watch.steps} times so far): "
            "Setpoint acts on the steps of that very optimizer only. Where another one trains the model now, call "
            "loop.detach() and attach with that"
        )

    def stop(self) -> None:
        """Look no more; may be called again."""
        for each in self._handles:
            each.remove()
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
        version, gradient = parameter._version, parameter.grad
        self.moves += self._last_version is not None and version != self._last_version
        self.passes += self._gradient is None or self._gradient() is not gradient
        self._last_version, self._gradient = version, None if gradient is None else weakref.ref(gradient)


def _held(optimizer: Optimizer) -> list[Tensor]:
    every = (parameter for settings in optimizer.param_groups for parameter in settings["params"])
    return [each for each in every if each.requires_grad and each.is_leaf and not is_sharded_tensor(each)]
