"""An inference: one forward pass in eval mode, without autograd, of the model in training itself."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from setpoint.groups.example import Example, inputs_of
from setpoint.groups.model_copy import untouched_attributes, without_users_hooks
from setpoint.groups.rng import preserved_rng_state
from setpoint.resources.replica import active_autocast, forward_pass
from setpoint.spending.meter import Stopwatch

_LEAST_PASSES, _MOST_PASSES, _ENOUGH_S = 5, 30, 0.2


@dataclass(frozen=True, eq=False)
class Inference:
    """A model that answers one batch, under autocast to a type of numbers, or to None."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    autocast: torch.dtype | None

    @classmethod
    def of(cls, model: nn.Module, example: Example) -> Inference:
        """A model on the inputs of an example, under the autocast that is active now."""
        return cls(model, *inputs_of(example), active_autocast(model))

    def timed(self) -> tuple[Measured | None, int]:
        """Seconds of a pass as the median of several, after one that is not counted; and the number of all passes.

        Weights, buffers, attributes, modes, gradients and random number generators are as before, and the user's
        hooks are not called.
        """
        watch, times = Stopwatch(synchronize=True), list[float]()
        undone = (preserved_rng_state, _untouched_buffers, untouched_attributes, without_users_hooks)
        with ExitStack() as after:
            for untouched in undone:
                after.enter_context(untouched(self.model))
            for module in self.model.modules():
                module.training = False  # not by `eval`, which a model may override to fold weights together
            self._pass()
            while len(times) < _MOST_PASSES and (len(times) < _LEAST_PASSES or watch.seconds < _ENOUGH_S):
                with watch:
                    self._pass()
                times.append(watch.last_seconds)
        read = [seconds for seconds in times if seconds > 0]  # a coarse clock may stand still
        return median_of(read) if read else None, 1 + len(times)

    def _pass(self) -> None:
        forward_pass(self.model, self.args, self.kwargs, self.autocast)


@contextmanager
def _untouched_buffers(model: nn.Module) -> Iterator[None]:
    named = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    kept = [(buffer, buffer._version, buffer.clone()) for buffer in model.buffers() if not buffer.is_inference()]
    try:
        yield
    finally:
        for buffers, before in named:
            buffers.clear()
            buffers.update(before)
        with torch.no_grad():
            for buffer, version, value in kept:
                if buffer._version != version:
                    buffer.copy_(value)


@dataclass(frozen=True)
class Measured:
    """A median of repeated measurements with its 95 % interval, and the lowest of them."""

    value: float
    low: float
    high: float
    lowest: float


def median_of(values: Sequence[float]) -> Measured:
    """The median with its 95 % interval, which holds for any distribution.

    The number of n values that lie below the true median is binomial with probability 1/2, so the order statistics
    `n/2 -+ 1.96 sqrt(n)/2` enclose it. Below six values they are the extremes.

    >>> median_of([1.0, 2.0, 3.0, 4.0, 100.0])
    Measured(value=3.0, low=1.0, high=100.0, lowest=1.0)
    """
    ordered, count = sorted(values), len(values)
    low = max(0, math.floor(count / 2 - 1.96 * math.sqrt(count) / 2))
    return Measured(statistics.median(ordered), ordered[low], ordered[count - 1 - low], ordered[0])
