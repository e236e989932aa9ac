"""Open loops with even cuts: they land within the limit and as near to it as blocks allow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from controller.plants import chain, lognormal, residual, run
from setpoint.controller.plan import Controller
from setpoint.cost.cost import Cost
from setpoint.groups.group import Group, widths_of
from setpoint_bench.baselines.scheduled import ScheduledController

PLANTS = {
    "image": lambda: chain(32, 64, 64, 128, 128, 256, multiple_of=8, coefficients=(256.0, 256.0, 64, 64, 16, 16, 0.1)),
    "chain": lambda: chain(32, 64, 48, multiple_of=8),
    "odd widths": lambda: chain(21, 35, 50, multiple_of=8),
    "stream": lambda: residual(64, (32, 64, 128), multiple_of=16),
}


def fitting(dense: tuple[Group, ...], groups: tuple[Group, ...], cost: Cost, limit: float) -> list[str]:
    """Groups of which one block of all that was dropped in the run could come back within the limit."""
    widths, before = widths_of(groups), widths_of(dense)
    wider = {
        group.name: {**widths, group.name: min(before[group.name], widths[group.name] + group.multiple_of)}
        for group in groups
    }
    return [name for name, each in wider.items() if each != widths and cost.total(each) <= limit]


@pytest.mark.parametrize("controller", [ScheduledController()], ids=["cubic"])
@pytest.mark.parametrize("plant", PLANTS.values(), ids=PLANTS.keys())
def test_no_block_of_the_whole_run_can_be_given_back(
    controller: Controller[Any], plant: Callable[[], tuple[tuple[Group, ...], Cost]]
) -> None:
    """At any budget it ends within the limit, and no single block dropped at any step would still fit."""
    groups, cost = plant()
    saliency = {name: 1 + 1e-3 * values for name, values in lognormal(groups).items()}  # none of them is near zero
    for fraction in np.linspace(0.15, 0.95, 12).tolist():
        last = run(controller, groups, cost, saliency, fraction=fraction, total_steps=400)[-1]
        limit = fraction * cost.total(widths_of(groups))
        assert last.plan.budget_met and last.predicted <= limit
        assert fitting(groups, last.groups, cost, limit) == []
