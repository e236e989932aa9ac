"""A visit: resting units take part in a few ordinary steps with outgoing weights at zero, which tell what they gain."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int
from torch import Tensor, nn

from setpoint.actuator.shrink import unwrapped
from setpoint.actuator.tensors import named_tensors
from setpoint.distributed import is_sharded_tensor, local, ranks_of, rows
from setpoint.groups.group import Group

Arrived = Mapping[str, Bool[np.ndarray, " _units"]]
"""By group, which active units have just come back: one boolean for each."""


@dataclass(frozen=True, eq=False)
class Direction:
    """Outgoing weights of units that have just arrived, in one tensor, and the values that these had when dropped."""

    group: str
    tensor: str  # its qualified name
    dim: int  # along which units lie
    entries: Int[Tensor, " entries"]  # of the visitors, along that dim
    visitors: Int[Tensor, " entries"]  # whose each entry is: its place among the visitors of the group
    values: Tensor  # at these entries, of the unsharded weight

    @torch.no_grad()
    def gain(self, weight: nn.Parameter, num_visitors: int) -> Float64[Tensor, " visitors"]:
        """By visitor, `-sum(w * dL/dw)` over this rank's entries, with w the values and the gradient that is there."""
        gain = torch.zeros(num_visitors, dtype=torch.float64, device=local(weight.detach()).device)
        if weight.grad is None:
            return gain
        entries, visitors, values = (part.to(gain.device) for part in (self.entries, self.visitors, self.values))
        mine = rows(weight)
        if is_sharded_tensor(weight) and self.dim == 0:
            here = (entries >= mine.start) & (entries < mine.stop)
            entries, visitors, values = entries[here] - mine.start, visitors[here], values[here]
        elif is_sharded_tensor(weight):
            values = values[mine]
        gradient = local(weight.grad).index_select(self.dim, entries)
        product = (values.conj() * gradient).real if values.is_complex() else values * gradient
        return gain.index_add_(0, visitors, -product.movedim(self.dim, 0).flatten(1).double().sum(1))


def _outgoing(tensors: Mapping[str, Tensor], groups: tuple[Group, ...], arrived: Arrived) -> Iterator[Direction]:
    for group in groups:
        for part in group.slices if group.name in arrived else ():
            if part.role == "consume" and part.dim is not None:
                units = arrived[group.name]
                here = np.flatnonzero((part.index >= 0) & units[part.index])
                visitors = torch.from_numpy((np.cumsum(units) - 1)[part.index[here]])
                entries, weight = torch.from_numpy(here), tensors[part.tensor].detach()
                values = weight.index_select(part.dim, entries.to(weight.device)).cpu()
                yield Direction(group.name, part.tensor, part.dim, entries, visitors, values)


@torch.no_grad()
def silence(model: nn.Module, groups: tuple[Group, ...], arrived: Arrived, copies: Sequence[nn.Module] = ()) -> None:
    """Set the outgoing weights of units that have just arrived to zero, so that they change no output yet.

    Model and copies are those after `regrow`, and not sharded now; `groups` are with these units.
    """
    places = list(_outgoing(named_tensors(model), groups, arrived))
    for module in (model, *unwrapped([place.tensor for place in places], model, copies)):
        tensors = named_tensors(module)
        for place in places:
            tensor = tensors[place.tensor]
            tensor.index_fill_(place.dim, place.entries.to(tensor.device), 0)


@dataclass(frozen=True, eq=False)
class Visit:
    """Units that are in the model on trial. A value; it knows nothing of what they learn there.

    With outgoing weights at zero a unit changes no output, and along the way to the weights w that it had when it was
    dropped the loss falls, to first order, by `gain = -sum(w * dL/dw)`. The gradients are those of the user's own step,
    as clipped and scaled as the sensor's.
    """

    origins: Mapping[str, Int[np.ndarray, " _units"]]  # by group, of the visitors, ascending
    directions: tuple[Direction, ...]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        groups: tuple[Group, ...],
        arrived: Arrived,
        origins: Mapping[str, Int[np.ndarray, " _units"]],
    ) -> Visit:
        """The visit of units that have just come back as they were, before their outgoing weights are set to zero."""
        tensors = named_tensors(model)
        found = [
            place for place in _outgoing(tensors, groups, arrived) if isinstance(tensors[place.tensor], nn.Parameter)
        ]
        return cls(dict(origins), tuple(found))

    def gains(
        self, model: nn.Module, grad_scale: Tensor | None = None
    ) -> dict[str, Float64[np.ndarray, " _visitors"]] | None:
        """By group, the gain of each visitor in this step; None where a gradient is NaN, or none is there.

        `grad_scale` is what the gradients are still multiplied by, or None.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        found = {name: torch.zeros(len(units), dtype=torch.float64) for name, units in self.origins.items()}
        seen = False
        for direction in self.directions:
            weight = parameters[direction.tensor]
            seen |= weight.grad is not None
            found[direction.group] += direction.gain(weight, len(self.origins[direction.group])).cpu()
        total = ranks_of(parameters.values()).total(torch.cat([torch.zeros(0, dtype=torch.float64), *found.values()]))
        total = total if grad_scale is None else total / grad_scale.double().cpu()
        if not seen or not bool(torch.isfinite(total).all()):
            return None
        parts = torch.split(total, [len(values) for values in found.values()])
        return {name: values.numpy() for name, values in zip(found, parts, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        origins = {name: torch.from_numpy(np.asarray(units)) for name, units in self.origins.items()}
        return {"origins": origins, "directions": [vars(direction) for direction in self.directions]}

    @classmethod
    def resumed(cls, state: Mapping[str, Any]) -> Visit:
        """The visit whose `state_dict` this is."""
        origins = {str(name): units.cpu().numpy() for name, units in state["origins"].items()}
        return cls(origins, tuple(Direction(**direction) for direction in state["directions"]))
