"""Fit: a model takes the shapes of a state, before its values are loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from functools import partial

import torch
from torch import Tensor, nn

from setpoint.actuator.carried import carry
from setpoint.actuator.cut import SizePlace
from setpoint.actuator.lineage import adopt, note_cut, shapes_before, sizes_before
from setpoint.actuator.shrink import named_tensors
from setpoint.actuator.sizes import apply_sizes, check_sizes, record_buffers, record_dense
from setpoint.actuator.swap import swap
from setpoint.actuator.take import in_format
from setpoint.errors import CheckpointError, GroupError


def dense_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter and buffer as the model's code built it, by name."""
    return {name: tuple(tensor.shape) for name, tensor in named_tensors(model).items()} | shapes_before(model)


@torch.no_grad()
def fit(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[SizePlace, int]) -> ExitStack:
    """Give a model other shapes, of which the values are to be loaded next; all or nothing.

    Tensors keep their identity, device, dtype and memory format. What is not named gets its dense shape and size.

    Args:
        shapes: by name of each tensor that is narrower than when the model was built.
        sizes: by module and place, the integers that go with them.

    Returns:
        What puts everything back when it is closed.

    Raises:
        CheckpointError: for what this model does not have, or is wider than this model was when it was built.
    """
    tensors, dense = named_tensors(model), dense_shapes(model)
    for name, shape in shapes.items():
        if name not in tensors:
            raise CheckpointError(f"the state dict is of another model: this one has no {name!r}")
        if len(shape) != len(dense[name]) or any(new > old for new, old in zip(shape, dense[name], strict=True)):
            raise CheckpointError(
                f"the state dict is of another model: {name!r} has shape {shape} there and {dense[name]} in the dense "
                "model, which can only become narrower"
            )
    try:
        check_sizes(model, sizes)
    except GroupError as error:
        raise CheckpointError(f"the state dict is of another model: {error}") from error
    with ExitStack() as undo:
        after = {name: shapes.get(name, dense[name]) for name in shapes_before(model).keys() | shapes.keys()}
        adopt(model, undo)
        record_dense(model, {name: dense[name] for name in shapes}, undo)
        every = {**sizes_before(model), **sizes}
        note_cut(model, {name: dense[name] for name in shapes}, after, every, undo)
        carry(model)
        for name in sorted(after.keys() & tensors.keys()):
            tensor, shape = tensors[name], after[name]
            if tuple(tensor.shape) != shape:
                swap(tensor, in_format(tensor.new_zeros(shape), tensor), undo)
        apply_sizes(model, every, undo)
        torch.clear_autocast_cache()
        return undo.pop_all()


@torch.no_grad()
def fill(model: nn.Module, transient: Mapping[str, Tensor], undo: ExitStack) -> None:
    """Give non-persistent buffers, which are in no state dict, the values that came beside it."""
    tensors = named_tensors(model)
    for name in not_made(model, transient):
        make(model, name, transient[name], undo)
    for name in transient.keys() & tensors.keys():
        undo.callback(tensors[name].copy_, tensors[name].clone())
        tensors[name].copy_(transient[name])
    record_buffers(model, transient, undo)


def not_made(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The buffers of these names that the model's code has declared as None, and makes in a forward."""
    found = []
    for name in names:
        owner, _, key = name.rpartition(".")
        with suppress(AttributeError):
            if getattr(model.get_submodule(owner), key) is None:
                found.append(name)
    return found


def make(model: nn.Module, name: str, value: Tensor, undo: ExitStack) -> None:
    """Give a model a buffer that its code has yet to make, on the device of its parameters."""
    owner, _, key = name.rpartition(".")
    device = next((parameter.device for parameter in model.parameters()), value.device)
    put = partial(model.get_submodule(owner).register_buffer, key, persistent=False)
    undo.callback(put, None)
    put(value.detach().to(device, copy=True))
