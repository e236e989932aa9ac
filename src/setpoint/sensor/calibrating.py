"""Calibrating: a sensor that also gathers second moments, until the first cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from jaxtyping import Float64
from torch import Tensor, nn

from setpoint.groups.group import Group, widths_of
from setpoint.messages import warn
from setpoint.sensor.moments import Gathering, Moment, find_readers
from setpoint.sensor.reading import Reading, Sensor
from setpoint.sensor.reconstruction import unit_scores

_ENOUGH_TARGETS = 32  # that are of one class by chance in no balanced data


@dataclass(frozen=True, eq=False)
class Calibration:
    """What the inner sensor remembers, and the second moments so far."""

    inner: Any
    gathering: Gathering = field(metadata={"live": True})
    # By layer, in blocks; None once units have gone.
    moments: Mapping[str, tuple[Tensor, ...]] | None = field(default_factory=dict, metadata={"anew": True})
    norms: Mapping[str, str] = field(default_factory=dict)  # by layer, the BatchNorm that is given just what it makes


class Calibrating(Sensor[Calibration]):
    """A sensor whose readings hold second moments until units go, with which the readers of units are refitted.

    Args:
        inner: reads the saliencies.
        num_forwards: of the model, in which a full sample of rows is taken.
        passes: forwards in a step.
        widths: by group, of the dense model.
        forward_flops: by layer, FLOPs of the dense model's forwards in a step.
        scores: whether saliencies are the geometric means of the inner ones and of `unit_scores`: what the loss loses
            with a unit, and what the next layers cannot make up for.
    """

    def __init__(
        self,
        inner: Sensor[Any],
        num_forwards: int,
        passes: int,
        widths: Mapping[str, int],
        forward_flops: Mapping[str, float],
        *,
        scores: bool,
    ) -> None:
        self.inner, self.num_forwards, self.passes, self.traits = inner, num_forwards, passes, inner.traits
        self.widths, self.forward_flops, self.scores = widths, forward_flops, scores

    def init(self, groups: tuple[Group, ...], model: nn.Module) -> Calibration:
        gathering = Gathering(model, find_readers(model, groups), self.num_forwards)
        return Calibration(self.inner.init(groups, model), gathering)

    def update(
        self, state: Calibration, groups: tuple[Group, ...], model: nn.Module, grad_scale: Tensor | None = None
    ) -> Calibration:
        state = replace(state, inner=self.inner.update(state.inner, groups, model, grad_scale))
        if state.moments is None:
            self._end(state)
            return state
        return replace(state, moments=state.gathering.taken(state.moments), norms=dict(state.gathering.norms))

    def forget(self, state: Calibration) -> None:
        self.inner.forget(state.inner)
        state.gathering.forget()

    def read(self, state: Calibration, groups: tuple[Group, ...], step: int) -> Reading:
        reading = self.inner.read(state.inner, groups, step)
        if state.moments is None:
            return reading
        gathering, found = state.gathering, dict[str, Moment]()
        for reader in gathering.readers:  # all: other ranks may have called those that this one has not
            blocks = state.moments.get(reader.name) or reader.no_rows(gathering.model)
            found[reader.name] = Moment(blocks, state.norms.get(reader.name, ""))
        scores = unit_scores(gathering.model, groups, gathering.readers, found) if self.scores else None
        if scores is not None and any(moment.num_rows for moment in found.values()):
            reading = replace(reading, saliency=_geometric_means(reading.saliency, scores), in_loss=False)
        return replace(reading, moments=found)

    def flops(self, groups: tuple[Group, ...], model: nn.Module) -> float:
        flops = self.inner.flops(groups, model)
        if widths_of(groups) != self.widths:  # units have gone, and nothing is gathered any more
            return flops
        for reader in find_readers(model, groups):
            weight: Any = model.get_submodule(reader.name).weight
            outputs = weight.numel() // reader.num_columns
            positions = sum(self.forward_flops.get(name, 0.0) for name in reader.layers) / (2 * weight.numel())
            flops += self.passes * reader.flops(positions / self.passes, outputs, self.num_forwards)
        return flops

    def release(self, state: Calibration) -> None:
        self.inner.release(state.inner)
        self._end(state)

    def _end(self, state: Calibration) -> None:
        state.gathering.remove()
        gathering, what = state.gathering, ""
        if gathering.alike:
            what = "samples of the first batches are all the same, so the first cut knows one input only"
        elif len(gathering.classes or ()) >= _ENOUGH_TARGETS:
            what = "targets of the first batches are all of one class, so the first cut knows this class only"
        if state.moments is None and what:
            warn(f"the {what}: the cut model may be far from the dense one on others. Shuffle the data")
        gathering.alike = gathering.classes = None


def _geometric_means(
    saliency: Mapping[str, Float64[np.ndarray, " _units"]], scores: Mapping[str, Float64[np.ndarray, " _units"]]
) -> dict[str, Float64[np.ndarray, " _units"]]:
    """`sqrt(saliency * score)`; the score of a unit without one is its saliency at the mean ratio of the others."""
    known = {name: np.isfinite(values) for name, values in scores.items()}
    both = [sum(float(of[n][known[n]].sum()) for n in known) for of in (scores, saliency)]
    ratio = both[0] / both[1] if both[1] > 0 else 1.0
    filled = {name: np.where(known[name], scores[name], ratio * saliency[name]) for name in scores}
    return {name: np.sqrt(np.maximum(values, 0.0) * saliency[name]) for name, values in filled.items()}
