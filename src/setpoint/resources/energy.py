"""Joules of one training step, as a pure function of widths: what the device draws while the step takes its time.

    total(widths) = watts * latency(widths) + constant_j,

both fitted to metered steps, or a figure of watts that the user states. Power differs less between
widths than time does, which is why so simple a form is good enough for feedback to work on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from jaxtyping import Float64

from setpoint.cost.cost import Cost
from setpoint.errors import CostError


@dataclass(frozen=True, eq=False)
class EnergyCost:
    """Joules of one training step.

    Args:
        constant_j: joules of a step that no second accounts for.
        stated: whether the watts are the user's, so that seconds are all that can be measured of a step.
        error: median relative error over steps that the fit did not see; NaN if there were none.
    """

    latency: Cost
    watts: float
    constant_j: float = 0.0
    source: str = "modelled: stated watts x seconds"
    error: float = float("nan")
    stated: bool = False
    resource: Final = "energy"

    def __post_init__(self) -> None:
        if not (np.isfinite(self.watts) and self.watts > 0):
            raise CostError(f"watts is the power that a step draws, above 0, got {self.watts!r}")

    def total(self, widths: Mapping[str, int]) -> float:
        """Joules of a step at these widths."""
        return self.watts * self.latency.total(widths) + self.constant_j

    def saving(self, widths: Mapping[str, int], group: str, num_units: int) -> float:
        """`total(widths) - total(widths with num_units fewer units in group)`."""
        return self.watts * self.latency.saving(widths, group, num_units)


def fit_energy(latency: Cost, steps: Sequence[tuple[Mapping[str, int], float]], source: str) -> EnergyCost:
    """The energy cost that metered steps tell of, by least squares of relative errors.

    Raises:
        CostError: for joules that are not above 0.
    """
    joules = np.array([energy_j for _, energy_j in steps])
    if not len(joules) or not (np.isfinite(joules) & (joules > 0)).all():
        raise CostError(f"metered steps need joules above 0, got {joules.tolist()} from {source}: meter longer steps")
    seconds = np.array([latency.total(widths) for widths, _ in steps])
    watts, constant_j = _fitted(seconds, joules)
    errors = []
    for left_out in range(len(steps) if len(steps) > 3 else 0):
        rest = np.arange(len(steps)) != left_out
        slope, constant = _fitted(seconds[rest], joules[rest])
        errors.append(abs(slope * seconds[left_out] + constant - joules[left_out]) / joules[left_out])
    error = float(np.median(errors)) if errors else float("nan")
    return EnergyCost(latency, watts, constant_j, f"modelled: fit to steps metered by {source}", error)


def _fitted(seconds: Float64[np.ndarray, " n"], joules: Float64[np.ndarray, " n"]) -> tuple[float, float]:
    """Watts and constant joules; through 0 where the line would not be one of a machine."""
    rows = np.stack([seconds / joules, 1.0 / joules], axis=1)
    watts, constant_j = np.linalg.lstsq(rows, np.ones(len(joules)), rcond=None)[0]
    if len(joules) < 3 or watts <= 0 or constant_j < 0:
        ratio = seconds / joules
        return float(ratio.sum() / (ratio**2).sum()), 0.0
    return float(watts), float(constant_j)
