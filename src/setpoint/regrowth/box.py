"""A box: which entries of a tensor are present, by the units along its dims."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

Box = Mapping[int, Bool[np.ndarray, " _entries"]]
"""By dim of the dense tensor, which entries are in the box; all of them along a dim that is absent here."""


def count_entries(shape: Sequence[int], box: Box) -> int:
    """Number of entries of a tensor in a box."""
    return math.prod(int(box[dim].sum()) if dim in box else length for dim, length in enumerate(shape))


def resting_entries(shape: Sequence[int], known: Box, live: Box) -> Bool[Tensor, " *shape"]:
    """True at each entry whose units are all known, but not all of them active."""
    return _inside(shape, known) & ~_inside(shape, live)


def _inside(shape: Sequence[int], box: Box) -> Bool[Tensor, " *shape"]:
    inside = torch.ones(tuple(shape), dtype=torch.bool)
    for dim, kept in box.items():
        inside &= torch.from_numpy(kept).view([-1 if each == dim else 1 for each in range(len(shape))])
    return inside


def write(tensor: Shaped[Tensor, " *shape"], box: Box, values: Shaped[Tensor, " *small"]) -> None:
    """Fill the entries of a box, in place, with a tensor of the box's shape.

    >>> tensor = torch.zeros(2, 3)
    >>> write(tensor, {1: np.array([True, False, True])}, torch.ones(2, 2))
    >>> tensor.tolist()
    [[1.0, 0.0, 1.0], [1.0, 0.0, 1.0]]
    """
    with torch.no_grad():
        tensor[corner(tensor, box)] = values


def corner(tensor: Tensor, box: Box) -> tuple[Tensor, ...]:
    """The index of a box's entries in a tensor."""
    positions = [np.flatnonzero(box[dim]) if dim in box else np.arange(n) for dim, n in enumerate(tensor.shape)]
    return tuple(torch.from_numpy(each).to(tensor.device) for each in np.ix_(*positions))
