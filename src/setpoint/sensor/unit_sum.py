"""A unit sum: the entries of a tensor added up by the unit they belong to."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from setpoint.distributed import is_sharded_tensor, rows
from setpoint.groups.group import Slice


@dataclass(frozen=True, eq=False)
class UnitSum:
    """Adds up the entries of one slice by unit, as cheaply as the index table allows.

    `sum(values)[u] = sum of values[..., i, ...] over all i with index[i] = u and all other dims`. A table that repeats
    each unit equally often, in order, needs only a view (a convolution's channels; the channels of a flattened map);
    any other needs one `index_add`.
    """

    dim: int | None  # the dim along which units lie, or None when every element is a unit
    num_units: int  # number of units of the group
    start: int  # first entry along the dim that belongs to a unit
    length: int  # number of entries from there to the last one that does
    repeat: int | None  # number of neighbouring entries of each unit, if the table is such a repeat; else None
    table: Tensor | None  # unit of each of the `length` entries (`num_units` where there is none); None for a repeat

    @classmethod
    def of(cls, place: Slice, num_units: int, device: torch.device) -> UnitSum:
        """The unit sum of a slice, with its table on the device of the tensor."""
        used = np.flatnonzero(place.index >= 0)
        start, stop = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 0)
        index = np.asarray(place.index[start:stop], dtype=np.int64)
        repeat, rest = divmod(stop - start, num_units) if num_units else (0, 0)
        if rest == 0 and repeat and np.array_equal(index, np.repeat(np.arange(num_units), repeat)):
            return cls(place.dim, num_units, start, stop - start, repeat, None)
        table = torch.from_numpy(np.where(index < 0, num_units, index)).to(device)
        return cls(place.dim, num_units, start, stop - start, None, table)

    def select(self, tensor: Tensor) -> Tensor:
        """The part of the tensor in which the units lie, as a view."""
        flat, dim = (tensor.reshape(-1), 0) if self.dim is None else (tensor, self.dim)
        return flat if self.length == flat.shape[dim] else flat.narrow(dim, self.start, self.length)

    def add_up(self, values: Float[Tensor, "..."]) -> Float[Tensor, " units"]:
        """Sum by unit of values that have the shape `select` returns."""
        entries = _entry_sums(values, self.dim or 0)
        if self.repeat is not None:
            return entries if self.repeat == 1 else entries.view(self.num_units, self.repeat).sum(1)
        assert self.table is not None, "units that do not lie in a row have a table"
        # One bin more than units: entries without a unit fall into the last, which is cut off.
        return entries.new_zeros(self.num_units + 1).index_add_(0, self.table, entries)[:-1]


def part_of(place: Slice, tensor: Tensor) -> Slice:
    """The slice in this rank's shard of a sharded tensor; the slice itself for any other tensor."""
    return replace(place, index=place.index[rows(tensor)]) if is_sharded_tensor(tensor) and place.dim == 0 else place


def num_entries(place: Slice, tensor: Tensor) -> int:
    """Number of entries that `UnitSum.select` takes of the tensor, on all ranks together."""
    used = np.flatnonzero(place.index >= 0)
    length = int(used[-1] - used[0]) + 1 if len(used) else 0
    return length * (tensor.numel() // len(place.index)) if len(place.index) else 0


def _entry_sums(values: Tensor, dim: int) -> Tensor:
    """Sum over all dims but one, as two sums where that is faster on a CPU: before the dim, then behind it."""
    if values.dim() == 1:
        return values
    if 0 < dim < values.dim() - 1 and values.is_contiguous():
        before, own, behind = math.prod(values.shape[:dim]), values.shape[dim], math.prod(values.shape[dim + 1 :])
        return values.view(before, own * behind).sum(0).view(own, behind).sum(1)
    return values.sum([other for other in range(values.dim()) if other != dim])
