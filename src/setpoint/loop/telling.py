"""Telling: who is called after each step, and lines for the log "setpoint" at INFO."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial

from setpoint.ledger import Entry, Ledger
from setpoint.loop.summary import Summary
from setpoint.messages import counted
from setpoint.spending.metrics import leading

LOG = logging.getLogger("setpoint")

News = Entry | Summary | None
"""What a callback is given: a decision, what the run came to, or nothing new."""


class Telling:
    """Callbacks; one may be added and taken off at any time."""

    def __init__(self) -> None:
        self._callbacks: dict[object, Callable[[News], None]] = {}

    def add(self, callback: Callable[[News], None]) -> Callable[[], object]:
        """Call this from now on; gives what takes it off again."""
        key = object()
        self._callbacks[key] = callback
        return partial(self._callbacks.pop, key, None)

    def tell(self, news: News) -> None:
        """Call all."""
        for callback in tuple(self._callbacks.values()):
            callback(news)

    def stepped(self, ledger: Ledger, step: int) -> None:
        """A step is done, and the decision made there is in the ledger."""
        self.tell(ledger[-1] if len(ledger) and ledger[-1].step == step else None)


def log(metrics: Callable[[], Mapping[str, float]], news: News) -> None:
    """Log a decision that changed the model or was the last one."""
    if not isinstance(news, Entry) or not LOG.isEnabledFor(logging.INFO):
        return
    known = metrics()
    resource = leading(known)
    ratio = known.get(f"cost_ratio/{resource}", 1.0)
    if news.changed:
        dropped = sum(map(len, news.dropped.values())) + sum(news.num_dropped.values())
        grown = sum(map(len, news.grown.values())) + sum(news.num_grown.values())
        parts = [f"{counted(dropped, 'unit')} dropped"] if dropped or not grown else []
        moved = ", ".join(parts + ([f"{counted(grown, 'unit')} brought back"] if grown else []))
        price = known.get(f"price/{resource}", 0.0)
        LOG.info("step %d: %s, %.1f %% of dense %s, price %.3g", news.step, moved, 100 * ratio, resource, price)
    if known["budget_met"]:
        what = "budget met" if f"limit/{resource}" in known else "done"
        units = f"{known['units']:,.0f} of {known['dense_units']:,.0f}"
        LOG.info("step %d: %s at %.1f %% of dense %s, %s units are left", news.step, what, 100 * ratio, resource, units)
