"""Forwards without training: dropout is off, and norms use running statistics, those of the batch, or renew them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from setpoint.errors import ExampleError, SetpointError
from setpoint.eval_mode import in_eval_mode
from setpoint.groups.example import Example, inputs_of

Norms = Literal["running", "batch", "renewed"]
"""What a BatchNorm divides by: its running statistics, those of the batch, or these, which also become its new ones."""


class EnoughSeen(Exception):  # noqa: N818 - no error: it ends a forward of which the rest is of no use
    """Raised in a hook once all that is wanted of a forward was seen."""


@contextmanager
def without_training(model: nn.Module, norms: Norms) -> Iterator[None]:
    """Inside, the model is in eval mode, its norms as said; its modes are restored at the end."""
    batch_norms = [each for each in model.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)]
    before = [(each.momentum, each.num_batches_tracked) for each in batch_norms]
    handles: list[Any] = []
    try:
        with in_eval_mode(model):
            for each in batch_norms if norms != "running" else ():
                each.train()
                each.momentum = 0.0  # it keeps what it has
                if norms == "renewed":
                    each.reset_running_stats()
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
