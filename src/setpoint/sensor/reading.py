"""A reading: what each unit contributes to the loss, as estimated by a sensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float64

from setpoint.distributed import Ranks
from setpoint.groups.follow import ByUnit, fresh
from setpoint.groups.group import Group


@dataclass(frozen=True, eq=False)
class Reading:
    """Saliency of every unit at one step.

    Args:
        step: optimizer step at which the reading was taken.
        saliency: by group name, estimated loss increase if the unit is dropped, >= 0; in nats (or whatever unit the
            loss has) when `calibrated`.
        num_samples: independent samples behind each step's gradient.
        calibrated: False when the values rank units within one group only.
        in_loss: False when they are calibrated, but not in the unit of the loss.
        num_steps: how many optimizer steps went into the reading.
        skipped_steps: steps left out because a gradient was NaN or infinite: a sensor's since `init`, those of an
            `Observation` since the last reading.
        steps_seen: by group name, in how many steps it was seen, if known; with 0 its saliencies mean nothing.
        slope: by group name, mean of the gate's gradient r over the steps, where the sensor reads it.
        norm: by group name, L2 norm of the unit's outgoing weights, where the sensor knows it.
        basis: by group name, the balanced coordinates of its units (`BalancedPairs`); the actuator turns to them first.
        moments: second moments of what layers are given that read units, by layer; None where none are
            gathered. The actuator refits these layers with them.
        scores: where units are single weights, gives by tensor name the saliency of every element.
    """

    step: int
    saliency: Mapping[str, ByUnit[Float64[np.ndarray, " units"]]] = field(metadata=fresh(math.nan))
    num_samples: int
    calibrated: bool = True
    in_loss: bool = True
    num_steps: int = 0
    skipped_steps: int = 0
    steps_seen: Mapping[str, int] = field(default_factory=dict)
    slope: Mapping[str, Float64[np.ndarray, " _units"]] = field(default_factory=dict)
    norm: Mapping[str, Float64[np.ndarray, " _units"]] = field(default_factory=dict)
    basis: Mapping[str, Any] = field(default_factory=dict)
    moments: Mapping[str, Any] | None = None
    scores: Callable[[], Mapping[str, torch.Tensor]] = dict

    def finite(self) -> bool:
        """Whether every value is a finite number; a controller makes no decision on any other."""
        return all(bool(np.isfinite(values).all()) for values in self.saliency.values())

    def unseen(self) -> frozenset[str]:
        """Names of the groups of which no step has shown anything: they are not worthless, they are unknown."""
        return frozenset(name for name, steps in self.steps_seen.items() if not steps)


State = TypeVar("State")

_DENSELY_SENSED = 100  # steps of a run whose every step is worth a reading
_LONGEST_STRIDE = 4  # steps from one sensed step to the next


@dataclass(frozen=True)
class Traits:
    """What a sensor can read, and what its readings are.

    Args:
        calibrated: False where saliencies rank the units of one group only.
        in_loss: False where they are not in the unit of the loss, so that no `Price` can be set against them.
        shards: whether it adds up what each rank holds of a sharded weight.
        hooks: whether it reads frozen weights through hooks on their layers, which compiled code does not run.
        returns: whether it reads units that were dropped and came back.
    """

    calibrated: bool = True
    in_loss: bool = True
    shards: bool = False
    hooks: bool = False
    returns: bool = True


UNCALIBRATED = Traits(calibrated=False, in_loss=False, shards=True)  # of a sensor that ranks the units of a group


@runtime_checkable
class Sensor(Protocol[State]):
    """Estimates saliency from what an ordinary training step leaves behind.

    A sensor of your own derives from this class, whose methods do nothing where few sensors need them, or has them all.
    Where it is a mean over steps of something measured by unit, a criterion is enough (`setpoint.sensor.taylor`).

    A sensor holds settings only; what it remembers is its state: a dataclass of tensors, arrays and numbers, which
    `Loop.state_dict` stores. What has an entry for each unit is annotated `ByUnit[...]`, so that `follow` cuts and
    grows it as the units are; a field that points at the model is marked by `field(metadata={"live": True})`.
    """

    traits: Traits = Traits()

    def readable(self, groups: tuple[Group, ...], model: torch.nn.Module) -> tuple[Group, ...]:
        """The groups whose saliency it can tell; the others are left alone."""
        return groups

    def init(self, groups: tuple[Group, ...], model: torch.nn.Module) -> State:
        """State before the first step."""
        ...

    def update(
        self, state: State, groups: tuple[Group, ...], model: torch.nn.Module, grad_scale: torch.Tensor | None = None
    ) -> State:
        """Take in one optimizer step (gradients are ready, weights not yet moved). No host sync.

        `grad_scale` is what the gradients are still multiplied by (0-dim; NaN: leave the step out), or None.
        """
        ...

    def read(self, state: State, groups: tuple[Group, ...], step: int) -> Reading:
        """Reading of all units; the only place where values come to the host."""
        ...

    def flops(self, groups: tuple[Group, ...], model: torch.nn.Module) -> float:
        """FLOPs of one `update`, so that they can be counted as overhead."""
        return 0.0

    def over(self, ranks: Ranks) -> Sensor[State]:
        """The sensor where gradients are averaged over these ranks."""
        return self

    def forget(self, state: State) -> None:
        """A step passes that is not taken in: what hooks have seen of it does not count."""
        return None

    def release(self, state: State) -> None:
        """Take hooks off the model; nothing is read any more."""
        return None


def sensed_every(total_steps: int) -> int:
    """Every how many optimizer steps the sensor is updated: `sqrt(total_steps / 100)`, rounded down to a power of 2.

    So a longer run has more readings for each decision, and a smaller share of sensed steps.
    """
    stride = 1
    while stride < _LONGEST_STRIDE and total_steps >= _DENSELY_SENSED * (2 * stride) ** 2:
        stride *= 2
    return stride
