"""Serving: the model in the runtime of a budget, timed in turns with the dense one; and its seconds as a fit."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping
from functools import partial

import torch
from torch import nn

from setpoint.cost.cost import ProductCost
from setpoint.groups.example import Example
from setpoint.groups.group import Group, on_grid, widths_of
from setpoint.groups.trace import trace
from setpoint.groups.untouched import copy_of, preserved_rng_state
from setpoint.loop.candidates import restricted
from setpoint.messages import progress, warn
from setpoint.resources.fit import by_kind, fit_seconds
from setpoint.resources.replica import device_type_of, replica, set_eval
from setpoint.resources.tape import odd_widths, record, spread_widths
from setpoint.runtimes.runtime import Forward, Runtime, in_turns, ratios, typical

_ROUNDS, _AGREE = 4, 0.05  # rounds of turns at most, and how near two have to be to each other
_COPIES, _FEWEST, _CALIBRATION_S = 12, 5, 20.0  # copies that are timed: fewer where they take longer
_GRID, _OFF_GRID = 16, 1.25  # what kernels that work in blocks like; how much slower odd widths are where they do


def answering(model: nn.Module) -> nn.Module:
    """A copy in eval mode without the user's hooks, for a runtime to keep."""
    copied = copy_of(model, users_hooks=False)
    set_eval(copied)
    return copied


def check_runtime(runtime: Runtime) -> None:
    """Refuse a runtime that does not work here, before any work: it loads the smallest model.

    Raises:
        RuntimeUnavailable: such as for a missing package; the message says what to install.
    """
    with progress(f"starting {runtime.name}"):
        runtime.load(nn.Linear(1, 1).eval(), (torch.zeros(1, 1),))


class Served:
    """Forwards of a model in a runtime, each in turn with one of the dense model.

    What counts is the ratio of the two: a machine that becomes slower, or is busy with something else, changes both.
    Seconds are that ratio times `dense_s`, the dense model's when the machine was quickest during calibration.
    """

    def __init__(self, model: nn.Module, example: Example, runtime: Runtime) -> None:
        self.runtime, self._example = runtime, example
        kind = device_type_of(model)
        self._autocast = partial(
            torch.autocast, kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind)
        )
        self._dense = self._loaded(answering(model), runtime)
        self.dense_s = math.inf

    def _loaded(self, model: nn.Module, runtime: Runtime) -> Forward:
        """The model in the runtime, under the autocast that was active when the dense one was loaded."""
        with preserved_rng_state(model), self._autocast():
            return runtime.load(model, self._example)

    def ratios(self, model: nn.Module, runtime: Runtime | None = None, *, calibrates: bool = False) -> list[float]:
        """Seconds of a forward over the dense model's, from two rounds of turns that agree; none if no two do.

        The model is nobody else's, and in eval mode. It may run in another runtime than the dense one.

        Raises:
            SetpointError: the runtime cannot run it.
        """
        forward, rounds = self._loaded(model, runtime or self.runtime), list[list[float]]()
        for _ in range(_ROUNDS):
            dense, own = in_turns([self._dense, forward])
            if calibrates:
                self.dense_s = min(self.dense_s, typical(dense))
            found = ratios(own, dense)
            for other in rounds:
                if found and abs(statistics.median(found) / statistics.median(other) - 1) <= _AGREE:
                    return found + other
            rounds += [found] if found else []
        return []


def serving(
    model: nn.Module, asked: Example, groups: tuple[Group, ...], runtime: Runtime
) -> tuple[Served, ProductCost, tuple[Group, ...]]:
    """The model where it is served, the fit of its seconds there, and the groups, on a grid where that is fast.

    Widths that lie off the grid are slow where kernels work in blocks: a copy of odd widths shows whether they do.
    """
    make = partial(replica, model, (), asked, groups, [], trains=False)
    own = restricted(trace(model, asked), groups)
    with progress(f"timing copies in {runtime.name}"):
        served, until = Served(model, asked, runtime), time.monotonic() + _CALIBRATION_S

        def read_at(widths: Mapping[str, int]) -> list[tuple[Mapping[str, int], float]]:
            with make(widths, data=True) as copy:
                found = served.ratios(copy.model, calibrates=True)
            return [(widths, statistics.median(found))] if found else []

        read: list[tuple[Mapping[str, int], float]] = [(widths_of(groups), 1.0)]
        for number, widths in enumerate(spread_widths(groups, _COPIES)):
            if number >= _FEWEST and time.monotonic() > until:
                break
            with progress(f"{number + 1} of at most {_COPIES}"):
                read += read_at(widths)
        odd = read_at(odd_widths(groups))
    if len(read) < _FEWEST:
        warn(
            f"the machine is busy: seconds in {runtime.name} do not repeat themselves. The budget is held by a fit to "
            f"{len(read) - 1} of {number + 1} copies: attach on a quiet machine"
        )
    parts = (*by_kind(model, own, forward=True), ProductCost("bytes", record(make, groups).storages))
    cost = fit_seconds("inference", parts, [(widths, served.dense_s * ratio) for widths, ratio in read])
    if any(served.dense_s * ratio / cost.total(widths) > _OFF_GRID for widths, ratio in odd):
        groups = on_grid(groups, _GRID)
    return served, cost, groups
