"""Silenced units: their outgoing weights at zero, as long as a block lasts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from setpoint.groups.group import Group


def outgoing(
    model: nn.Module, groups: Sequence[Group], units: Mapping[str, Int[np.ndarray, " _units"]]
) -> list[tuple[nn.Parameter, int, Tensor]]:
    """Where the outgoing weights of units lie: each parameter, the dim, and the entries along it.

    Args:
        model: that the groups are of.
        groups: that the units are of.
        units: by group name, their numbers.
    """
    tensors = dict(model.named_parameters(remove_duplicate=False))
    found = []
    for group in groups:
        gone = np.asarray(units.get(group.name, ()), dtype=np.int64)
        for part in group.slices if len(gone) else ():
            if part.role == "consume" and part.tensor in tensors:
                assert part.dim is not None, "units lie along a dim"
                entries = torch.from_numpy(np.flatnonzero(np.isin(part.index, gone)))
                found.append((tensors[part.tensor], part.dim, entries.to(tensors[part.tensor].device)))
    return found


@contextmanager
def without(
    model: nn.Module, groups: Sequence[Group], units: Mapping[str, Int[np.ndarray, " _units"]]
) -> Iterator[None]:
    """The model with these units' outgoing weights at zero; after it they are back, to the bit.

    Args:
        model: that the groups are of.
        groups: that the units are of.
        units: by group name, their numbers.
    """
    places = outgoing(model, groups, units)
    before = {id(weight): (weight, weight.detach().clone()) for weight, _, _ in places}
    with torch.no_grad():
        for weight, dim, entries in places:
            weight.index_fill_(dim, entries, 0.0)
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, value in before.values():
                weight.copy_(value)
