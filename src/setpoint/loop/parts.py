"""Parts: what a loop is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim import Optimizer

from setpoint.controller.plan import Controller
from setpoint.cost.cost import Cost
from setpoint.cost.weights import WeightFlops
from setpoint.distributed import Ranks
from setpoint.groups.group import Group
from setpoint.groups.weights import Pattern
from setpoint.host.ddp import Averaging
from setpoint.host.fsdp import Sharding
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
        model: the model itself, without wrappers.
        optimizers: those that train it.
        copies: modules that are cut alike.
        groups: what may be pruned, at dense widths.
        target: what spending is held to.
        metering: reads what steps really take.
        costs: cost by resource, over the widths of `groups`; always "flops" and "params".
        controller: makes the plans.
        sensor: takes the readings.
        total_steps: optimizer steps of the run.
        header: the ledger's header.
        reserve_bytes: host memory for units that may come back, where the controller brings any back; None: no limit.
        ranks: the processes that train the model together.
        averaging: what averages their gradients, where there is any; it must follow every change of sizes.
        sharding: how the model is spread over them, where it is; it must be gathered for every change of sizes.
        sparsity: where units are single weights; None where whole units are cut.
        pass_flops: FLOPs of one forward pass of the inference that is metered, None where none is.
    """

    model: nn.Module
    optimizers: tuple[Optimizer, ...]
    copies: tuple[nn.Module, ...]
    groups: tuple[Group, ...]
    target: Target
    metering: Metering
    costs: Mapping[str, Cost]
    controller: Controller[Any]
    sensor: Sensor[Any]
    total_steps: int
    header: Mapping[str, Any]
    reserve_bytes: int | None = None
    ranks: Ranks = field(default_factory=Ranks)
    averaging: Averaging | None = None
    sharding: Sharding | None = None
    sparsity: Sparsity | None = None
    pass_flops: Cost | None = None
