"""The magnitude sensor: saliency from the size of the weights that write a unit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from setpoint.distributed import local, ranks_of
from setpoint.groups.group import Group, Slice
from setpoint.sensor.reading import Reading
from setpoint.sensor.unit_sum import UnitSum, part_of


@dataclass(frozen=True, eq=False)
class MagnitudeState:
    """The model whose live weights are read, and how many steps it has been trained."""

    model: nn.Module = field(metadata={"live": True})
    num_steps: int = 0


class MagnitudeSensor:
    """L2 norm of all incoming ("produce") weights of a unit: `sqrt(sum of w^2 over the trained weights that write it)`.

    Where nothing trained writes the group, over those that read it: norms of fixed filters do not depend on training.
    It ranks the units of one group and does not compare groups (`Reading.calibrated` is False).

    References:
        Li, Kadav, Durdanovic, Samet, Graf: "Pruning Filters for Efficient ConvNets", ICLR 2017 (with the L1 norm).
    """

    reads_shards, in_loss = True, False

    def readable(self, groups: tuple[Group, ...], model: nn.Module) -> tuple[Group, ...]:
        """The groups that trained weights write or read."""
        return tuple(group for group in groups if _judged_by(group, _parameters(model)))

    def init(self, groups: tuple[Group, ...], model: nn.Module) -> MagnitudeState:
        """A state that points at the live model."""
        return MagnitudeState(model)

    def update(
        self, state: MagnitudeState, groups: tuple[Group, ...], model: nn.Module, grad_scale: Tensor | None = None
    ) -> MagnitudeState:
        """Count the step; only `read` looks at weights."""
        return MagnitudeState(model, state.num_steps + 1)

    def flops(self, groups: tuple[Group, ...], model: nn.Module) -> float:
        """FLOPs of one update: none, a step is only counted."""
        return 0.0

    @torch.no_grad()
    def read(self, state: MagnitudeState, groups: tuple[Group, ...], step: int) -> Reading:
        """Norms of the present weights; a NaN or infinite weight gives a NaN or infinite norm."""
        tensors = _parameters(state.model)
        squares = {group.name: torch.zeros(group.num_units, dtype=torch.float64) for group in groups}
        for group in groups:
            for place in _judged_by(group, tensors):
                weight = local(tensors[place.tensor].detach())
                sums = UnitSum.of(part_of(place, tensors[place.tensor]), group.num_units, weight.device)
                values = sums.select(weight)
                wide = values.to(torch.promote_types(values.dtype, torch.float32))
                squares[group.name] += sums.add_up(wide.square()).double().cpu()
        # The empty tensor is for no groups at all, of which `cat` would fail.
        total = ranks_of(tensors.values()).total(torch.cat([torch.zeros(0, dtype=torch.float64), *squares.values()]))
        parts = np.split(total.sqrt().numpy(), np.cumsum([group.num_units for group in groups])[:-1])
        saliency = dict(zip(squares, parts, strict=True)) if groups else {}
        return Reading(step, saliency, num_samples=1, calibrated=False, num_steps=state.num_steps)


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters(remove_duplicate=False))


def _judged_by(group: Group, parameters: Mapping[str, nn.Parameter]) -> tuple[Slice, ...]:
    """The trained weights that write the group, or else those that read it."""
    for role in ("produce", "consume"):
        places = tuple(place for place in group.slices if place.role == role and place.tensor in parameters)
        if places:
            return places
    return ()
