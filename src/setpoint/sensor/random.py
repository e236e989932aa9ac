"""The random sensor: no saliency at all, as a baseline for the other sensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float64
from torch import Tensor, nn

from setpoint.groups.group import Group
from setpoint.sensor.reading import Reading


@dataclass(frozen=True, eq=False)
class RandomState:
    """Each unit's number, the steps so far, and how often units were regrown."""

    numbers: Mapping[str, Float64[np.ndarray, " _units"]]
    num_steps: int = 0
    num_grown: int = 0


class RandomSensor:
    """Uniform random numbers that rank the units of a group, and do not compare groups.

    A unit keeps its number. Numbers come from a generator of their own; RNG state is preserved.

    References:
        Mittal, Bhardwaj, Khapra, Ravindran: "Studying the plasticity in deep convolutional neural networks using
        random pruning", Machine Vision and Applications 30, 2019: random choice as the rival to beat.
    """

    reads_shards = True

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def readable(self, groups: tuple[Group, ...], model: nn.Module) -> tuple[Group, ...]:
        """All groups."""
        return groups

    def init(self, groups: tuple[Group, ...], model: nn.Module) -> RandomState:
        """A number for each unit."""
        rng = np.random.default_rng(self.seed)
        return RandomState({group.name: rng.random(group.num_units) for group in groups})

    def update(
        self, state: RandomState, groups: tuple[Group, ...], model: nn.Module, grad_scale: Tensor | None = None
    ) -> RandomState:
        """Count the step."""
        return replace(state, num_steps=state.num_steps + 1)

    def flops(self, groups: tuple[Group, ...], model: nn.Module) -> float:
        """FLOPs of one update: none."""
        return 0.0

    def read(self, state: RandomState, groups: tuple[Group, ...], step: int) -> Reading:
        """The units' numbers, between 0 and 1."""
        numbers = {group.name: state.numbers[group.name] for group in groups}
        return Reading(step, numbers, num_samples=1, calibrated=False, num_steps=state.num_steps)

    def cut(self, state: RandomState, keep: Mapping[str, Bool[np.ndarray, " units"]]) -> RandomState:
        """The numbers of the kept units."""
        kept = {name: values[keep[name]] if name in keep else values for name, values in state.numbers.items()}
        return replace(state, numbers=kept)

    def grow(self, state: RandomState, regrown: Mapping[str, Bool[np.ndarray, " units"]]) -> RandomState:
        """The numbers, with new ones for the regrown units."""
        rng = np.random.default_rng((self.seed, state.num_grown + 1))
        numbers = dict(state.numbers)
        for name, new in regrown.items():
            numbers[name] = rng.random(len(new))
            numbers[name][~new] = state.numbers[name]
        return replace(state, numbers=numbers, num_grown=state.num_grown + 1)
