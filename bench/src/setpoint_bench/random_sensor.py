"""The random sensor: no saliency at all, as a baseline for the other sensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Float64
from torch import Tensor, nn

from setpoint.groups.follow import ByUnit, fresh
from setpoint.groups.group import Group
from setpoint.sensor.reading import Reading, Sensor, Traits


@dataclass(frozen=True, eq=False)
class RandomState:
    """Each unit's number (NaN after a return, until the next step draws it), steps, how often units came back."""

    numbers: Mapping[str, ByUnit[Float64[np.ndarray, " _units"]]] = field(metadata=fresh(math.nan))
    num_steps: int = 0
    num_grown: int = 0


class RandomSensor(Sensor[RandomState]):
    """Uniform random numbers that rank the units of a group, and do not compare groups; a unit keeps its number.

    References:
        Mittal, Bhardwaj, Khapra, Ravindran: "Studying the plasticity in deep convolutional neural networks using
        random pruning", Machine Vision and Applications 30, 2019: random choice as the rival to beat.
    """

    traits = Traits(calibrated=False, in_loss=False, shards=True)

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def init(self, groups: tuple[Group, ...], model: nn.Module) -> RandomState:
        rng = np.random.default_rng(self.seed)
        return RandomState({group.name: rng.random(group.num_units) for group in groups})

    def update(
        self, state: RandomState, groups: tuple[Group, ...], model: nn.Module, grad_scale: Tensor | None = None
    ) -> RandomState:
        """Count the step, and draw the numbers of regrown units."""
        state = replace(state, num_steps=state.num_steps + 1)
        blank = [name for name, values in state.numbers.items() if np.isnan(values).any()]
        if not blank:
            return state
        rng, numbers = np.random.default_rng((self.seed, state.num_grown + 1)), dict(state.numbers)
        for name in blank:
            numbers[name] = np.where(np.isnan(numbers[name]), rng.random(len(numbers[name])), numbers[name])
        return replace(state, numbers=numbers, num_grown=state.num_grown + 1)

    def read(self, state: RandomState, groups: tuple[Group, ...], step: int) -> Reading:
        """The units' numbers, between 0 and 1."""
        numbers = {group.name: state.numbers[group.name] for group in groups}
        return Reading(step, numbers, num_samples=1, calibrated=False, num_steps=state.num_steps)
