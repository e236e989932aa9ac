"""Fit: a model takes the shapes of a state or a file; all or nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from functools import partial

import torch
from torch import Tensor, nn

from setpoint.actuator.cut import SizePlace
from setpoint.actuator.in_state_dict import carry_sizes
from setpoint.actuator.model_shapes import ModelShapes, Shapes, apply_sizes, by_every_name, check_sizes, note_cut
from setpoint.actuator.tensors import in_format, named_tensors, swap
from setpoint.errors import CheckpointError, GroupError


@torch.no_grad()
def fit(
    model: nn.Module,
    shapes: Shapes,
    sizes: Mapping[SizePlace, int],
    values: Mapping[str, Tensor],
    dense: Shapes | None = None,
) -> ExitStack:
    """Give a model other shapes; all or nothing.

    Tensors keep their identity, device and memory format. What is not named gets its dense shape and size.

    Args:
        shapes: by name of each tensor that is narrower than when the model was built.
        sizes: by module and place, the integers that go with them.
        values: by name, new contents; other tensors that change hold zeros until a state is loaded. A buffer that the
            model's code has declared as None, and makes in a forward, is made.
        dense: shapes before the first cut, by name, where the model itself does not know them.

    Returns:
        What puts everything back when it is closed.

    Raises:
        CheckpointError: for what this model does not have, or is wider than this model was when it was built.
    """
    known, later = ModelShapes.of(model), not_made(model, values)
    full = {**known.full(model), **(dense or {})}
    for name, shape in shapes.items():
        if name in later:
            continue
        if name not in full:
            raise CheckpointError(f"the state dict is of another model: this one has no {name!r}")
        if len(shape) != len(full[name]) or any(new > old for new, old in zip(shape, full[name], strict=True)):
            raise CheckpointError(
                f"the state dict is of another model: {name!r} has shape {shape} there and {full[name]} in the dense "
                "model, which can only become narrower"
            )
    try:
        check_sizes(model, sizes)
    except GroupError as error:
        raise CheckpointError(f"the state dict is of another model: {error}") from error
    with ExitStack() as undo:
        # Made first, since the record below takes shapes of tensors that are there.
        for name in later:
            _make(model, name, values[name], undo)
        tensors = named_tensors(model)
        shapes = by_every_name(shapes, tensors)
        after = {name: shapes.get(name, full.get(name, ())) for name in {**known.dense, **shapes} if name in tensors}
        every_size = {**known.dense_sizes, **sizes}  # what the state does not set is dense again
        note_cut(model, after, every_size, undo, dense)
        carry_sizes(model)
        for name in dict.fromkeys([*after, *values]):
            tensor = tensors.get(name)
            if tensor is None:  # of a head that this model does not have
                continue
            if name in values:
                swap(tensor, in_format(values[name].detach().to(tensor.device, copy=True), tensor), undo)
            elif tuple(tensor.shape) != after[name]:
                swap(tensor, in_format(tensor.new_zeros(after[name]), tensor), undo)
        apply_sizes(model, every_size, undo)
        torch.clear_autocast_cache()  # which holds weights of the old shapes by identity
        return undo.pop_all()


def not_made(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The buffers of these names that the model's code has declared as None, and makes in a forward."""
    found = []
    for name in names:
        owner, _, key = name.rpartition(".")
        with suppress(AttributeError):
            if getattr(model.get_submodule(owner), key) is None:
                found.append(name)
    return found


def _make(model: nn.Module, name: str, value: Tensor, undo: ExitStack) -> None:
    """Give a model a buffer that its code has yet to make, on the device of its parameters."""
    owner, _, key = name.rpartition(".")
    device = next((parameter.device for parameter in model.parameters()), value.device)
    put = partial(model.get_submodule(owner).register_buffer, key, persistent=False)
    undo.callback(put, None)
    put(value.detach().to(device, copy=True))
