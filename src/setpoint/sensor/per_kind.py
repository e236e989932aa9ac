"""The sensor for models whose groups are of several kinds: each kind is read by a sensor of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool
from torch import Tensor, nn

from setpoint.groups.group import Group, Kind
from setpoint.sensor.reading import Reading, Sensor


@dataclass(frozen=True, eq=False)
class PerKindState:
    """The state of each sensor."""

    parts: Mapping[Kind, Any]


class PerKindSensor:
    """Hands every group to the sensor of its kind, and puts their readings together.

    The whole is calibrated if every part is.

    Args:
        sensors: by kind of group; groups of other kinds are not readable.

    Raises:
        ValueError: when there is no sensor.

    >>> from setpoint import HankelSensor, TaylorSensor
    >>> sensor = PerKindSensor({"unit": TaylorSensor(num_samples=32), "state": HankelSensor(num_samples=32)})
    """

    def __init__(self, sensors: Mapping[Kind, Sensor[Any]]) -> None:
        if not sensors:
            raise ValueError("sensors must name a sensor for at least one kind of group")
        self.sensors = dict(sensors)

    def readable(self, groups: tuple[Group, ...], model: nn.Module) -> tuple[Group, ...]:
        """The groups that the sensor of their kind can read, in their order."""
        names = {
            group.name for kind, sensor in self.sensors.items() for group in sensor.readable(_of(kind, groups), model)
        }
        return tuple(group for group in groups if group.name in names)

    def init(self, groups: tuple[Group, ...], model: nn.Module) -> PerKindState:
        """States before the first step."""
        return PerKindState({kind: each.init(_of(kind, groups), model) for kind, each in self.sensors.items()})

    def update(
        self, state: PerKindState, groups: tuple[Group, ...], model: nn.Module, grad_scale: Tensor | None = None
    ) -> PerKindState:
        """Take in one optimizer step."""
        return PerKindState(
            {
                kind: each.update(state.parts[kind], _of(kind, groups), model, grad_scale)
                for kind, each in self.sensors.items()
            }
        )

    def flops(self, groups: tuple[Group, ...], model: nn.Module) -> float:
        """FLOPs of one update, all sensors together."""
        return sum(each.flops(_of(kind, groups), model) for kind, each in self.sensors.items())

    def read(self, state: PerKindState, groups: tuple[Group, ...], step: int) -> Reading:
        """One reading of all groups."""
        readings = [each.read(state.parts[kind], _of(kind, groups), step) for kind, each in self.sensors.items()]
        return Reading(
            step=step,
            saliency={name: values for each in readings for name, values in each.saliency.items()},
            num_samples=max(each.num_samples for each in readings),
            calibrated=all(each.calibrated for each in readings),
            num_steps=min(each.num_steps for each in readings),
            skipped_steps=max(each.skipped_steps for each in readings),
            basis={name: basis for each in readings for name, basis in each.basis.items()},
        )

    def cut(self, state: PerKindState, keep: Mapping[str, Bool[np.ndarray, " units"]]) -> PerKindState:
        """States of the kept units."""
        return PerKindState({kind: each.cut(state.parts[kind], keep) for kind, each in self.sensors.items()})


def _of(kind: Kind, groups: tuple[Group, ...]) -> tuple[Group, ...]:
    return tuple(group for group in groups if group.kind == kind)
