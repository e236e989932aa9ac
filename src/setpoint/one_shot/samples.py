"""Samples: the batches of a data loader as inputs of a model, without their labels where it takes them so."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from setpoint.errors import ExampleError
from setpoint.groups.example import Example, inputs_of, mapped, num_samples, tensors_of
from setpoint.messages import a_type
from setpoint.one_shot.forward import batch_norms_of, without_training

_LABELS = frozenset({"label", "labels", "label_ids", "target", "targets"})
_MOST_EMPTY = 100
"""Batches without a row that are passed over, one after the other; a stream of nothing else would never end."""


def first_batches(data: Iterable[Any], count: int, model: nn.Module) -> tuple[Example, ...]:
    """The first batches of the data that have as many samples together, on the model's device.

    Batches without a row are passed over. So are batches of one sample, where the model has a BatchNorm and another
    batch has more: the variance of one is not known.

    Args:
        data: batches: tensors; tuples or lists whose first part is the input, or a tuple of inputs, or of which all
            parts but the last are inputs; or dicts of inputs by name. Labels are taken out, unless the model runs only
            with them.
        count: of samples; the last batch is taken whole.
        model: that is given them.

    Raises:
        ExampleError: for what is no batches, a batch of another form, one that the model does not take or that holds
            NaN, or where there is none.
    """
    _check_batches(data)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    found: list[Example] = []
    form: Callable[[Any], Example] | None = None
    normalised = bool(batch_norms_of(model))
    seen = 0
    for number, batch in _with_rows(data):
        batch = mapped(lambda tensor: tensor.detach().to(device), batch)
        form = form or _form_of(model, batch)
        found.append(form(batch))
        _check_numbers(found[-1], number)
        rows = num_samples(found[-1])
        seen += 0 if normalised and rows == 1 else rows
        if seen >= count or len(found) > count:
            break
    if not found:
        raise ExampleError("data has no batch with a row: give at least one, as the model is given them in training")
    several = [each for each in found if num_samples(each) > 1] if normalised else []
    return tuple(several or found)


def _with_rows(data: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    """The batches that hold rows, with their numbers."""
    empty = 0
    for number, batch in enumerate(data):
        rows = next((len(tensor) for tensor in tensors_of(inputs_in(batch)) if tensor.dim()), 1)
        empty = 0 if rows else empty + 1
        if rows:
            yield number, batch
        elif empty == _MOST_EMPTY:
            return


def _form_of(model: nn.Module, batch: Any) -> Callable[[Any], Example]:
    """What makes inputs of a batch: the first that the model runs on.

    Raises:
        ExampleError: when it runs on none.
    """
    errors: list[Exception] = []
    several = isinstance(batch, (tuple, list)) and len(batch) > 2
    # Where two inputs and a label come, a forward of one input and options would run with the first input alone.
    forms = (*([_all_but_the_last] if several else []), inputs_in, _with_labels, _inner)
    for form in forms:
        args, kwargs = inputs_of(form(batch))
        try:
            with torch.no_grad(), without_training(model, "running"):
                model(*args, **kwargs)
            return form
        except Exception as error:  # anything may go wrong in a foreign forward
            errors.append(error)
    first = errors[0]
    raise ExampleError(
        f"the model takes the first batch neither without its labels nor with them ({type(first).__name__}: {first}): "
        "give batches as in training, in the model's dtype, or dicts of inputs by name"
    ) from first


def _check_numbers(example: Example, number: int) -> None:
    for tensor in tensors_of(example):
        if tensor.is_floating_point() and bool((tensor.isnan() | tensor.isposinf()).any()):
            raise ExampleError(f"batch {number} of the data holds NaN or infinity: leave such samples out")


def _check_batches(data: object) -> None:
    if isinstance(data, Tensor) or (isinstance(data, Dataset) and not isinstance(data, IterableDataset)):
        raise ExampleError(
            f"data is {a_type(data)}, whose parts are single samples: give batches, such as a DataLoader, or [x] for "
            "one batch x"
        )
    if isinstance(data, tuple) and len(data) > 1 and all(isinstance(each, Tensor) for each in data):
        raise ExampleError(
            "data is a tuple of tensors, which may be one batch or several: write [(x, y)] for one batch of inputs and "
            "labels, or [x1, x2] for two batches"
        )
    if not are_batches(data):
        raise ExampleError(f"data is {a_type(data)}: give batches, a DataLoader or another iterable of them")


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


def _with_labels(batch: Any) -> Example:
    """All that the batch holds: the entries of a dict, or the parts of a tuple as positional inputs."""
    if isinstance(batch, (tuple, list)) and batch:
        return dict(batch[0]) if isinstance(batch[0], Mapping) else tuple(batch)
    return dict(batch) if isinstance(batch, Mapping) else inputs_in(batch)


def _all_but_the_last(batch: Any) -> Example:
    """Several inputs and a label behind them."""
    return tuple(batch[:-1])


def _inner(batch: Any) -> Example:
    """Several inputs in a tuple of their own; anything else as `inputs_in` has it."""
    several = isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], (tuple, list))
    return tuple(batch[0]) if several else inputs_in(batch)
