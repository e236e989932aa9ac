"""Forwards without training, on the first batches of a data loader: what may be input in them, and what norms do."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from setpoint.errors import ExampleError, SetpointError
from setpoint.groups.example import Example, holds_nan, inputs_of, mapped, num_samples, tensors_of
from setpoint.groups.untouched import in_mode
from setpoint.messages import a_type, progress
from setpoint.sensor.moments import Gathering, Moment, Reader

Norms = Literal["running", "batch", "renewed"]
"""What a BatchNorm divides by: its running statistics, those of the batch, or these, which also become its new ones."""

_FIRST_VALUES = 0.05  # share of the first values in running statistics, from which on these count as settled
_FEWEST_VALUES = 64  # of a channel, below which data say nothing of its statistics
_FAR = 0.25  # squared distance of means and deviations, in deviations, beyond which statistics are not of these data
_LABELS = frozenset({"label", "labels", "label_ids", "target", "targets"})


def batch_norms_of(model: nn.Module) -> list[Any]:
    """All BatchNorms of a model, of any number of dims."""
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def _settled(norm: Any) -> bool:
    """Whether a norm's running statistics are more than its first values, or its weights were trained with these."""
    if not norm.running_mean.any() and bool((norm.running_var == 1).all()):
        return norm.affine and (bool((norm.weight != 1).any()) or bool(norm.bias.any()))
    updates = 0 if norm.num_batches_tracked is None else int(norm.num_batches_tracked)
    # Weights of old checkpoints come without a number of updates.
    return not updates or norm.momentum is None or (1 - norm.momentum) ** updates < _FIRST_VALUES


