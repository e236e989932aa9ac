"""Gated weights: weights that are multiplied by the gates of the units that they read, in place and for a while."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from setpoint.groups.group import Group, Slice


@dataclass(eq=False)
class Held:
    """A weight's own value while its product with gates stands in its place."""

    weight: nn.Parameter
    own: Tensor
    product: Tensor

    @torch.no_grad()
    def put_in(self) -> None:
        """The product into the weight."""
        self.weight.copy_(self.product)

    @torch.no_grad()
    def put_back(self) -> None:
        """The own value back into the weight."""
        self.weight.copy_(self.own)


@dataclass(frozen=True, eq=False)
class GatedWeight:
    """A weight, and by dim and group the unit that each entry reads; -1 where it reads none of the group."""

    weight: nn.Parameter
    readers: tuple[tuple[str, int, Tensor], ...]

    def hold(self, gates: Mapping[str, Tensor]) -> Held:
        """The weight's present value, and its product with gates."""
        own = self.weight.detach().clone().requires_grad_(torch.is_grad_enabled())
        product = own
        for name, dim, index in self.readers:
            gate = torch.cat([gates[name], gates[name].new_ones(1)])[index]
            product = product * gate.view([-1 if each == dim else 1 for each in range(own.dim())]).to(own.dtype)
        return Held(self.weight, own, product)


def gateable(groups: tuple[Group, ...], model: nn.Module) -> tuple[Group, ...]:
    """The groups whose every outgoing weight is trained and has one name: what is tied may read other things, too."""
    names: dict[int, int] = {}
    weights = dict(model.named_parameters(remove_duplicate=False))
    for weight in weights.values():
        names[id(weight)] = names.get(id(weight), 0) + 1

    def alone(place: Slice) -> bool:
        weight = weights.get(place.tensor)
        return weight is not None and weight.requires_grad and place.dim is not None and names[id(weight)] == 1

    outgoing = {group.name: [place for place in group.slices if place.role == "consume"] for group in groups}
    return tuple(group for group in groups if outgoing[group.name] and all(map(alone, outgoing[group.name])))


def gated_weights(groups: tuple[Group, ...], weights: Mapping[str, nn.Parameter]) -> list[GatedWeight]:
    """The weights that read units of the groups."""
    readers: dict[str, list[tuple[str, int, Tensor]]] = {}
    for group in groups:
        for place in group.slices:
            if place.role == "consume" and place.dim is not None:
                index = torch.from_numpy(np.asarray(place.index, dtype=np.int64)).to(weights[place.tensor].device)
                readers.setdefault(place.tensor, []).append((group.name, place.dim, index))
    return [GatedWeight(weights[name], tuple(each)) for name, each in readers.items()]
