"""Easing: outgoing weights of units that came back rise from zero over a few steps, so that the loss does not jump."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor, nn

from setpoint.actuator.shrink import named_tensors, unwrapped
from setpoint.groups.group import Group


class Easing:
    """Sets the outgoing weights of units that have just come back to zero, and gives them back in equal shares.

    With weights w and n steps, each `step` adds w / n. In between the optimizer moves these weights like all
    others; the sum of the shares is w, so nothing of what it learns meanwhile is lost. Incoming weights, norms
    and moments come back at once: with outgoing weights at zero they have no effect yet.

    Args:
        model: the model, after `regrow`.
        groups: the groups, after `regrow`.
        regrown: by group, one boolean per active unit, True = has just come back.
        num_steps: in how many shares the weights come.
        copies: modules that were regrown alike, in which they rise alike.

    >>> from setpoint.groups.group import Slice
    >>> model = nn.Linear(2, 1, bias=False)
    >>> weight, unit = model.weight.detach().clone(), np.arange(2)
    >>> groups = (Group("inputs", "unit", 2, (Slice("weight", 1, "consume", unit),)),)
    >>> easing = Easing(model, groups, {"inputs": np.array([False, True])}, num_steps=2)
    >>> model.weight[0, 1].item()
    0.0
    >>> easing.step(), easing.step(), bool(torch.isclose(model.weight, weight).all())
    (False, True, True)
    """

    def __init__(
        self,
        model: nn.Module,
        groups: tuple[Group, ...],
        regrown: Mapping[str, Bool[np.ndarray, " _units"]],
        num_steps: int,
        copies: Sequence[nn.Module] = (),
    ) -> None:
        assert num_steps >= 1
        self._left = num_steps
        self._shares: list[tuple[Tensor, int, Tensor, Tensor]] = []
        places = [
            (part.tensor, part.dim, np.flatnonzero(np.isin(part.index, np.flatnonzero(regrown[group.name]))))
            for group in groups
            if group.name in regrown
            for part in group.slices
            if part.role == "consume" and part.dim is not None
        ]
        for module in (model, *unwrapped([name for name, *_ in places], model, copies)):
            tensors = named_tensors(module)
            for name, dim, entries in places:
                self._hold(tensors[name], dim, torch.from_numpy(entries).to(tensors[name].device))

    def _hold(self, tensor: Tensor, dim: int, entries: Tensor) -> None:
        with torch.no_grad():
            share = tensor.index_select(dim, entries) / self._left
            tensor.index_fill_(dim, entries, 0)
        self._shares.append((tensor, dim, entries, share))

    def step(self) -> bool:
        """Add one share; True when it was the last. Call it after the optimizer's step."""
        return self._add(1)

    def finish(self) -> None:
        """Add all that is left, before the tensors change their shape."""
        if self._left:
            self._add(self._left)

    def _add(self, count: int) -> bool:
        with torch.no_grad():
            for tensor, dim, entries, share in self._shares:
                tensor.index_add_(dim, entries, share, alpha=count)
        self._left -= count
        return self._left == 0
