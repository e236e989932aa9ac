"""A header: what a ledger says about the run before its first entry."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from setpoint.cost.budget import Budget
from setpoint.groups.group import Group


def header_of(
    groups: tuple[Group, ...],
    frozen: Mapping[str, str],
    dense: Mapping[str, float],
    budgets: Sequence[Budget],
    total_steps: int,
    model: nn.Module,
) -> dict[str, Any]:
    """What stands at the head of a ledger.

    Args:
        groups: at dense widths.
        frozen: by name or place, why it is left whole.
        dense: cost by resource.
        budgets: of the run.
        total_steps: announced at attach.
        model: whose devices are told.
    """
    return {
        "groups": {group.name: {"num_units": group.num_units, "what": group.what} for group in groups},
        "frozen": dict(frozen),
        "dense": dict(dense),
        "limit": {each.resource: each.absolute(dense[each.resource]) for each in budgets if each.per == "step"},
        "limit_run": {
            each.resource: each.absolute(dense[each.resource] * total_steps) for each in budgets if each.per == "run"
        },
        "total_steps": total_steps,
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "platform": platform.platform(),
            "threads": torch.get_num_threads(),
            "devices": sorted({str(parameter.device) for parameter in model.parameters()}),
        },
    }
