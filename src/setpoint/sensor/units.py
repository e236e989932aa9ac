"""Units: the weights that a group's units own, and sums over their entries by unit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from setpoint.distributed import Ranks, is_sharded_tensor, local, ranks_of, region, shared_by
from setpoint.groups.group import Group, Slice
from setpoint.sensor.tap import GradientScale, Tap


@dataclass(frozen=True, eq=False)
class UnitSum:
    """Adds up the entries of one slice by unit, as cheaply as the index table allows.

    `sum(values)[u] = sum of values[..., i, ...] over all i with index[i] = u and all other dims`. A table that repeats
    each unit equally often, in order, needs only a view (a convolution's channels; the channels of a flattened map);
    any other needs one `index_add`.
    """

    dim: int  # along which units lie
    num_units: int  # of the group
    start: int  # first entry along the dim that belongs to a unit
    length: int  # number of entries from there to the last one that does
    repeat: int | None  # number of neighbouring entries of each unit, if the table is such a repeat; else None
    table: Tensor | None  # unit of each of the `length` entries (`num_units` where there is none); None for a repeat

    @classmethod
    def of(cls, place: Slice, num_units: int, device: torch.device) -> UnitSum:
        assert place.dim is not None, "only single weights lie along no dim"
        start, stop = _extent(place)
        index = np.asarray(place.index[start:stop], dtype=np.int64)
        repeat, remainder = divmod(stop - start, num_units) if num_units else (0, 0)
        if repeat and not remainder and np.array_equal(index, np.repeat(np.arange(num_units), repeat)):
            return cls(place.dim, num_units, start, stop - start, repeat, None)
        table = torch.from_numpy(np.where(index < 0, num_units, index)).to(device)
        return cls(place.dim, num_units, start, stop - start, None, table)

    def select(self, tensor: Tensor) -> Tensor:
        """The part of the tensor in which the units lie, as a view."""
        return tensor if self.length == tensor.shape[self.dim] else tensor.narrow(self.dim, self.start, self.length)

    def add_up(self, values: Float[Tensor, "..."]) -> Float[Tensor, " units"]:
        """Sum by unit of values that have the shape `select` returns."""
        entries = _entry_sums(values, self.dim)
        if self.repeat is not None:
            return entries if self.repeat == 1 else entries.view(self.num_units, self.repeat).sum(1)
        assert self.table is not None, "units that do not lie in a row have a table"
        # One bin more than units: entries without a unit fall into the last, which is cut off.
        return entries.new_zeros(self.num_units + 1).index_add_(0, self.table, entries)[:-1]


def _extent(place: Slice) -> tuple[int, int]:
    """The first entry of a slice that belongs to a unit, and the one behind the last."""
    used = np.flatnonzero(place.index >= 0)
    return (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 0)


def _entry_sums(values: Tensor, dim: int) -> Tensor:
    """Sum over all dims but one, as two sums where that is faster on a CPU: before the dim, then behind it."""
    if values.dim() == 1:
        return values
    if 0 < dim < values.dim() - 1 and values.is_contiguous():
        before, own, behind = math.prod(values.shape[:dim]), values.shape[dim], math.prod(values.shape[dim + 1 :])
        return values.view(before, own * behind).sum(0).view(own, behind).sum(1)
    return values.sum([other for other in range(values.dim()) if other != dim])


@dataclass(frozen=True, eq=False)
class Source:
    """One weight that a criterion reads of a group."""

    weight: nn.Parameter
    sums: UnitSum  # adds up this rank's entries of the weight by unit
    num_read: int  # number of entries that are read, on all ranks together
    tap: Tap | None = None  # reads the layer's input in place of a frozen weight
    channels: UnitSum | None = None  # adds up what the tap reads by unit

    def readable(self) -> bool:
        """Whether this step can be read; a trained weight that the loss does not use counts as 0."""
        return self.weight.requires_grad or (self.tap is not None and self.tap.seen)

    def has_gradient(self) -> bool:
        """Whether this step has shown something of it."""
        trained = self.weight.requires_grad and self.weight.grad is not None
        return trained or (self.tap is not None and self.tap.seen)

    def add_up(self, values: Callable[..., Tensor], tensors: Sequence[Tensor], like: Tensor) -> Tensor:
        """Values of the units' entries of these tensors, which have the weight's shape, by unit."""
        parts = [self.sums.select(local(tensor.detach())) for tensor in tensors]
        if not self.weight.is_complex():
            return self.sums.add_up(values(*(part.to(like.dtype) for part in parts))).to(like)
        # Of a complex entry, real and imaginary part are two weights.
        real = values(*(torch.view_as_real(part).to(like.dtype) for part in parts))
        return self.sums.add_up(real.sum(-1)).to(like)


@dataclass(frozen=True, eq=False)
class Units:
    """All units of some groups, one group after the other, with the weights that a criterion reads of them.

    Where weights are sharded over ranks, each rank adds up its own part, and one sum over ranks makes it whole.
    """

    num_units: tuple[int, ...]  # by group
    by_group: tuple[tuple[Source, ...], ...]
    others: tuple[nn.Parameter, ...]  # trained too: their gradients must be finite for a step to count
    ranks: Ranks  # that hold the parameters in shards
    like: Tensor  # a zero of the device and dtype of what is added up
    scale: GradientScale | None = None  # of gradients against taps, where there are any
    averaging: Ranks = field(default_factory=Ranks)  # over which gradients are averaged
    grad_scale: Tensor | None = None  # what the gradients of this step are still multiplied by; NaN to leave it out

    def add_up(self, values: Callable[[Tensor, Tensor], Tensor]) -> Float[Tensor, " all_units"]:
        """Sum by unit of `values(weight, gradient)` over all entries that the unit owns; no host sync.

        A weight without a gradient adds nothing. NaN where any gradient of the model is NaN or infinite.
        """

        def of_source(source: Source) -> Tensor | None:
            gradient = source.weight.grad
            if gradient is None or (source.tap is not None and not source.weight.requires_grad):
                return None
            gradient = gradient if self.grad_scale is None else gradient / self.grad_scale
            return self._once(source.add_up(values, (source.weight, gradient), self.like), gradient)

        zero = _zero_if_finite(self.others, self.like)
        zero = zero if self.grad_scale is None else zero + 0.0 * self.grad_scale.to(zero)
        return self.ranks.total(self._summed(of_source) + zero)

    @torch.no_grad()
    def squares(self) -> Float[Tensor, " all_units"]:
        """Sum by unit of the squared weights that it owns."""

        def of_source(source: Source) -> Tensor:
            return self._once(source.add_up(torch.square, (source.weight,), self.like), source.weight)

        return self.ranks.total(self._summed(of_source))

    def _once(self, sums: Tensor, tensor: Tensor) -> Tensor:
        """What this rank is to add to a sum over ranks, of which several may have the same part."""
        sharers = shared_by(tensor, self.ranks) if self.ranks.count > 1 else 1
        return sums / sharers if sharers > 1 else sums

    def tapped(self) -> Float[Tensor, " all_units"]:
        """Sum by unit of `w * dL/dw` over the frozen weights, as their taps have read it in the backward pass."""

        def of_source(source: Source) -> Tensor | None:
            if source.weight.requires_grad or source.tap is None or source.channels is None:
                return None
            read = source.tap.take()
            return None if read is None else source.channels.add_up(source.channels.select(read)).to(self.like)

        read = self._summed(of_source)
        read = read if self.scale is None else self.scale.applied(read, self.averaging)
        return read if self.grad_scale is None else read / self.grad_scale

    def _summed(self, read: Callable[[Source], Tensor | None]) -> Float[Tensor, " all_units"]:
        parts = [self.like.new_zeros(0)]  # there may be no group
        for num_units, sources in zip(self.num_units, self.by_group, strict=True):
            found = [part for source in sources if (part := read(source)) is not None]
            parts.append(sum(found[1:], found[0]) if found else self.like.new_zeros(num_units))
        return torch.cat(parts)


def find_units(
    groups: tuple[Group, ...],
    model: nn.Module,
    places: Callable[[Group], tuple[Slice, ...]],
    tapped: frozenset[str] = frozenset(),
    scale: GradientScale | None = None,
    averaging: Ranks | None = None,
) -> Units:
    """The weights of each group at its places; taps read those that are named in `tapped`, which are frozen."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    trained = tuple(parameter for parameter in model.parameters() if parameter.requires_grad)

    def source_at(place: Slice, num_units: int) -> Source:
        weight = parameters[place.tensor]
        device = local(weight.detach()).device
        # A rank adds up what it holds of a weight that is sharded along its units.
        held = place
        if is_sharded_tensor(weight) and place.dim is not None:
            held = replace(place, index=place.index[region(weight)[place.dim]])
        first, last = _extent(place)
        num_read = (last - first) * (weight.numel() // max(len(place.index), 1))
        sums = UnitSum.of(held, num_units, device)
        if place.tensor not in tapped:
            return Source(weight, sums, num_read)
        channels = UnitSum.of(replace(place, dim=0), num_units, device)
        return Source(weight, sums, num_read, Tap(place, model, trained), channels)

    by_group = tuple(tuple(source_at(place, group.num_units) for place in places(group)) for group in groups)
    sources = [source for of_group in by_group for source in of_group]
    covered = {id(source.weight) for source in sources if source.num_read == source.weight.numel()}
    others = tuple(parameter for parameter in trained if id(parameter) not in covered)
    first = sources[0].weight if sources else torch.zeros(())
    like = torch.zeros((), dtype=torch.promote_types(first.real.dtype, torch.float32), device=first.device)
    num_units = tuple(group.num_units for group in groups)
    return Units(num_units, by_group, others, ranks_of(parameters.values()), like, scale, averaging or Ranks())


def _zero_if_finite(parameters: tuple[nn.Parameter, ...], like: Tensor) -> Tensor:
    """0 if every gradient is finite, else NaN; no host sync."""
    total = like.new_zeros(())
    for parameter in parameters:
        gradient = None if parameter.grad is None else local(parameter.grad)
        if gradient is not None and gradient.layout == torch.strided:
            real = torch.view_as_real(gradient) if gradient.is_complex() else gradient
            # A sum is the cheapest operation that a NaN or an infinity survives; times 0 either is NaN.
            total = total + real.sum(dtype=like.dtype).to(like.device)
    return 0.0 * total
