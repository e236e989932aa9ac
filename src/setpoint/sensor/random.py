"""The random sensor: no saliency at all, as a rival for those that claim to know better."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool
from torch import Tensor, nn

from setpoint.groups.group import Group
from setpoint.sensor.reading import Reading


@dataclass(frozen=True)
class RandomState:
    """How many steps have gone by, and how many readings were cut by."""

    num_steps: int = 0
    cuts: int = 0


class RandomSensor:
    """Uniform random numbers that rank the units of a group, and say nothing about two groups.

    They come from a generator of their own, drawn anew after each cut; the global random state is left alone.

    Args:
        seed: of the generator.

    References:
        Mittal, Bhardwaj, Khapra, Ravindran: "Studying the plasticity in deep convolutional neural networks using
        random pruning", Machine Vision and Applications 30, 2019: random choice as the rival to beat.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def readable(self, groups: tuple[Group, ...], model: nn.Module) -> tuple[Group, ...]:
        """All groups."""
        return groups

    def init(self, groups: tuple[Group, ...], model: nn.Module) -> RandomState:
        """A state of no steps."""
        return RandomState()

    def update(
        self, state: RandomState, groups: tuple[Group, ...], model: nn.Module, grad_scale: Tensor | None = None
    ) -> RandomState:
        """Count the step."""
        return replace(state, num_steps=state.num_steps + 1)

    def flops(self, groups: tuple[Group, ...], model: nn.Module) -> float:
        """FLOPs of one update: none."""
        return 0.0

    def read(self, state: RandomState, groups: tuple[Group, ...], step: int) -> Reading:
        """Random numbers between 0 and 1, the same for the same state.

        Args:
            state: the state so far.
            groups: the active groups.
            step: optimizer steps done, for the record.
        """
        rng = np.random.default_rng((self.seed, state.cuts))
        saliency = {group.name: rng.random(group.num_units) for group in groups}
        return Reading(step, saliency, num_samples=1, calibrated=False, num_steps=state.num_steps)

    def cut(self, state: RandomState, keep: Mapping[str, Bool[np.ndarray, " units"]]) -> RandomState:
        """A state whose numbers are new."""
        return replace(state, cuts=state.cuts + 1)

    def grow(self, state: RandomState, regrown: Mapping[str, Bool[np.ndarray, " units"]]) -> RandomState:
        """The same state: its numbers are drawn for whatever units there are."""
        return state
