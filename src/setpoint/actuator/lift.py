"""Lift: a model that was cut, in its dense shapes for a moment, without what it has learnt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.optim import Optimizer

from setpoint.actuator.lineage import shapes_before, sizes_before
from setpoint.actuator.shrink import named_tensors
from setpoint.actuator.sizes import apply_sizes
from setpoint.actuator.swap import swap
from setpoint.actuator.take import in_format


def was_cut(model: nn.Module) -> bool:
    """Whether any tensor of a model is narrower than when its code built it, by what the model itself remembers."""
    tensors, dense = named_tensors(model), shapes_before(model)
    return any(name in tensors and tuple(tensors[name].shape) != shape for name, shape in dense.items())


@contextmanager
def lifted(model: nn.Module, optimizers: Sequence[Optimizer] = ()) -> Iterator[None]:
    """Inside, every tensor that was cut has its dense shape and holds zeros, and the model's sizes are the dense ones.

    At the end everything is as it was before: values, gradients, sizes and optimizer state, whatever was done to them
    inside.

    Args:
        model: was cut, by `shrink` or by a loop, or read from a file.
        optimizers: their state of these tensors is set aside meanwhile.
    """
    tensors, dense = named_tensors(model), shapes_before(model)
    with ExitStack() as undo, torch.no_grad():
        apply_sizes(model, sizes_before(model), undo)
        for name, shape in dense.items():
            tensor = tensors.get(name)
            if tensor is None or tuple(tensor.shape) == shape:
                continue
            for optimizer in optimizers:
                if tensor in optimizer.state:
                    undo.callback(optimizer.state.__setitem__, tensor, optimizer.state.pop(tensor))
            swap(tensor, in_format(tensor.new_zeros(shape), tensor), undo)
        with torch.enable_grad():
            yield
