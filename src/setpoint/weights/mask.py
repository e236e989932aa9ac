"""A weight mask: single weights that are not active, set to zero in place with gradients, moments as at the start."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from setpoint.actuator.optimizer_state import Optimizers, as_sequence, moments_of


@torch.no_grad()
def mask_weights(
    weights: Mapping[str, nn.Parameter], optimizer: Optimizers, masks: Mapping[str, Bool[Tensor, "..."]]
) -> None:
    """Zero every weight that is not active; the optimizer remembers nothing of it, as of one that it has never moved.

    An optimizer that treats every entry alike then keeps it at zero, as long as its gradient is zero too:
    call `mask_gradients` ahead of each step. What it remembers is zero too, but for what begins at another value: the
    step sizes of Rprop, and the sums of Adagrad where an `initial_accumulator_value` is given.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> mask_weights({"weight": layer.weight}, None, {"weight": torch.tensor([[True, False]])})
    >>> (layer.weight == 0).tolist()
    [[False, True]]
    """
    for name, mask in masks.items():
        _begin_at(~mask, weights[name], optimizer)
    mask_gradients(weights, masks)


_BEGINNINGS = ((torch.optim.Rprop, "step_size", "lr"), (torch.optim.Adagrad, "sum", "initial_accumulator_value"))
"""Optimizers with a state that does not begin at zero, its name, and the setting that it begins with."""


def _begin_at(gone: Tensor, weight: nn.Parameter, optimizer: Optimizers) -> None:
    weight.masked_fill_(gone, 0.0)
    for each in as_sequence(optimizer):
        for _, moment in moments_of(each, weight):
            moment.masked_fill_(gone, 0.0)
        for kind, part, setting in _BEGINNINGS:
            if isinstance(each, kind) and part in each.state.get(weight, {}):
                group = next(group for group in each.param_groups if any(weight is one for one in group["params"]))
                each.state[weight][part].masked_fill_(gone, float(group.get(setting, 0.0)))


@torch.no_grad()
def mask_gradients(weights: Mapping[str, nn.Parameter], masks: Mapping[str, Bool[Tensor, "..."]]) -> None:
    """Zero the gradients of weights that are not active."""
    for name, mask in masks.items():
        gradient = weights[name].grad
        if gradient is not None:
            gradient.masked_fill_(~mask, 0.0)
