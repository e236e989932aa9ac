"""The record of a run: the head of its ledger, and what an entry says of a reading, a plan, and what was done."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from setpoint.actuator.actuator import Origins
from setpoint.controller.plan import Plan, Probe
from setpoint.groups.follow import Change
from setpoint.groups.group import Group
from setpoint.ledger import Entry
from setpoint.messages import counted
from setpoint.sensor.reading import Reading


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


def refusal(reading: Reading) -> str:
    """Why no decision can be made on a reading whose skipped steps count from the last one; "" if one can."""
    if steps := reading.skipped_steps:
        return f"no decision: NaN or infinite gradients in {counted(steps, 'step')} since the last reading"
    if not reading.finite():
        return "no decision: the reading holds NaN or infinite values"
    if reading.saliency and reading.unseen() >= reading.saliency.keys():
        return "no decision: no gradient has been seen yet"
    return ""


def waiting(groups: tuple[Group, ...], reading: Reading) -> tuple[tuple[Group, ...], str]:
    """The groups as a controller may cut them, those not at all of which nothing was seen yet; and a note about these.

    An empty reading is no reading of zero: weights that are frozen at first, or not reached by the loss, would be
    dropped before all others.
    """
    unseen = sorted(reading.unseen() & {group.name for group in groups})
    if not unseen:
        return groups, ""
    held = tuple(replace(group, min_units=group.num_units) if group.name in unseen else group for group in groups)
    few = ", ".join(unseen[:5]) + (f" and {len(unseen) - 5} more" if len(unseen) > 5 else "")
    return held, f"{few} {'wait' if len(unseen) > 1 else 'waits'}: none of the steps so far has shown a gradient there"


def decisions(plan: Plan) -> list[Any]:
    """All that a plan decides, in plain values of which the same ones look alike."""
    keep = [(name, np.flatnonzero(~kept).tolist()) for name, kept in sorted(plan.keep.items())]
    grow = [(name, units.tolist()) for name, units in sorted(plan.grow.items()) if len(units)]
    return [plan.step, plan.budget_met, keep, grow]


def recorded(entry: Entry, plan: Plan, change: Change, reading: Reading, origin: Origins, probe: Probe | None) -> Entry:
    """The entry with what was dropped and what came back, by origin, and what is known about it.

    Args:
        entry: the entry so far.
        plan: that was carried out.
        change: what that did; single weights are counted, not listed.
        reading: that the plan was made on.
        origin: by group, original index of each unit that was active before the plan.
        probe: that the plan was made on.
    """
    if change.note:
        entry = replace(entry, reason=f"{entry.reason}; {change.note}")
    if change.counted:
        return replace(entry, num_dropped=change.num_dropped, num_grown=change.num_grown)
    gone = {name: ~keep for name, keep in plan.keep.items() if not keep.all()}
    grown = {name: [int(unit) for unit in units] for name, units in plan.grow.items() if len(units)}
    gain: dict[str, list[float]] = {}
    for name, units in grown.items():
        if probe is not None and name in probe.gain:
            known = dict(zip(probe.origins[name].tolist(), probe.gain[name].tolist(), strict=True))
            gain[name] = [known.get(unit, np.nan) for unit in units]
    return replace(
        entry,
        dropped={name: [int(unit) for unit in origin[name][out]] for name, out in gone.items()},
        saliency={name: [float(value) for value in reading.saliency[name][out]] for name, out in gone.items()},
        worth={
            name: [float(value) for value in plan.worth[name][out]] for name, out in gone.items() if name in plan.worth
        },
        grown=grown,
        gain=gain,
        grown_worth={
            name: [float(value) for value in values] for name, values in plan.grow_worth.items() if name in grown
        },
    )


def highest_rate(optimizers: Iterable[Optimizer]) -> float | None:
    """The highest learning rate of all groups of parameters; None where no optimizer has one."""
    rates = [float(group["lr"]) for optimizer in optimizers for group in optimizer.param_groups if "lr" in group]
    return max(rates, default=None)