def norms_were_constant(model: nn.Module, batches: Sequence[Example]) -> bool:
    """Whether most BatchNorms have running statistics far from those of the data: they were constants in the training.

    Detectors, and nets that are fine-tuned on small batches, are trained so: with their norms in eval mode.
    """
    sums: dict[Any, list[Tensor]] = {}

    def look(norm: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = (args[0] if args else kwargs["input"]).double().transpose(0, 1).flatten(1)
        new = [values.new_tensor(values.shape[1]), values.sum(1), values.square().sum(1)]
        sums[norm] = [a + b for a, b in zip(sums[norm], new, strict=True)] if norm in sums else new

    norms = [norm for norm in batch_norms_of(model) if norm.running_var is not None and _settled(norm)]
    if norms:
        handles = [norm.register_forward_pre_hook(look, with_kwargs=True) for norm in norms]
        run(model, batches, "running", handles)
    distances = []
    for norm, (count, total, squares) in sums.items():
        if count < _FEWEST_VALUES:
            continue
        mean = total / count
        deviation = ((squares / count - mean.square()).clamp(min=0) + norm.eps).sqrt()
        kept = (norm.running_var.double() + norm.eps).sqrt()
        off = ((mean - norm.running_mean.double()) / kept).square() + (deviation / kept - 1).square()
        distances.append(float(off.median()))  # over the channels: a single one may be constant on the data
    return bool(distances) and median(distances) > _FAR


@contextmanager
def without_training(model: nn.Module, norms: Norms) -> Iterator[None]:
    """Inside, the model is in eval mode, its norms as said; its modes are restored at the end."""
    batch_norms = batch_norms_of(model)
    before = [(norm.momentum, norm.num_batches_tracked) for norm in batch_norms]
    handles: list[Any] = []
    try:
        with in_mode(model, training=False):
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
def run(model: nn.Module, batches: Sequence[Example], norms: Norms, handles: Iterable[Any] = ()) -> None:
    """Run the model on all batches, and remove the handles of hooks; ExampleError for a batch that it does not take."""
    with without_training(model, norms), ExitStack() as afterwards:
        for handle in handles:
            afterwards.callback(handle.remove)
        # An autocast region would keep low-precision copies of weights, and these are fitted anew between runs.
        torch.clear_autocast_cache()
        afterwards.callback(torch.clear_autocast_cache)
        for number, batch in enumerate(batches):
            args, kwargs = inputs_of(batch)
            try:
                model(*args, **kwargs)
            except SetpointError:
                raise
            except Exception as error:  # anything may go wrong in a foreign forward
                raise ExampleError(
                    f"the model fails on batch {number} of the data ({type(error).__name__}: {error}): give batches as "
                    "in training"
                ) from error


@progress("gathering moments")
def moments_on(
    model: nn.Module, readers: Sequence[Reader], batches: Sequence[Example], norms: Norms
) -> dict[str, Moment]:
    """Second moments of what readers are given on all batches; ExampleError for NaN or infinity in it."""
    gathering = Gathering(model, readers, len(batches), always=True)
    run(model, batches, norms, [gathering])
    moments = {name: Moment(blocks, gathering.norms.get(name, "")) for name, blocks in gathering.taken({}).items()}
    for name, moment in moments.items():
        if not moment.num_rows:
            raise ExampleError(f"{name} is given NaN or infinity on the data: look for it in the data and the weights")
    return moments


@progress("reading data")
def first_batches(data: Iterable[Any], count: int, model: nn.Module) -> tuple[Example, ...]:
    """The first batches that have as many samples together, on the model's device; the last one is taken whole.

    Labels are taken out, unless the model runs only with them. Batches of one sample are passed over, where the model
    has a BatchNorm and another batch has more: the variance of one is not known. ExampleError for what is no batches,
    a batch of another form, one that the model does not take or that holds NaN, or where there is none.
    """
    _check_batches(data)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    normalised = bool(batch_norms_of(model))
    found: list[Example] = []
    form, seen = -1, 0
    for number, batch in enumerate(data):
        if any(tensor.is_meta for tensor in tensors_of(batch)):
            raise ExampleError(f"batch {number} of the data is on the meta device and holds no values: give real data")
        forms = _inputs_in(mapped(lambda tensor: tensor.detach().to(device), batch))
        if not number:  # once: to try it on each batch would cost a forward of each
            form = _form_of(model, forms)
        if form >= len(forms):
            raise ExampleError(f"batch {number} of the data is of another form than the first: give one form alone")
        found.append(forms[form])
        if holds_nan(found[-1]):
            raise ExampleError(f"batch {number} of the data holds NaN or infinity: leave such samples out")
        rows = num_samples(found[-1])
        seen += 0 if normalised and rows == 1 else rows
        if seen >= count or len(found) > count:
            break
    if not found:
        raise ExampleError("data has no batch: give at least one, as the model is given them in training")
    several = [batch for batch in found if num_samples(batch) > 1] if normalised else []
    return tuple(several or found)


def _inputs_in(batch: Any) -> list[Example]:
    """What may be the model's input in a batch, in the order in which it is tried."""
    parts = tuple(batch) if isinstance(batch, (tuple, list)) else ()
    named = parts[0] if parts else batch
    forms: list[Example] = []
    if len(parts) > 2:  # first of all: a forward of one input and options would run with the first input alone
        forms.append(parts[:-1])
    if isinstance(named, Mapping):
        forms += [{name: value for name, value in named.items() if name not in _LABELS}, dict(named)]
    elif isinstance(batch, Tensor):
        forms.append((batch,))
    elif parts:
        forms += [parts[:1], parts]
        if isinstance(named, (tuple, list)):
            forms.append(tuple(named))
    else:
        raise ExampleError(
            f"a batch is a tensor, a tuple (inputs, labels) or a dict of inputs, got {type(batch).__name__}: give data "
            "such batches"
        )
    return forms


def _form_of(model: nn.Module, forms: Sequence[Example]) -> int:
    """The number of the first form that the model runs on."""
    errors: list[Exception] = []
    for number, form in enumerate(forms):
        args, kwargs = inputs_of(form)
        try:
            with torch.no_grad(), without_training(model, "running"):
                model(*args, **kwargs)
            return number
        except Exception as error:  # anything may go wrong in a foreign forward
            errors.append(error)
    raise ExampleError(
        f"the model takes the first batch neither without its labels nor with them ({type(errors[0]).__name__}: "
        f"{errors[0]}): give batches as in training, in the model's dtype, or dicts of inputs by name"
    ) from errors[0]


def _check_batches(data: object) -> None:
    if isinstance(data, Tensor) or (isinstance(data, Dataset) and not isinstance(data, IterableDataset)):
        raise ExampleError(
            f"data is {a_type(data)}, whose parts are single samples: give batches, such as a DataLoader, or [x] for "
            "one batch x"
        )
    if isinstance(data, tuple) and len(data) > 1 and all(isinstance(part, Tensor) for part in data):
        raise ExampleError(
            "data is a tuple of tensors, one batch or several: write [(x, y)] for one batch of inputs and labels, or "
            "[x1, x2] for two batches"
        )
    # A module cannot be gone through batch by batch, even where its parts can.
    if not hasattr(data, "__iter__") and not hasattr(data, "__getitem__") or isinstance(data, (nn.Module, str, type)):
        raise ExampleError(f"data is {a_type(data)}: give batches, a DataLoader or another iterable of them")
