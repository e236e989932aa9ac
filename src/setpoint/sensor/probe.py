"""A probe: what units that rest in the reserve would contribute to the loss, as read in ordinary steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float64, Int


@dataclass(frozen=True, eq=False)
class Probe:
    """First-order gain of bringing each resting unit back.

    With its outgoing weights at zero a unit changes nothing, and the loss falls along the way to the weights
    `w` that it had when it was dropped by, to first order,

        gain = -sum over its outgoing weights of w * dL/dw, at zero.

    A few steps tell this only roughly, and whoever picks the largest of many rough numbers picks luck. So decisions go
    by `gain - error`.

    Once back, a unit stays or goes by what the sensor reads of it, which is its curvature. The steps tell that too:
    with B samples behind a step, gate gradients -gain of mean m and deviation s foretell the saliency
    (B s^2 + m^2) / 2.

    By group there is an entry for each of `origins`, the units that were probed. Error and deviation are NaN where a
    unit was present in one step only; without a deviation nothing is foretold of the saliency.
    """

    step: int  # optimizer steps done when it was taken
    origins: Mapping[str, Int[np.ndarray, " _resting"]]
    gain: Mapping[str, Float64[np.ndarray, " _resting"]]  # in the unit of the loss, mean over the probed steps
    error: Mapping[str, Float64[np.ndarray, " _resting"]]  # standard error of that mean
    rested: Mapping[str, Int[np.ndarray, " _resting"]]  # decisions since the unit was dropped
    drops: Mapping[str, Int[np.ndarray, " _resting"]]  # how often the unit has been dropped so far
    num_steps: int = 1  # how many were probed
    deviation: Mapping[str, Float64[np.ndarray, " _resting"]] = field(default_factory=dict)  # of the gain in one step

    def foretold(self, name: str, num_samples: int) -> Float64[np.ndarray, " _resting"]:
        """Saliency that the sensor will read of the units of a group once they are back; infinite where not known."""
        gain = self.gain[name]
        deviation = self.deviation.get(name)
        return np.full(len(gain), np.inf) if deviation is None else 0.5 * (num_samples * deviation**2 + gain**2)
