"""Forwards without training, on the first batches of a data loader.

Dropout is off, and norms use running statistics, those of the batch, or renew them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from setpoint.errors import ExampleError, SetpointError
from setpoint.groups.example import Example, inputs_of, mapped, num_samples, tensors_of
from setpoint.groups.rng import in_eval_mode
from setpoint.messages import a_type

Norms = Literal["running", "batch", "renewed"]
"""What a BatchNorm divides by: its running statistics, those of the batch, or these, which also become its new ones."""


_FIRST_VALUES = 0.05
"""Share of the first values in running statistics, from which on these count as settled."""
_FEWEST_VALUES = 64
"""Values of a channel below which data say nothing of its statistics."""
_FAR = 0.25
"""Squared distance of means and deviations, in deviations, beyond which statistics are not of these data."""


def batch_norms_of(model: nn.Module) -> list[Any]:
    """All BatchNorms of a model, of any number of dims."""
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def _settled(norm: Any) -> bool:
    """Whether running statistics are more than the first values of a norm, or its weights were trained with these."""
    if not norm.running_mean.any() and bool((norm.running_var == 1).all()):
        return norm.affine and (bool((norm.weight != 1).any()) or bool(norm.bias.any()))
    updates = 0 if norm.num_batches_tracked is None else int(norm.num_batches_tracked)
    # Weights of old checkpoints come without a number of updates.
    return not updates or norm.momentum is None or (1 - norm.momentum) ** updates < _FIRST_VALUES


def norms_were_constant(model: nn.Module, batches: Sequence[Example]) -> bool:
    """Whether most BatchNorms have running statistics far from those of the data: they were constants in the training.

    Detectors, and nets that are fine-tuned on small batches, are trained so: with their norms in eval mode. The
    distance of a norm is its median over the channels, since a single channel may be constant on the data.
    """
    sums: dict[nn.Module, list[Tensor]] = {}

    def look(norm: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = (args[0] if args else kwargs["input"]).double().transpose(0, 1).flatten(1)
        new = [values.new_tensor(values.shape[1]), values.sum(1), values.square().sum(1)]
        sums[norm] = [a + b for a, b in zip(sums[norm], new, strict=True)] if norm in sums else new

    norms = [norm for norm in batch_norms_of(model) if norm.running_var is not None and _settled(norm)]
    handles = [norm.register_forward_pre_hook(look, with_kwargs=True) for norm in norms]
    try:
        if norms:
            run(model, batches, "running")
    finally:
        for handle in handles:
            handle.remove()
    distances = []
    for module, (count, total, squares) in sums.items():
        norm: Any = module
        if count < _FEWEST_VALUES:
            continue
        mean = total / count
        deviation = ((squares / count - mean.square()).clamp(min=0) + norm.eps).sqrt()
        kept = (norm.running_var.double() + norm.eps).sqrt()
        off = ((mean - norm.running_mean.double()) / kept).square() + (deviation / kept - 1).square()
        distances.append(float(off.median()))
    return bool(distances) and median(distances) > _FAR


class EnoughSeen(Exception):  # noqa: N818 - no error: it ends a forward of which the rest is of no use
    """Raised in a hook once all that is wanted of a forward was seen."""


@contextmanager
def without_training(model: nn.Module, norms: Norms) -> Iterator[None]:
    """Inside, the model is in eval mode, its norms as said; its modes are restored at the end."""
    batch_norms = batch_norms_of(model)
    before = [(norm.momentum, norm.num_batches_tracked) for norm in batch_norms]
    handles: list[Any] = []
    try:
        with in_eval_mode(model):
            for norm in batch_norms if norms != "running" else ():
                # In train mode with momentum 0 a norm divides by the batch's statistics and keeps its own.
                norm.train()
                norm.momentum = 0.0
                if norms == "renewed":
                    handles.append(norm.register_forward_pre_hook(_weighing(), with_kwargs=True))
                elif norm.num_batches_tracked is not None:
                    norm.num_batches_tracked = norm.num_batches_tracked.clone()  # counted in train mode all the same
            yield
    finally:
        for handle in handles:
            handle.remove()
        for norm, (momentum, counted) in zip(batch_norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, counted


def _weighing() -> Callable[[Any, tuple[Any, ...], dict[str, Any]], None]:
    """A hook with which a BatchNorm's statistics become the mean over all calls, each by its number of values."""
    seen = 0

    def weigh(norm: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal seen
        if not seen:  # not before: one that the data do not come to keeps what it has
            norm.reset_running_stats()
        values = (args[0] if args else kwargs["input"]).numel()
        seen += values
        norm.momentum = values / seen if seen else 0.0

    return weigh


@torch.no_grad()
def run(model: nn.Module, batches: Sequence[Example], norms: Norms, each: Callable[[], Any] = lambda: None) -> None:
    """Run the model on all batches, and call `each` after every one; ExampleError for one that it does not take."""
    # An autocast region would keep low-precision copies of weights, and these are fitted anew between runs.
    torch.clear_autocast_cache()
    with without_training(model, norms), ExitStack() as afterwards:
        afterwards.callback(torch.clear_autocast_cache)
        for number, batch in enumerate(batches):
            args, kwargs = inputs_of(batch)
            try:
                model(*args, **kwargs)
            except EnoughSeen:
                pass
            except SetpointError:
                raise
            except Exception as error:  # anything may go wrong in a foreign forward
                raise ExampleError(
                    f"the model fails on batch {number} of the data ({type(error).__name__}: {error}): give batches as "
                    "in training"
                ) from error
            each()


_LABELS = frozenset({"label", "labels", "label_ids", "target", "targets"})


def first_batches(data: Iterable[Any], count: int, model: nn.Module) -> tuple[Example, ...]:
    """The first batches of the data that have as many samples together, on the model's device.

    Labels are taken out, unless the model runs only with them. Batches of one sample are passed over, where the model
    has a BatchNorm and another batch has more: the variance of one is not known.

    Args:
        data: batches: tensors; tuples or lists whose first part is the input, or a tuple of inputs, or of which all
            parts but the last are inputs; or dicts of inputs by name.
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
    for number, batch in enumerate(data):
        batch = mapped(lambda tensor: tensor.detach().to(device), batch)
        form = form or _form_of(model, batch)
        found.append(form(batch))
        for tensor in tensors_of(found[-1]):
            if tensor.is_floating_point() and bool((tensor.isnan() | tensor.isposinf()).any()):
                raise ExampleError(f"batch {number} of the data holds NaN or infinity: leave such samples out")
        rows = num_samples(found[-1])
        seen += 0 if normalised and rows == 1 else rows
        if seen >= count or len(found) > count:
            break
    if not found:
        raise ExampleError("data has no batch: give at least one, as the model is given them in training")
    several = [batch for batch in found if num_samples(batch) > 1] if normalised else []
    return tuple(several or found)


def _form_of(model: nn.Module, batch: Any) -> Callable[[Any], Example]:
    """What makes inputs of a batch: the first that the model runs on."""
    errors: list[Exception] = []
    several = isinstance(batch, (tuple, list)) and len(batch) > 2
    # The form is found once, on the first batch: trying it on each would cost a forward of each.
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


def _check_batches(data: object) -> None:
    if isinstance(data, Tensor) or (isinstance(data, Dataset) and not isinstance(data, IterableDataset)):
        raise ExampleError(
            f"data is {a_type(data)}, whose parts are single samples: give batches, such as a DataLoader, or [x] for "
            "one batch x"
        )
    if isinstance(data, tuple) and len(data) > 1 and all(isinstance(part, Tensor) for part in data):
        raise ExampleError(
            "data is a tuple of tensors, which may be one batch or several: write [(x, y)] for one batch of inputs and "
            "labels, or [x1, x2] for two batches"
        )
    if not are_batches(data):
        raise ExampleError(f"data is {a_type(data)}: give batches, a DataLoader or another iterable of them")


def are_batches(data: object) -> bool:
    """Whether data can be gone through batch by batch; a module cannot, even where its parts can."""
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
