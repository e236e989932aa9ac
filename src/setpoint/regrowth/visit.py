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
from setpoint.distributed import unsharded_tensor
from setpoint.groups.group import Group

Arrived = Mapping[str, Bool[np.ndarray, " _units"]]  # by group, which active units have just come back


@dataclass(frozen=True, eq=False)
class Direction:
    """Outgoing weights of units that have just arrived, in one tensor, and the values that these had when dropped."""

    group: str
    tensor: str  # its qualified name
    dim: int  # along which units lie
    entries: Int[Tensor, " entries"]  # of the visitors, along that dim
    visitors: Int[Tensor, " entries"]  # whose each entry is: its place among the visitors of the group
    values: Tensor  # at these entries, of the unsharded weight

    def gain(self, gradient: Tensor, num_visitors: int) -> Float64[Tensor, " visitors"]:
        """By visitor, `-sum(w * dL/dw)` with w the values and the whole gradient of the tensor."""
        here = gradient.index_select(self.dim, self.entries.to(gradient.device)).cpu()
        product = (self.values.conj() * here).real if here.is_complex() else self.values * here
        sums = product.movedim(self.dim, 0).flatten(1).double().sum(1)
        return torch.zeros(num_visitors, dtype=torch.float64).index_add_(0, self.visitors, -sums)


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
        found = _outgoing(tensors, groups, arrived)
        return cls(origins, tuple(place for place in found if isinstance(tensors[place.tensor], nn.Parameter)))

    @torch.no_grad()
    def gains(
        self, model: nn.Module, grad_scale: Tensor | None = None
    ) -> dict[str, Float64[np.ndarray, " _visitors"]] | None:
        """By group, the gain of each visitor in this step; None where a gradient is NaN, or none is there.

        `grad_scale` is what the gradients are still multiplied by, or None. All ranks of a sharded model call it.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        found = {name: torch.zeros(len(units), dtype=torch.float64) for name, units in self.origins.items()}
        seen = False
        for place in self.directions:
            gradient = parameters[place.tensor].grad
            if gradient is not None:
                seen = True
                found[place.group] += place.gain(unsharded_tensor(gradient), len(found[place.group]))
        if not seen or not all(bool(values.isfinite().all()) for values in found.values()):
            return None
        scale = 1.0 if grad_scale is None else grad_scale.double().cpu()
        return {name: (values / scale).numpy() for name, values in found.items()}

    def state_dict(self) -> dict[str, Any]:
        origins = {name: torch.from_numpy(units) for name, units in self.origins.items()}
        return {"origins": origins, "directions": [vars(direction) for direction in self.directions]}

    @classmethod
    def resumed(cls, state: Mapping[str, Any]) -> Visit:
        """The visit whose `state_dict` this is."""
        origins = {name: units.cpu().numpy() for name, units in state["origins"].items()}
        return cls(origins, tuple(Direction(**direction) for direction in state["directions"]))
