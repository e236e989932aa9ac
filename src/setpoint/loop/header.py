"""A header: what a ledger says about the run before its first entry."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from setpoint.groups.group import Group


def header_of(
    groups: tuple[Group, ...],
    frozen: Mapping[str, str],
    spending: Mapping[str, Any],
    model: nn.Module,
) -> dict[str, Any]:
    """What stands at the head of a ledger.

    Args:
        groups: at dense widths.
        frozen: by name or place, why it is not pruned.
        spending: what the run is held to.
        model: whose devices are named.
    """
    return {
        "groups": {group.name: {"num_units": group.num_units, "what": group.what} for group in groups},
        "frozen": dict(frozen),
        **{name: spending[name] for name in ("dense", "limit", "limit_run", "total_steps")},
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "platform": platform.platform(),
            "threads": torch.get_num_threads(),
            "devices": sorted({str(parameter.device) for parameter in model.parameters()}),
        },
        **{name: spending[name] for name in ("modelled", "measured")},
    }
