"""Serving: the model in the runtime of a budget, timed in turns with the dense one; and its seconds as a fit."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from jaxtyping import Float64
from torch import nn

from setpoint.cost.cost import ProductCost
from setpoint.errors import RuntimeUnavailable
from setpoint.groups.example import Example
from setpoint.groups.group import Group, on_grid, widths_of
from setpoint.groups.trace import trace
from setpoint.groups.untouched import copy_of, preserved_rng_state
from setpoint.host.host import Host
from setpoint.interrupts import let_through
from setpoint.loop.candidates import restricted
from setpoint.messages import progress, warn
from setpoint.resources.fit import by_kind, fit_seconds
from setpoint.resources.replica import device_type_of, replica, set_eval
from setpoint.resources.tape import Make, beside_grid, record, spread_widths
from setpoint.runtimes.files import Opened
from setpoint.runtimes.runtime import ENOUGH_S, Forward, Runtime, in_turns, ratios, typical

_ROUNDS, _AGREE = 4, 0.05  # rounds of turns at most, and how near two have to be to each other
_COPIES, _FEWEST, _CALIBRATION_S = 12, 5, 20.0  # copies that are timed: fewer where they take longer
_ROUND_S, _FORETOLD = 0.15, 0.03  # seconds of a copy in a round; fewer copies, where the fit foretells them this well
GRID, _OFF_GRID = 16, 1.15  # what kernels that work in blocks like; how much slower one unit more is where they do


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
        self._used, self._warned = list[Runtime](), list[Runtime]()
        # A file that is opened again lies elsewhere in memory, and may be some per cent faster or slower.
        self._dense = [self._loaded(answering(model), runtime, calibrates=again) for again in (False, True)]
        self.dense_s = math.inf

    def _loaded(self, model: nn.Module, runtime: Runtime, *, calibrates: bool = False) -> Forward:
        """The model in the runtime, under the autocast that was active when the dense one was loaded.

        A file that does not give PyTorch's outputs is warned of once: of the dense model, which each runtime loads
        first, and of the one in training. Nobody serves a copy that calibrates.
        """
        with preserved_rng_state(model), self._autocast():
            forward = runtime.load(model, self._example)
        forward()  # the first one is slow, and is not counted
        known = runtime in self._warned or (calibrates and runtime in self._used)
        self._used.append(runtime)
        if isinstance(forward, Opened) and not known and (text := forward.too_far("the model")):
            self._warned.append(runtime)
            warn(f"{text}. Its seconds are taken all the same, but what is served there is not this model")
        return forward

    def ratios(
        self, model: nn.Module, runtime: Runtime | None = None, *, calibrates: bool = False, enough_s: float = ENOUGH_S
    ) -> list[float]:
        """Seconds of a forward over the dense model's, from two rounds of turns that agree; none if no two do.

        The model is nobody else's, and in eval mode. It may run in another runtime than the dense one.

        Raises:
            SetpointError: the runtime cannot run it.
        """
        load = partial(self._loaded, model, runtime or self.runtime)
        forwards, rounds = [load(calibrates=calibrates)], list[list[float]]()
        for number in range(_ROUNDS):
            if number == 1 and not calibrates:
                forwards.append(load(calibrates=True))
            dense, own = in_turns([self._dense[number % 2], forwards[number % len(forwards)]], enough_s)
            if calibrates:
                self.dense_s = min(self.dense_s, typical(dense))
            found = ratios(own, dense)
            for other in rounds:
                if found and abs(statistics.median(found) / statistics.median(other) - 1) <= _AGREE:
                    return found + other
            rounds += [found] if found else []
        return []


def serving(
    host: Host, asked: Example, groups: tuple[Group, ...], runtime: Runtime
) -> tuple[Served | None, ProductCost, tuple[Group, ...]]:
    """The model where it is served, the fit of its seconds there, and the groups, on a grid where that is fast.

    Where kernels work in blocks, widths off the grid are slow: two copies show whether one unit more costs much.
    Of several ranks the first alone loads the runtime and times; the others have no `Served`, and the same fit.
    """
    make = partial(replica, host.model, (), asked, groups, [], trains=False)
    own = restricted(trace(host.model, asked), groups)
    parts = (*by_kind(host.model, own, forward=True), ProductCost("bytes", record(make, groups).storages))
    fit = partial(fit_seconds, "inference", parts)
    served = Served(host.model, asked, runtime) if host.ranks.own == 0 else None

    def read(vectors: Sequence[Mapping[str, int]]) -> list[float]:
        own_s = np.full(len(vectors), -np.inf) if served is None else _calibrated(served, make, vectors, fit)
        return list(map(float, host.each(own_s).max(0)))

    half, odd = beside_grid(groups, GRID)
    if half != odd:
        _, half_s, odd_s = read([widths_of(groups), half, odd])
        groups = on_grid(groups, GRID) if odd_s > _OFF_GRID * half_s > 0 else groups
    vectors = [widths_of(groups), *spread_widths(groups, _COPIES)]
    seconds = [(widths, taken_s) for widths, taken_s in zip(vectors, read(vectors), strict=True) if taken_s > 0]
    if len(seconds) < 2:
        raise RuntimeUnavailable(
            f"seconds in {runtime.name} do not repeat themselves: no two readings of any copy agree. Attach on a quiet "
            "machine, or hold the model to a budget of 'flops' or 'params'"
        )
    if len(seconds) < _FEWEST and served is not None:
        warn(
            f"the machine is busy: seconds in {runtime.name} do not repeat themselves. The budget is held by a fit to "
            f"{len(seconds) - 1} of {_COPIES} copies: attach on a quiet machine"
        )
    return served, fit(seconds), groups


def _calibrated(
    served: Served, make: Make, vectors: Sequence[Mapping[str, int]], fit: Callable[..., ProductCost]
) -> Float64[np.ndarray, " n"]:
    """Seconds of a forward at each of these widths, of which the first are dense; -inf where none were read.

    Once the fit has foretold three copies in a row, it is good enough, and no further ones are timed.
    """
    ratios, until, foretold = np.full(len(vectors), -np.inf), time.monotonic() + _CALIBRATION_S, 0
    ratios[0] = 1.0
    with progress(f"timing copies in {served.runtime.name}"):
        for number, widths in enumerate(vectors[1:], 1):
            if number > _FEWEST and (foretold == 3 or time.monotonic() > until):
                break
            let_through()
            with progress(f"{number} of at most {len(vectors) - 1}"), make(widths, data=True) as copy:
                found = served.ratios(copy.model, calibrates=True, enough_s=_ROUND_S)
            if not found:
                continue
            ratios[number] = statistics.median(found)
            if number >= _FEWEST:
                fitted = fit([each for each in zip(vectors[:number], ratios, strict=False) if each[1] > 0])
                near = abs(fitted.total(widths) / ratios[number] - 1) <= _FORETOLD
                foretold = foretold + 1 if near else 0
    return served.dense_s * ratios
