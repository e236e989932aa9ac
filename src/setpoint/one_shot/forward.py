"""Forwards without training: dropout is off, and norms use running statistics, those of the batch, or renew them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor, nn

from setpoint.errors import ExampleError, SetpointError
from setpoint.groups.example import Example, inputs_of
from setpoint.groups.rng import in_eval_mode

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
    return [each for each in model.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)]


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

    norms = [each for each in batch_norms_of(model) if each.running_var is not None and _settled(each)]
    handles = [each.register_forward_pre_hook(look, with_kwargs=True) for each in norms]
    try:
        if norms:
            run(model, batches, "running")
    finally:
        for handle in handles:
            handle.remove()
    distances = []
    for each, (count, total, squares) in sums.items():
        norm: Any = each
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
    before = [(each.momentum, each.num_batches_tracked) for each in batch_norms]
    handles: list[Any] = []
    try:
        with in_eval_mode(model):
            for each in batch_norms if norms != "running" else ():
                each.train()
                each.momentum = 0.0  # it keeps what it has
                if norms == "renewed":
                    handles.append(each.register_forward_pre_hook(_weighing(), with_kwargs=True))
                elif each.num_batches_tracked is not None:
                    each.num_batches_tracked = each.num_batches_tracked.clone()  # counted in train mode all the same
            yield
    finally:
        for handle in handles:
            handle.remove()
        for each, (momentum, counted) in zip(batch_norms, before, strict=True):
            each.momentum, each.num_batches_tracked = momentum, counted


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


@contextmanager
def _no_kept_copies() -> Iterator[None]:
    try:
        yield
    finally:
        torch.clear_autocast_cache()


@torch.no_grad()
def run(model: nn.Module, batches: Sequence[Example], norms: Norms, each: Callable[[], Any] = lambda: None) -> None:
    """Run the model on all batches.

    Args:
        norms: what its norms use.
        each: called after each batch.

    Raises:
        ExampleError: for a batch that the model does not take.
    """
    # An autocast region would keep low-precision copies of weights, and these are fitted anew between runs.
    torch.clear_autocast_cache()
    with without_training(model, norms), _no_kept_copies():
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
