"""The magnitude sensor: saliency from the size of the weights that write a unit."""

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor, nn

from setpoint.groups.group import Group, Slice
from setpoint.sensor.consumer import parameter_named
from setpoint.sensor.reading import UNCALIBRATED, Reading, Sensor
from setpoint.sensor.units import find_units


@dataclass(frozen=True, eq=False)
class MagnitudeState:
    """The model whose live weights are read, and how many steps it has been trained."""

    model: nn.Module = field(metadata={"live": True})
    num_steps: int = 0


class MagnitudeSensor(Sensor[MagnitudeState]):
    """L2 norm of all incoming ("produce") weights of a unit: `sqrt(sum of w^2 over the trained weights that write it)`.

    Where nothing trained writes the group, over those that read it: norms of fixed filters do not depend on training.
    It ranks the units of one group and does not compare groups (`Reading.calibrated` is False). The weights are those
    at the reading, and no average.

    References:
        Li, Kadav, Durdanovic, Samet, Graf: "Pruning Filters for Efficient ConvNets", ICLR 2017 (with the L1 norm).
    """

    traits = UNCALIBRATED

    def readable(self, groups: tuple[Group, ...], model: nn.Module) -> tuple[Group, ...]:
        return tuple(group for group in groups if _places(group, model))

    def init(self, groups: tuple[Group, ...], model: nn.Module) -> MagnitudeState:
        return MagnitudeState(model)

    def update(
        self, state: MagnitudeState, groups: tuple[Group, ...], model: nn.Module, grad_scale: Tensor | None = None
    ) -> MagnitudeState:
        return MagnitudeState(model, state.num_steps + 1)

    def read(self, state: MagnitudeState, groups: tuple[Group, ...], step: int) -> Reading:
        units = find_units(groups, state.model, lambda group: _places(group, state.model))
        norms = units.squares().double().sqrt().cpu().numpy()
        parts = np.split(norms, np.cumsum(units.num_units)[:-1])
        saliency = {group.name: values for group, values in zip(groups, parts, strict=False)}
        return Reading(step, saliency, num_samples=1, calibrated=False, num_steps=state.num_steps)


def _places(group: Group, model: nn.Module) -> tuple[Slice, ...]:
    for role in ("produce", "consume"):
        places = (place for place in group.slices if place.role == role)
        if found := tuple(place for place in places if parameter_named(model, place.tensor) is not None):
            return found
    return ()
