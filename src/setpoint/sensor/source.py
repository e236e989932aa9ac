"""A source: an outgoing weight whose gradient, or whose layer's input, gives the gate gradients of its units."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from setpoint.distributed import Ranks, local, ranks_of
from setpoint.groups.group import Group, Slice
from setpoint.sensor.sentinel import Sentinels
from setpoint.sensor.tap import Tap
from setpoint.sensor.unit_sum import UnitSum, num_entries, part_of


@dataclass(frozen=True, eq=False)
class Source:
    """One outgoing weight of a group."""

    weight: nn.Parameter
    sums: UnitSum  # adds up this rank's entries of the weight by unit
    num_read: int  # number of entries that are read, on all ranks together
    tap: Tap | None = None  # reads the layer's input in place of a frozen weight; None where nothing does
    channels: UnitSum | None = None  # adds up what the tap reads by unit

    def seen(self) -> bool:
        """Whether there is something to read in this step; a trained weight that the loss does not use counts as 0."""
        return self.weight.requires_grad or (self.tap is not None and self.tap.seen)

    def has_gradient(self) -> bool:
        """Whether this step has shown something of it."""
        trained = self.weight.requires_grad and self.weight.grad is not None
        return trained or (self.tap is not None and self.tap.seen)

    def gate_gradient(self, like: Tensor) -> Float[Tensor, " units"] | None:
        """The weight's share of each unit's gate gradient in this step, with device and dtype of `like`; or None."""
        if self.weight.grad is None or (self.tap is not None and not self.weight.requires_grad):
            return None
        weight, gradient = (self.sums.select(local(each)) for each in (self.weight, self.weight.grad))
        # Of a complex entry, real and imaginary part are two weights.
        if weight.is_complex():
            product = (weight.detach().conj() * gradient).real.to(like.dtype)
        else:
            product = weight * gradient.to(like.dtype)
        return self.sums.add_up(product).to(like)

    def tapped(self, like: Tensor) -> Float[Tensor, " units"] | None:
        """The tap's sums of this step by unit, at the scale of gradients as they arrived, else as `gate_gradient`."""
        if self.weight.requires_grad or self.tap is None or self.channels is None:
            return None
        read = self.tap.take()
        return None if read is None else self.channels.add_up(self.channels.select(read)).to(like)


@dataclass(frozen=True, eq=False)
class Sources:
    """The parameters whose gradients an update reads."""

    by_group: tuple[tuple[Source, ...], ...]  # the outgoing weights of each group
    others: tuple[nn.Parameter, ...]  # trained too: their gradients must be finite for the step to count
    ranks: Ranks = field(default_factory=Ranks)  # that hold the parameters in shards


def find_sources(
    groups: tuple[Group, ...],
    model: nn.Module,
    tapped: frozenset[str] = frozenset(),
    sentinels: Sentinels | None = None,
) -> Sources:
    """Outgoing weights of each group, with their index tables on the device, and all other trained parameters."""
    parameters = dict(model.named_parameters(remove_duplicate=False))

    def source(place: Slice, num_units: int) -> Source:
        weight = parameters[place.tensor]
        sums = UnitSum.of(part_of(place, weight), num_units, local(weight.detach()).device)
        if sentinels is None or place.tensor not in tapped:
            return Source(weight, sums, num_entries(place, weight))
        channels = UnitSum.of(replace(place, dim=0), num_units, weight.device)
        return Source(weight, sums, num_entries(place, weight), Tap(place, model, sentinels), channels)

    by_group = tuple(
        tuple(source(place, group.num_units) for place in group.slices if place.role == "consume") for group in groups
    )
    covered = {id(each.weight) for of_group in by_group for each in of_group if each.num_read == each.weight.numel()}
    others = tuple(p for p in model.parameters() if p.requires_grad and id(p) not in covered)
    return Sources(by_group, others, ranks_of(parameters.values()))


def zero_if_finite(parameters: tuple[nn.Parameter, ...], like: Tensor) -> Tensor:
    """0 if every gradient is finite, else NaN; no host sync."""
    total = like.new_zeros(())
    for parameter in parameters:
        gradient = None if parameter.grad is None else local(parameter.grad)
        if gradient is not None and gradient.layout == torch.strided:
            real = torch.view_as_real(gradient) if gradient.is_complex() else gradient
            # A sum is the cheapest operation that a NaN or an infinity survives; times 0 either is NaN.
            total = total + real.sum(dtype=like.dtype).to(like.device)
    return 0.0 * total
