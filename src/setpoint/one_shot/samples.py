"""Samples: the batches of a data loader as inputs of a model, without their labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from setpoint.errors import ExampleError
from setpoint.groups.example import Example, mapped, num_samples
from setpoint.words import a_type

_LABELS = frozenset({"label", "labels", "label_ids", "target", "targets"})


def first_batches(data: Iterable[Any], count: int, model: nn.Module) -> tuple[Example, ...]:
    """The first batches of the data that have as many samples together, on the model's device.

    Args:
        data: batches: tensors; tuples or lists whose first part is the input; or dicts of inputs by name, from which
            labels are taken out.
        count: of samples; the last batch is taken whole.
        model: that is given them.

    Raises:
        ExampleError: for what is no batches, a batch of another form, or where there is none.
    """
    if not are_batches(data):
        raise ExampleError(f"data is {a_type(data)}: give batches, a DataLoader or another iterable of them")
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    found: list[Example] = []
    seen = 0
    for batch in data:
        found.append(mapped(lambda tensor: tensor.detach().to(device), inputs_in(batch)))
        seen += num_samples(found[-1])
        if seen >= count:
            break
    if not found:
        raise ExampleError("data has no batch: give at least one, as the model is given them in training")
    return tuple(found)


def are_batches(data: object) -> bool:
    """Whether data can be gone through batch by batch; a module cannot, even where its parts can.

    >>> are_batches([(3, 4)]), are_batches(5), are_batches(nn.Sequential())
    (True, False, False)
    """
    iterable = hasattr(data, "__iter__") or hasattr(data, "__getitem__")
    return iterable and not isinstance(data, (nn.Module, str, type))


def inputs_in(batch: Any) -> Example:
    """What of a batch is input.

    >>> inputs_in({"input_ids": 1, "labels": 2}), inputs_in((3, 4))
    ({'input_ids': 1}, (3,))
    """
    if isinstance(batch, Tensor):
        return (batch,)
    if isinstance(batch, Mapping):
        return {name: value for name, value in batch.items() if name not in _LABELS}
    if isinstance(batch, (tuple, list)) and batch:
        first = batch[0]
        return inputs_in(first) if isinstance(first, Mapping) else (first,)
    raise ExampleError(
        f"a batch is a tensor, a tuple (inputs, labels) or a dict of inputs, got {type(batch).__name__}: give data "
        "such batches"
    )
