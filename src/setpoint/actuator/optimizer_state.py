"""Optimizer state: moments and the like, one number per entry of a parameter, cut along with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import Optimizer

from setpoint.actuator.tensors import take
from setpoint.errors import OptimizerError

Optimizers = Optimizer | Sequence[Optimizer] | None


def as_sequence(optimizers: Optimizers) -> tuple[Optimizer, ...]:
    if optimizers is None:
        return ()
    return (optimizers,) if isinstance(optimizers, Optimizer) else tuple(optimizers)


def cut_state(
    optimizer: Optimizer, parameter: Tensor, dims: Mapping[int, Int[np.ndarray, " _kept"]], name: str
) -> dict[str, Any]:
    """The state of one parameter, cut along the same dims; new tensors, nothing is changed in place.

    Tensors of the parameter's shape are cut; scalars and whatever is not a tensor stay. The parameter still has its old
    shape. An OptimizerError names a tensor of another shape or class, of which nothing says how it follows the cut.
    """

    def cut(value: Tensor, key: str) -> Tensor:
        # Eight-bit moments are subclasses whose blocks do not lie along the dims; a cut would mix their scales.
        if type(value) not in (Tensor, nn.Parameter, FakeTensor):
            raise OptimizerError(
                f"{type(optimizer).__name__} keeps state[{key!r}] of {name} as a {type(value).__name__}, "
                f"which cannot be cut: {INSTEAD}"
            )
        if value.shape == parameter.shape:
            return take(value, dims)
        if value.numel() == 1:  # a step count, or the like
            return value
        raise OptimizerError(
            f"{type(optimizer).__name__} keeps state[{key!r}] of shape {tuple(value.shape)} for {name} "
            f"of shape {tuple(parameter.shape)}, so the state cannot follow when the parameter is cut: {INSTEAD}"
        )

    return {key: map_tensors(value, cut, key) for key, value in optimizer.state.get(parameter, {}).items()}


INSTEAD = (
    "use an optimizer that treats every entry alike, such as torch.optim.AdamW, Adam or SGD, "
    "for the parameters that Setpoint may cut"
)


def map_tensors(value: Any, function: Callable[[Tensor, str], Any], key: str) -> Any:
    """`value` with `function(tensor, where)` in place of every tensor in its lists, tuples and dicts."""
    if isinstance(value, Tensor):
        return function(value, key)
    if isinstance(value, Mapping):
        return {name: map_tensors(item, function, f"{key}.{name}") for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [map_tensors(item, function, f"{key}[{position}]") for position, item in enumerate(value)]
        # A named tuple takes its items one by one.
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def moments_of(optimizer: Optimizer, parameter: Tensor) -> list[tuple[str, Tensor]]:
    """State tensors that have the parameter's shape, each with its place in the state."""
    found: list[tuple[str, Tensor]] = []
    for key, value in optimizer.state.get(parameter, {}).items():
        map_tensors(value, lambda tensor, part: found.append((part, tensor)), key)
    return [(part, tensor) for part, tensor in found if tensor.shape == parameter.shape]
