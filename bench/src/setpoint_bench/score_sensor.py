"""The score sensor: hands a loop the scores that something beside it keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol, final

import numpy as np
from jaxtyping import Float64
from torch import Tensor, nn

from setpoint.groups.group import Group
from setpoint.sensor.reading import Reading, Sensor, Traits


class Scorer(Protocol):
    """What keeps a score of every unit, by hooks of its own on the optimizer."""

    def readable(self, groups: tuple[Group, ...], model: nn.Module) -> tuple[Group, ...]:
        """The groups of which it can keep scores."""
        ...

    def scores(self, groups: tuple[Group, ...]) -> Mapping[str, Float64[np.ndarray, " _units"]]:
        """The score of each active unit, by group; the lowest go first."""
        ...


@dataclass(frozen=True)
class ScoreState:
    """How many steps were counted."""

    num_steps: int = 0


@final
class ScoreSensor(Sensor[ScoreState]):
    """Scores less the lowest of them all, since readings are never negative; the order is the same.

    A loop leaves steps of long runs unread (`setpoint.sensor.stride`). What adds up all steps keeps its own count.

    Args:
        scorer: keeps the scores, and counts its own FLOPs.
    """

    traits = Traits(calibrated=False, in_loss=False)

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer

    def readable(self, groups: tuple[Group, ...], model: nn.Module) -> tuple[Group, ...]:
        """Those that the scorer can keep scores of."""
        return self.scorer.readable(groups, model)

    def init(self, groups: tuple[Group, ...], model: nn.Module) -> ScoreState:
        """No step yet."""
        return ScoreState()

    def update(
        self, state: ScoreState, groups: tuple[Group, ...], model: nn.Module, grad_scale: Tensor | None = None
    ) -> ScoreState:
        """Count the step."""
        return replace(state, num_steps=state.num_steps + 1)

    def flops(self, groups: tuple[Group, ...], model: nn.Module) -> float:
        """None of its own."""
        return 0.0

    def read(self, state: ScoreState, groups: tuple[Group, ...], step: int) -> Reading:
        """The present scores."""
        scores = self.scorer.scores(groups)
        lowest = min((float(values.min()) for values in scores.values() if len(values)), default=0.0)
        saliency = {group.name: scores[group.name] - lowest for group in groups}
        return Reading(step, saliency, num_samples=1, calibrated=False, num_steps=state.num_steps)
