"""Where a run is, as one value, and what its ledger and log say of each decision."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from setpoint.actuator.actuator import Origins
from setpoint.checkpoint.plain import plain, restored
from setpoint.controller.plan import Observation, Plan
from setpoint.groups.follow import ByUnit, Change, follow, fresh
from setpoint.groups.group import Group
from setpoint.ledger import Entry
from setpoint.messages import counted
from setpoint.sensor.reading import Reading
from setpoint.spending.metrics import leading

LOG = logging.getLogger("setpoint")


@dataclass(frozen=True, eq=False)
class RunState:
    """Where a run is; every step and every decision makes a new one, and a checkpoint holds it.

    Args:
        step: optimizer steps done.
        skipped: steps that the sensor had left out by the last reading.
        again: a step at which to decide in addition to those of the controller; 0 for none.
        overdue: a decision is due and could not be made.
        budget_met: the last decision has been made.
        plan: the last one, without what it says of single units.
        saliency: in that reading, of the units that are active now.
        worth: at the last decision, likewise.
        gave_way: which goal lost when budget and loss could not both be met; "" if none did.
    """

    step: int = 0
    skipped: int = 0
    again: int = 0
    overdue: bool = False
    budget_met: bool = False
    plan: Plan | None = None
    saliency: Mapping[str, ByUnit[np.ndarray]] = field(default_factory=dict, metadata=fresh(math.nan))
    worth: Mapping[str, ByUnit[np.ndarray]] = field(default_factory=dict, metadata=fresh(math.nan))
    gave_way: str = ""

    def decided(self, plan: Plan, reading: Reading, change: Change) -> RunState:
        seen = self if change.counted else replace(self, saliency=reading.saliency, worth=plan.worth)
        return replace(
            follow(seen, change),
            plan=replace(plan, keep={}, worth={}, grow={}, grow_worth={}),
            budget_met=plan.budget_met,
            overdue=False,
            again=plan.again or self.again,
            gave_way=plan.gave_way or self.gave_way,
        )

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = plain(self, "the run's progress")
        return state

    @classmethod
    def of(cls, state: Mapping[str, Any], widths: Mapping[str, int]) -> RunState:
        """What `state_dict` was taken of, at these widths."""
        by_unit = {name: np.zeros(width) for name, width in widths.items()}
        like = cls(plan=None if state["plan"] is None else Plan(0, {}), saliency=by_unit, worth=by_unit)
        found: RunState = restored(state, like, "the run's progress", torch.device("cpu"))
        return found


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

    No gradient seen does not mean a saliency of zero: weights that are frozen at first, or not reached by the loss,
    would be dropped before all others.
    """
    unseen = sorted(reading.unseen() & {group.name for group in groups})
    if not unseen:
        return groups, ""
    held = tuple(replace(group, min_units=group.num_units) if group.name in unseen else group for group in groups)
    few = ", ".join(unseen[:5]) + (f" and {len(unseen) - 5} more" if len(unseen) > 5 else "")
    return held, f"{few} {'wait' if len(unseen) > 1 else 'waits'}: none of the steps so far has shown a gradient there"


def decisions(plan: Plan) -> list[Any]:
    """All that a plan decides, in plain values that ranks can compare."""
    keep = [(name, np.flatnonzero(~kept).tolist()) for name, kept in sorted(plan.keep.items())]
    grow = [(name, units.tolist()) for name, units in sorted(plan.grow.items()) if len(units)]
    return [plan.step, plan.budget_met, keep, grow]


def recorded(entry: Entry, plan: Plan, change: Change, seen: Observation, origin: Origins) -> Entry:
    """The entry with what was dropped and what came back, by origin; single weights are counted, not listed.

    `seen` and `origin`, the dense index of each unit, are those from before the plan was carried out.
    """
    if change.note:
        entry = replace(entry, reason=f"{entry.reason}; {change.note}")
    if change.counted:
        return replace(entry, num_dropped=change.num_dropped, num_grown=change.num_grown)
    gone = {name: ~keep for name, keep in plan.keep.items() if not keep.all()}
    grown = {name: units.tolist() for name, units in plan.grow.items() if len(units)}
    gain: dict[str, list[float]] = {}
    reading, probe = seen.reading, seen.probe
    for name, units in grown.items():
        if probe is not None and name in probe.gain:
            known = dict(zip(probe.origins[name].tolist(), probe.gain[name].tolist(), strict=True))
            gain[name] = [known.get(unit, math.nan) for unit in units]
    return replace(
        entry,
        dropped={name: origin[name][out].tolist() for name, out in gone.items()},
        saliency={name: reading.saliency[name][out].tolist() for name, out in gone.items() if reading},
        worth={name: plan.worth[name][out].tolist() for name, out in gone.items() if name in plan.worth},
        grown=grown,
        gain=gain,
        grown_worth={name: values.tolist() for name, values in plan.grow_worth.items() if name in grown},
    )


def log_decision(entry: Entry, known: Mapping[str, float]) -> None:
    """Log a decision that changed the model or was the last one; `known` are the loop's metrics."""
    resource = leading(known)
    ratio = 100 * known.get(f"cost_ratio/{resource}", 1.0)
    if entry.changed:
        dropped = sum(map(len, entry.dropped.values())) + sum(entry.num_dropped.values())
        grown = sum(map(len, entry.grown.values())) + sum(entry.num_grown.values())
        parts = [f"{counted(dropped, 'unit')} dropped"] if dropped or not grown else []
        moved = ", ".join(parts + ([f"{counted(grown, 'unit')} brought back"] if grown else []))
        price = known.get(f"price/{resource}", 0.0)
        LOG.info("step %d: %s, %.1f %% of dense %s, price %.3g", entry.step, moved, ratio, resource, price)
    if known["budget_met"]:
        what = "budget met" if f"limit/{resource}" in known else "done"
        units = f"{known['units']:,.0f} of {known['dense_units']:,.0f}"
        LOG.info("step %d: %s at %.1f %% of dense %s, %s units are left", entry.step, what, ratio, resource, units)
