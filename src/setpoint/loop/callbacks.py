"""Callbacks: functions of the user's that are called after each step, and lines for the log "setpoint" at INFO."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial

from setpoint.ledger import Entry
from setpoint.loop.summary import Summary
from setpoint.messages import counted
from setpoint.spending.metrics import leading

LOG = logging.getLogger("setpoint")

Event = Entry | Summary | None
"""What a callback is given: a decision, the summary at the end, or None after a step without a decision."""


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
        """Call all."""
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
