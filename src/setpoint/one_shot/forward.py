"""Forwards without training: dropout is off, and norms use running statistics, those of the batch, or renew them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal

import torch
from torch import nn

from setpoint.groups.example import Example, inputs_of

Norms = Literal["running", "batch", "renewed"]
"""What a BatchNorm divides by: its running statistics, those of the batch, or these, which also become its new ones."""


class EnoughSeen(Exception):  # noqa: N818 - no error: it ends a forward of which the rest is of no use
    """Raised in a hook once all that is wanted of a forward was seen."""


@contextmanager
def without_training(model: nn.Module, norms: Norms) -> Iterator[None]:
    """Inside, the model is in eval mode, its norms as said; its modes are restored at the end."""
    modes = [(module, module.training) for module in model.modules()]
    batch_norms = [each for each in model.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)]
    before = [(each.momentum, each.num_batches_tracked) for each in batch_norms]
    try:
        model.eval()
        for each in batch_norms if norms != "running" else ():
            # Without momentum a norm keeps the plain mean over all batches; with one of 0, what it has.
            each.train()
            each.momentum = 0.0 if norms == "batch" else None
            if norms == "renewed":
                each.reset_running_stats()
            elif each.num_batches_tracked is not None:
                each.num_batches_tracked = each.num_batches_tracked.clone()  # counted in train mode all the same
        yield
    finally:
        for each, (momentum, counted) in zip(batch_norms, before, strict=True):
            each.momentum, each.num_batches_tracked = momentum, counted
        for module, training in modes:
            module.training = training


@torch.no_grad()
def run(model: nn.Module, batches: Sequence[Example], norms: Norms, each: Callable[[], Any] = lambda: None) -> None:
    """Run the model on all batches.

    Args:
        norms: what its norms use.
        each: called after each batch.
    """
    with without_training(model, norms):
        for batch in batches:
            args, kwargs = inputs_of(batch)
            with suppress(EnoughSeen):
                model(*args, **kwargs)
            each()
