"""The sensor chain: each group is read by the first sensor that can, so that states and units meet in one reading."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from setpoint.distributed import Ranks
from setpoint.groups.follow import of_groups
from setpoint.groups.group import Group
from setpoint.sensor.reading import Reading, Sensor, Traits


@dataclass(frozen=True, eq=False)
class Link:
    """One sensor of a chain at work, on the groups of these names."""

    sensor: Sensor[Any] = field(metadata={"live": True})
    names: frozenset[str] = field(metadata={"live": True})
    state: Any = field(metadata=of_groups("names"))

    def of(self, groups: tuple[Group, ...]) -> tuple[Group, ...]:
        return tuple(group for group in groups if group.name in self.names)


@dataclass(frozen=True, eq=False)
class ChainState:
    """The sensors that have groups to read."""

    links: tuple[Link, ...]


class SensorChain(Sensor[ChainState]):
    """Hands each group to the first sensor that can read it; their readings make one, calibrated if all are."""

    def __init__(self, *sensors: Sensor[Any]) -> None:
        self.sensors = sensors
        traits = [sensor.traits for sensor in sensors]
        self.traits = Traits(
            calibrated=all(part.calibrated for part in traits),
            in_loss=all(part.in_loss for part in traits),
            shards=all(part.shards for part in traits),
            hooks=any(part.hooks for part in traits),
            returns=all(part.returns for part in traits),
        )

    def over(self, ranks: Ranks) -> SensorChain:
        return SensorChain(*(sensor.over(ranks) for sensor in self.sensors))

    def _shares(self, groups: tuple[Group, ...], model: nn.Module) -> list[tuple[Sensor[Any], tuple[Group, ...]]]:
        shares = list[tuple[Sensor[Any], tuple[Group, ...]]]()
        for sensor in self.sensors:
            if found := sensor.readable(groups, model):
                shares.append((sensor, found))
                groups = tuple(group for group in groups if group not in found)
        return shares

    def readable(self, groups: tuple[Group, ...], model: nn.Module) -> tuple[Group, ...]:
        found = [group for _, share in self._shares(groups, model) for group in share]
        return tuple(group for group in groups if group in found)

    def init(self, groups: tuple[Group, ...], model: nn.Module) -> ChainState:
        links = (
            Link(sensor, frozenset(group.name for group in found), sensor.init(found, model))
            for sensor, found in self._shares(groups, model)
        )
        return ChainState(tuple(links))

    def update(
        self, state: ChainState, groups: tuple[Group, ...], model: nn.Module, grad_scale: Tensor | None = None
    ) -> ChainState:
        states = [link.sensor.update(link.state, link.of(groups), model, grad_scale) for link in state.links]
        return ChainState(tuple(replace(link, state=new) for link, new in zip(state.links, states, strict=True)))

    def flops(self, groups: tuple[Group, ...], model: nn.Module) -> float:
        return sum(sensor.flops(found, model) for sensor, found in self._shares(groups, model))

    def read(self, state: ChainState, groups: tuple[Group, ...], step: int) -> Reading:
        readings = [link.sensor.read(link.state, link.of(groups), step) for link in state.links]
        parts: dict[str, Any] = {
            part: {name: values for reading in readings for name, values in getattr(reading, part).items()}
            for part in ("saliency", "slope", "norm", "basis", "steps_seen")
        }
        in_loss = {reading.in_loss for reading in readings}
        return Reading(
            step,
            **parts,
            num_samples=max((reading.num_samples for reading in readings), default=1),
            # Losses and other calibrated values cannot be compared with each other.
            calibrated=all(reading.calibrated for reading in readings) and len(in_loss) < 2,
            in_loss=all(in_loss),
            num_steps=min((reading.num_steps for reading in readings), default=0),
            skipped_steps=max((reading.skipped_steps for reading in readings), default=0),
        )

    def forget(self, state: ChainState) -> None:
        for link in state.links:
            link.sensor.forget(link.state)

    def release(self, state: ChainState) -> None:
        for link in state.links:
            link.sensor.release(link.state)
