"""Movement: whether training moves the weights of a unit away from zero or towards it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from setpoint.groups.group import Group, Slice
from setpoint.sensor.units import UnitSum


def places_of(group: Group, model: nn.Module) -> tuple[Slice, ...]:
    """The trained weights of two dims or more that write or read a group's units."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return tuple(
        place
        for place in group.slices
        if place.role != "carry" and place.dim is not None and place.tensor in parameters
        if parameters[place.tensor].dim() > 1 and parameters[place.tensor].requires_grad
    )


@final
@dataclass(frozen=True, eq=False)
class Movements:
    """The movement of a group's units in one step: `-sum over the unit's weights of w * dL/dw`.

    Above 0, a step down the gradient moves the weights away from zero on the whole. Summed over steps it is the score
    of a block in movement pruning but for the score's learning rate: a mask on the block has the gradient `sum of w *
    dL/dw`, and its score goes down that.

    Args:
        parts: each weight with the sums over its entries by unit.
        num_units: of the group.

    References:
        Sanh, Wolf, Rush: "Movement pruning: adaptive sparsity by fine-tuning", NeurIPS 2020, section 4. Lagunas,
        Charlaix, Sanh, Rush: "Block pruning for faster transformers", EMNLP 2021, section 3.
    """

    parts: tuple[tuple[nn.Parameter, UnitSum], ...]
    num_units: int

    @classmethod
    def of(cls, group: Group, model: nn.Module) -> Movements:
        """Those of a group of a model as it is now."""
        weights = dict(model.named_parameters(remove_duplicate=False))
        places = [(weights[place.tensor], place) for place in places_of(group, model)]
        sums = tuple((weight, UnitSum.of(place, group.num_units, weight.device)) for weight, place in places)
        return cls(sums, group.num_units)

    @torch.no_grad()
    def now(self) -> Float[Tensor, " units"]:
        """Movement by the gradients that are there now; a weight without one does not move."""
        total = torch.zeros(self.num_units, device=self.parts[0][0].device)
        for weight, sums in self.parts:
            if weight.grad is not None:
                total -= sums.add_up(sums.select(weight).float() * sums.select(weight.grad).float())
        return total
