"""Parts: what a loop is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from setpoint.controller.plan import Controller
from setpoint.cost.cost import Cost
from setpoint.cost.weights import WeightFlops
from setpoint.distributed import Ranks
from setpoint.groups.group import Group
from setpoint.groups.weights import Pattern
from setpoint.host.host import Host
from setpoint.loop.metering import Metering
from setpoint.loop.target import Target
from setpoint.sensor.reading import Sensor


@dataclass(frozen=True, eq=False)
class Sparsity:
    """What masks on single weights are held to.

    Args:
        pattern: that they keep to.
        flops: of the dense step, by weight tensor.
    """

    pattern: Pattern
    flops: WeightFlops


@dataclass(frozen=True, eq=False)
class Parts:
    """What a loop is made of.

    Args:
        host: how the model is held.
        groups: what may be pruned, at dense widths.
        target: what spending is held to.
        metering: reads what steps really take.
        costs: cost by resource, over the widths of `groups`; always "flops" and "params".
        controller: makes the plans.
        sensor: takes the readings.
        total_steps: optimizer steps of the run.
        header: the ledger's header.
        reserve_bytes: host memory for units that may come back, where the controller brings any back; None: no limit.
        sparsity: where units are single weights; None where whole units are cut.
        pass_flops: FLOPs of one forward pass of the inference that is metered, None where none is.
    """

    host: Host
    groups: tuple[Group, ...]
    target: Target
    metering: Metering
    costs: Mapping[str, Cost]
    controller: Controller[Any]
    sensor: Sensor[Any]
    total_steps: int
    header: Mapping[str, Any]
    reserve_bytes: int | None = None
    sparsity: Sparsity | None = None
    pass_flops: Cost | None = None

    @property
    def model(self) -> nn.Module:
        """The model itself, without wrappers."""
        return self.host.model

    @property
    def optimizers(self) -> tuple[Optimizer, ...]:
        """Those that train it."""
        return self.host.optimizers

    @property
    def copies(self) -> tuple[nn.Module, ...]:
        """Modules that are cut alike."""
        return self.host.copies

    @property
    def ranks(self) -> Ranks:
        """The processes that train the model together."""
        return self.host.ranks
