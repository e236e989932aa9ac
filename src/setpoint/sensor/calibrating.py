"""Calibrating: a sensor that gathers second moments besides, until the first cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from jaxtyping import Float64
from torch import Tensor, nn

from setpoint.distributed import Ranks
from setpoint.groups.group import Group
from setpoint.sensor.moments import Gathering, Moment, find_readers
from setpoint.sensor.reading import Reading, Sensor
from setpoint.sensor.reconstruction import unit_scores


@dataclass(frozen=True, eq=False)
class Calibration:
    """What the inner sensor remembers, and the second moments so far."""

    inner: Any
    gathering: Gathering = field(metadata={"live": True})
    # By layer, in blocks; None once units have gone.
    moments: Mapping[str, tuple[Tensor, ...]] | None = field(default_factory=dict, metadata={"anew": True})
    norms: Mapping[str, str] = field(default_factory=dict)  # by layer, the BatchNorm that is given just what it makes
    flops: float = 0.0


class Calibrating(Sensor[Calibration]):
    """A sensor whose readings hold second moments until units go, with which the readers of units are refitted.

    Args:
        inner: reads the saliencies.
        num_forwards: in which a full sample of rows is taken.
        scores: whether saliencies are the geometric means of the inner ones and of `unit_scores`: what the loss loses
            with a unit, and what the next layers cannot make up for.
    """

    def __init__(self, inner: Sensor[Any], num_forwards: int, *, scores: bool = True) -> None:
        self.inner, self.num_forwards, self.scores, self.traits = inner, num_forwards, scores, inner.traits

    def readable(self, groups: tuple[Group, ...], model: nn.Module) -> tuple[Group, ...]:
        return self.inner.readable(groups, model)

    def over(self, ranks: Ranks) -> Sensor[Calibration]:
        return Calibrating(self.inner.over(ranks), self.num_forwards, scores=self.scores)

    def init(self, groups: tuple[Group, ...], model: nn.Module) -> Calibration:
        gathering = Gathering(model, find_readers(model, groups), self.num_forwards)
        return Calibration(self.inner.init(groups, model), gathering)

    def update(
        self, state: Calibration, groups: tuple[Group, ...], model: nn.Module, grad_scale: Tensor | None = None
    ) -> Calibration:
        state = replace(state, inner=self.inner.update(state.inner, groups, model, grad_scale))
        if state.moments is None:
            state.gathering.remove()
            return state
        moments, flops = state.gathering.taken(state.moments)
        return replace(state, moments=moments, norms=dict(state.gathering.norms), flops=state.flops + flops)

    def forget(self, state: Calibration) -> None:
        self.inner.forget(state.inner)
        state.gathering.forget()

    def read(self, state: Calibration, groups: tuple[Group, ...], step: int) -> Reading:
        reading = self.inner.read(state.inner, groups, step)
        found = {name: Moment(blocks, state.norms.get(name, "")) for name, blocks in (state.moments or {}).items()}
        if self.scores and found:
            scores = unit_scores(state.gathering.model, groups, state.gathering.readers, found)
            reading = replace(reading, saliency=_geometric_means(reading.saliency, scores), in_loss=False)
        return replace(reading, moments=found, flops=state.flops)

    def flops(self, groups: tuple[Group, ...], model: nn.Module) -> float:
        return self.inner.flops(groups, model)

    def release(self, state: Calibration) -> None:
        self.inner.release(state.inner)
        state.gathering.remove()


def _geometric_means(
    saliency: Mapping[str, Float64[np.ndarray, " _units"]], scores: Mapping[str, Float64[np.ndarray, " _units"]]
) -> dict[str, Float64[np.ndarray, " _units"]]:
    """`sqrt(saliency * score)`; the score of a unit without one is its saliency at the mean ratio of the others."""
    known = {name: np.isfinite(values) for name, values in scores.items()}
    both = [sum(float(of[n][known[n]].sum()) for n in known) for of in (scores, saliency)]
    ratio = both[0] / both[1] if both[1] > 0 else 1.0
    filled = {name: np.where(known[name], scores[name], ratio * saliency[name]) for name in scores}
    return {name: np.sqrt(np.maximum(values, 0.0) * saliency[name]) for name, values in filled.items()}
