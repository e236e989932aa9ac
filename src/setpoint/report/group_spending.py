"""A spending: bytes and seconds of one training step of a model on this machine, by group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import nn

from setpoint.controller.ladder import lowest_width
from setpoint.groups.export import Example
from setpoint.groups.group import Group, widths_of
from setpoint.groups.trace import trace
from setpoint.report.numbers import duration, human, percent
from setpoint.resources.costing import cost_out
from setpoint.resources.joules import find_energy_meter, idle_watts


@dataclass(frozen=True)
class GroupSpending:
    """Savings of a group that alone is cut to its fewest units; of bytes those of the peak, which may be elsewhere."""

    name: str
    seconds: float
    memory_bytes: float


@dataclass(frozen=True)
class Spending:
    """Costs of one training step, and of one inference, modelled from operations and storages.

    Args:
        error: median relative error of predicted seconds on copies of the model.
        groups: descending in seconds.
        idle_watts: measured power while this process rests; None without a meter of energy.
    """

    seconds: float
    memory_bytes: float
    inference_seconds: float
    least_seconds: float
    least_memory_bytes: float
    least_inference_seconds: float
    error: float
    sources: dict[str, str]
    groups: tuple[GroupSpending, ...]
    idle_watts: float | None
    energy: str


def spending(model: nn.Module, example: Example, groups: Sequence[str]) -> Spending:
    """Time and record a training step of a model with AdamW; `groups` names those that may be pruned.

    Raises:
        CostError: if the step cannot be recorded.
    """
    traced = trace(model, example)
    found: tuple[Group, ...] = tuple(group for group in traced.groups if group.name in set(groups))
    optimizer = torch.optim.AdamW(model.parameters())
    resources = {"latency", "memory", "inference"}
    costing = cost_out(model, (optimizer,), example, found, resources)
    latency, memory, inference = (costing.costs[name] for name in ("latency", "memory", "inference"))
    dense, least = widths_of(found), {group.name: lowest_width(group) for group in found}
    each = []
    for name in dense:
        saved = (cost.saving(dense, name, dense[name] - least[name]) for cost in (latency, memory))
        each.append(GroupSpending(name, *saved))
    meter, why = find_energy_meter([parameter.device for parameter in model.parameters()])
    return Spending(
        seconds=latency.total(dense),
        memory_bytes=memory.total(dense),
        inference_seconds=inference.total(dense),
        least_seconds=latency.total(least),
        least_memory_bytes=memory.total(least),
        least_inference_seconds=inference.total(least),
        error=costing.errors["latency"],
        sources=dict(costing.sources),
        groups=tuple(sorted(each, key=lambda one: -one.seconds)),
        idle_watts=idle_watts(meter) if meter is not None else None,
        energy=f"measured: {meter.source}" if meter is not None else f"not measured: {why}",
    )


def spending_lines(found: Spending) -> tuple[str, str]:
    """What a step and a pass spend, and what is known of energy."""
    idle = "" if found.idle_watts is None else f", {found.idle_watts:.3g} W at rest"
    return (
        f"one training step: {duration(found.seconds)} (at least {duration(found.least_seconds)}), "
        f"{human(found.memory_bytes, 'B')} at its peak (at least {human(found.least_memory_bytes, 'B')}); "
        f"one inference: {duration(found.inference_seconds)} (at least {duration(found.least_inference_seconds)}); "
        f"modelled, seconds of a step within {percent(found.error)} on copies",
        f"energy {found.energy}{idle}",
    )


def spending_table(found: Spending) -> Table:
    """The spending by group, for a terminal."""
    table = Table("group", "seconds that go with it", "of a step", "bytes", "of the peak")
    for group in found.groups:
        shares = percent(group.seconds / found.seconds), percent(group.memory_bytes / found.memory_bytes)
        table.add_row(group.name, duration(group.seconds), shares[0], human(group.memory_bytes, "B"), shares[1])
    return table
