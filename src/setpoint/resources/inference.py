"""An inference: one forward pass in eval mode, without autograd, on a copy or on the model in training itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from setpoint.actuator.tensors import named_tensors
from setpoint.groups.example import Example, inputs_of
from setpoint.groups.group import Group
from setpoint.groups.model_copy import untouched_attributes, without_users_hooks
from setpoint.groups.rng import preserved_rng_state
from setpoint.resources.median import Measured, median_of
from setpoint.resources.replica import Replica, fresh_replica
from setpoint.spending.seconds import Stopwatch

_LEAST_PASSES, _MOST_PASSES, _ENOUGH_S = 5, 30, 0.2


@dataclass(frozen=True, eq=False)
class Inference:
    """A model that answers one batch.

    The modules' own `training` flags are set and put back, without calling `train()` or `eval()`: what a model does
    in an overridden one, such as folding weights together, is left out.

    Args:
        autocast: the type of numbers that the forward is cast to, None for the model's own.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    autocast: torch.dtype | None

    @classmethod
    def of(cls, model: nn.Module, example: Example) -> Inference:
        """A model, on the inputs of an example and under the autocast that is active now."""
        args, kwargs = inputs_of(example)
        kind = _kind(model)
        return cls(model, args, kwargs, torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None)

    def step(self) -> None:
        """One forward pass."""
        # Weights that autocast keeps from here would have no gradient in a step of training.
        casting = torch.autocast(
            _kind(self.model), dtype=self.autocast, enabled=self.autocast is not None, cache_enabled=False
        )
        with torch.no_grad(), casting:
            self.model(*self.args, **self.kwargs)

    def narrow(self, groups: tuple[Group, ...], widths: Mapping[str, int]) -> tuple[Group, ...]:
        """Cut the groups of this copy to these widths; gives the groups at them."""
        return Replica(self.model, (), self.args, self.kwargs).narrow(groups, widths)

    def held(self) -> Sequence[Tensor]:
        """Tensors that live between passes: weights, buffers, inputs."""
        leaves = [*named_tensors(self.model).values(), *pytree.tree_leaves((self.args, dict(self.kwargs)))]
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def timed(self) -> tuple[Measured | None, int]:
        """Seconds of a pass as the median of several, after one that is not counted; and the number of all passes.

        Weights, buffers, attributes, modes, gradients and random number generators are as before, and the user's
        hooks are not called. A pass in which the clock stood still or ran backwards is no reading.
        """
        watch, times = Stopwatch(synchronize=True), []
        model = self.model
        undone = (preserved_rng_state, _untouched_buffers, untouched_attributes, without_users_hooks)
        with ExitStack() as after:
            for untouched in undone:
                after.enter_context(untouched(model))
            _answer(model)
            self.step()
            for _ in range(_MOST_PASSES):
                with watch:
                    self.step()
                times.append(watch.last_seconds)
                if len(times) >= _LEAST_PASSES and watch.seconds >= _ENOUGH_S:
                    break
        read = [seconds for seconds in times if seconds > 0]
        return median_of(read) if read else None, 1 + len(times)


def _kind(model: nn.Module) -> str:
    return next((parameter.device.type for parameter in model.parameters()), "cpu")


@contextmanager
def inference_replica(
    model: nn.Module, example: Example, groups: tuple[Group, ...], widths: Mapping[str, int], *, data: bool
) -> Iterator[Inference]:
    """A copy of a model, cut to these widths, that answers one batch; without `data` its tensors have no memory."""
    with fresh_replica(model, (), example, groups, widths, data=data) as made:
        _answer(made.model)
        yield Inference(made.model, made.args, made.kwargs, Inference.of(model, example).autocast)


def _answer(model: nn.Module) -> None:
    for module in model.modules():
        module.training = False


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
