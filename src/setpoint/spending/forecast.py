"""A forecast of widths: those to which a cut is likely to come down, before any gradient says what goes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from setpoint.controller.ladder import free_ladders
from setpoint.controller.selection import add_back, descend, start
from setpoint.controller.swap import swap, trade
from setpoint.cost.cost import Cost
from setpoint.groups.group import Group


def likely_widths(cost: Cost, groups: tuple[Group, ...], dense: Mapping[str, int], limit: float) -> dict[str, int]:
    """The widths at which a cut by worth meets a limit, if groups matter alike and saliencies rise evenly in each.

    Of a group of N units in the dense model the k-th least salient has the saliency k / N^2, so all groups sum to about
    one half, and those that are left after earlier cuts are the last ones. This tells where a budget finds its savings:
    in wide groups, and in those that cost much.

    Args:
        groups: at their present widths, which none exceeds afterwards; all that the cost follows.
        dense: units by group of the dense model.
    """
    saliency = {
        group.name: np.arange(dense[group.name] - group.num_units + 1, dense[group.name] + 1) / dense[group.name] ** 2
        for group in groups
    }
    ladders, widths = free_ladders(dense, groups, saliency, {}), {group.name: group.num_units for group in groups}
    selection = start(cost, ladders, widths, "worth")
    descend(selection, limit)
    if selection.total <= limit:
        add_back(selection, limit)
        swap(selection, limit, deadband=0.01)
        trade(selection, limit, deadband=0.01)
    return dict(selection.widths)
