"""A criterion: what is measured of every unit in one optimizer step, and what its average says of the unit's worth.

A new one is a function under `@criterion()`, which `AveragingSensor` makes a sensor of; the conformance battery tests
every one that is registered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from setpoint.groups.group import Group, Slice
from setpoint.sensor.reading import Traits
from setpoint.sensor.units import Units

Values = Float64[np.ndarray, " all_units"]
Measure = Callable[[Units], Float[Tensor, " all_units"]]


@dataclass(frozen=True)
class Criterion:
    """A measure by unit, and how its mean and variance over recent steps become a saliency.

    Args:
        measure: of all units in one step, from their weights and gradients; no host sync.
        saliency: of the mean, the unbiased variance, and the number of independent samples behind each step's gradient.
        role: of the weights that are read: "consume" for those that read a unit, "produce" for those that write it.
        traits: of the readings. With `hooks` the measure uses `Units.tapped` where these weights are frozen.
        is_slope: whether the mean is the gradient of the loss with respect to a gate on the unit.
    """

    measure: Measure
    saliency: Callable[[Values, Values, int], Values]
    role: str
    traits: Traits
    is_slope: bool = False

    def places(self, group: Group) -> tuple[Slice, ...]:
        """Where the weights lie that are read of a group."""
        return tuple(place for place in group.slices if place.role == self.role)


CRITERIA: dict[str, Criterion] = {}
"""Every criterion by name."""


def the_mean(mean: Values, variance: Values, num_samples: int) -> Values:
    """Saliency of a measure that is never negative."""
    saliency: Values = np.maximum(mean, 0.0)
    return saliency


# Unless a criterion says otherwise it ranks the units of a group, and adds up shards by `Units.add_up`.
UNCALIBRATED = Traits(calibrated=False, in_loss=False, shards=True)


def criterion(
    *,
    saliency: Callable[[Values, Values, int], Values] = the_mean,
    role: str = "consume",
    traits: Traits = UNCALIBRATED,
    is_slope: bool = False,
) -> Callable[[Measure], Criterion]:
    """Register a function of `Units` as a criterion, under its own name; the arguments are those of `Criterion`.

    >>> @criterion()
    ... def largest_pull(units: Units) -> Tensor:
    ...     return units.add_up(lambda weight, gradient: (weight * gradient).abs())
    >>> CRITERIA.pop("largest_pull") is largest_pull
    True
    """

    def register(measure: Measure) -> Criterion:
        made = Criterion(measure, saliency, role, traits, is_slope)
        CRITERIA[measure.__name__] = made
        return made

    return register


@criterion()
def fisher(units: Units) -> Tensor:
    """Squared gate gradient, `(sum of w dL/dw)^2` over the weights that read a unit (Liu et al., ICML 2021)."""
    return units.add_up(torch.mul).square()
