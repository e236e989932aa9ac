"""The scheduled controller: it lands within the limit and as near to it as blocks allow."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from controller.plants import chain, lognormal, residual, run
from setpoint.baselines.group_lasso import ReconfiguringController
from setpoint.baselines.scheduled import ScheduledController
from setpoint.cost.cost import Cost
from setpoint.groups.group import Group, widths_of

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


@pytest.mark.parametrize("plant", PLANTS.values(), ids=PLANTS.keys())
def test_no_block_of_the_whole_run_can_be_given_back(plant: Callable[[], tuple[tuple[Group, ...], Cost]]) -> None:
    """At any budget it ends within the limit, and no single block dropped at any step would still fit."""
    groups, cost = plant()
    for fraction in np.linspace(0.15, 0.95, 33).tolist():
        last = run(ScheduledController(), groups, cost, lognormal(groups), fraction=fraction, total_steps=400)[-1]
        limit = fraction * cost.total(widths_of(groups))
        assert last.plan.landed and last.predicted <= limit
        assert fitting(groups, last.groups, cost, limit) == []


def test_the_last_reconfiguration_lands() -> None:
    """PruneTrain's ramp leaves something for its last cut: a coarse block does not land it early."""
    groups, cost = PLANTS["image"]()
    saliency = {name: 1 + 1e-3 * values for name, values in lognormal(groups).items()}  # none of them is near zero
    for fraction in (0.25, 0.35, 0.5, 0.7):
        decisions = run(ReconfiguringController(), groups, cost, saliency, fraction=fraction, total_steps=400)
        assert [decision.plan.landed for decision in decisions] == [False] * 9 + [True]
