"""The record of a run: what its ledger, its log and the user's callbacks are told of each decision."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from torch.optim import Optimizer

from setpoint.actuator.actuator import Origins
from setpoint.controller.plan import Plan, Probe
from setpoint.groups.follow import Change
from setpoint.groups.group import Group
from setpoint.ledger import Entry
from setpoint.loop.summary import Summary
from setpoint.messages import counted
from setpoint.sensor.reading import Reading
from setpoint.spending.metrics import leading

Event = Entry | Summary | None
"""What a callback is given: a decision, the summary at the end, or None after a step without a decision."""

LOG = logging.getLogger("setpoint")


class Callbacks:
    """Functions that may be added and taken off at any time, also by one another."""

    def __init__(self) -> None:
        self._callbacks: dict[object, Callable[[Event], None]] = {}

    def add(self, callback: Callable[[Event], None]) -> Callable[[], object]:
        """Call this from now on; returns what takes it off again."""
        key = object()  # the same function may be added twice
        self._callbacks[key] = callback
        return partial(self._callbacks.pop, key, None)

    def notify(self, event: Event) -> None:
        for callback in tuple(self._callbacks.values()):
            callback(event)


def log_decision(entry: Entry, known: Mapping[str, float]) -> None:
    """Log a decision that changed the model or was the last one; `known` are the loop's metrics."""
    resource = leading(known)
    ratio = known.get(f"cost_ratio/{resource}", 1.0)
    if entry.changed:
        dropped = sum(map(len, entry.dropped.values())) + sum(entry.num_dropped.values())
        grown = sum(map(len, entry.grown.values())) + sum(entry.num_grown.values())
        parts = [f"{counted(dropped, 'unit')} dropped"] if dropped or not grown else []
        moved = ", ".join(parts + ([f"{counted(grown, 'unit')} brought back"] if grown else []))
        price = known.get(f"price/{resource}", 0.0)
        LOG.info("step %d: %s, %.1f %% of dense %s, price %.3g", entry.step, moved, 100 * ratio, resource, price)
    if known["budget_met"]:
        what = "budget met" if f"limit/{resource}" in known else "done"
        units = f"{known['units']:,.0f} of {known['dense_units']:,.0f}"
        LOG.info(
            "step %d: %s at %.1f %% of dense %s, %s units are left", entry.step, what, 100 * ratio, resource, units
        )


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


def recorded(entry: Entry, plan: Plan, change: Change, reading: Reading, origin: Origins, probe: Probe | None) -> Entry:
    """The entry with what was dropped and what came back, by origin; single weights are counted, not listed.

    `reading`, `probe` and `origin`, the dense index of each unit, are those from before the plan was carried out.
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
