"""Sensing: what reads a model unless another sensor is given, what it reads before a step, and when that ends."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from torch import Tensor

from setpoint.groups.export import Example
from setpoint.groups.group import Group
from setpoint.loop.stride import sensed_every
from setpoint.loop.wrapper import Wrapped
from setpoint.sensor.chain import SensorChain
from setpoint.sensor.reading import Hooking, Sensor
from setpoint.sensor.taylor import TaylorSensor
from setpoint.states.hankel import HankelSensor
from setpoint.states.selective import SelectiveSensor

if TYPE_CHECKING:
    from setpoint.loop.loop import Loop


def default_sensor(wrapped: Wrapped, groups: tuple[Group, ...], example: Example, num_samples: int) -> Sensor[Any]:
    """Taylor for units; where there are states, Hankel for them, or averaged Gramians where layers are selective."""
    units = TaylorSensor(num_samples)
    for_states: tuple[Sensor[Any], ...] = (HankelSensor(num_samples), SelectiveSensor(example))
    needed = [sensor for sensor in for_states if wrapped.alone and sensor.readable(groups, wrapped.model)]
    return SensorChain(*needed, units) if needed else units


def over_ranks(sensor: Sensor[Any], wrapped: Wrapped) -> Sensor[Any]:
    """The sensor, told over which ranks gradients are averaged, where it can use that."""
    if wrapped.alone:
        return sensor
    if isinstance(sensor, SensorChain):
        return SensorChain(*(over_ranks(each, wrapped) for each in sensor.sensors))
    if not isinstance(sensor, TaylorSensor):
        return sensor
    told = copy.copy(sensor)
    told.ranks = wrapped.ranks
    return told


def averages_hooks(sensor: Sensor[Any]) -> bool:
    """Whether what the sensor reads by hooks can be averaged over ranks."""
    if isinstance(sensor, SensorChain):
        return all(averages_hooks(each) for each in sensor.sensors if isinstance(each, Hooking))
    return isinstance(sensor, TaylorSensor)


def reads_by_hooks(state: Any) -> bool:
    """Whether a sensor, by its state, reads frozen weights by hooks."""
    return bool(getattr(state, "tapped", ())) or any(reads_by_hooks(each.state) for each in getattr(state, "links", ()))


def sense(loop: Loop, grad_scale: Tensor | None) -> None:
    """Take in the step under way, if it is one of those that are read; after the landing none is.

    While a decision waits for a reading without NaN every step is read: one that is left out would hide the next NaN.

    Args:
        loop: whose sensor reads; the gradients of the step are ready.
        grad_scale: what they are still multiplied by, or None.
    """
    sensor, total_steps = loop._parts.sensor, loop._parts.total_steps
    if loop._landed or loop._step >= total_steps:
        release(loop)
        return
    if loop._step % sensed_every(total_steps) and not loop._overdue:
        if isinstance(sensor, Hooking):
            sensor.forget(loop._sensor_state)
        return
    with loop._account.sensing:
        loop._sensor_state = sensor.update(loop._sensor_state, loop._groups, loop._parts.model, grad_scale)
    loop._account.sensed(loop._sensing_flops)


def release(loop: Loop) -> None:
    """Take off the model what a sensor reads through."""
    if isinstance(loop._parts.sensor, Hooking):
        loop._parts.sensor.release(loop._sensor_state)
