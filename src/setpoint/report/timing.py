"""Timing: what a model and cut ones take in a runtime, as floats and in int8, in turns with the dense model."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from setpoint.controller.selection import landing_widths
from setpoint.cost.cost import flops_cost
from setpoint.errors import GroupError, SetpointError
from setpoint.groups.example import Example, inputs_of, shapes_of, without_cache
from setpoint.groups.group import on_grid, widths_of
from setpoint.groups.trace import trace
from setpoint.loop.candidates import restricted
from setpoint.messages import counted, progress
from setpoint.report.numbers import NOTHING, duration, percent
from setpoint.resources.replica import replica
from setpoint.resources.serving import GRID, Served, answering
from setpoint.runtimes import as_runtime
from setpoint.runtimes.runtime import Runtime

SHARES = (0.75, 0.5, 0.4, 0.25)
"""Of the dense FLOPs, that copies are cut to."""

Model = Callable[[], AbstractContextManager[nn.Module]]  # gives a copy in eval mode, which nobody else has


@dataclass(frozen=True)
class Reading:
    """Seconds of one forward.

    Args:
        seconds: `share` times those of the dense model when the machine was quickest.
        share: of the dense model's seconds as floats, the median over the turns.
        spread: half of the distance between the quartiles of the turns, over their median.
    """

    seconds: float
    share: float
    spread: float


@dataclass(frozen=True)
class Timed:
    """A model of a timing.

    Args:
        name: in words.
        flops: share of the dense FLOPs.
        floats: in the runtime as it is; None where no two readings agreed.
        int8: where the runtime quantises first; None also where it does not.
    """

    name: str
    flops: float
    floats: Reading | None
    int8: Reading | None


@dataclass(frozen=True)
class Timing:
    """The dense model and cut ones in a runtime; printed, a table of what each takes.

    Args:
        runtime: its name.
        threads: of one forward; None where the runtime has no such setting.
        inputs: shapes of the inputs of the forward.
        models: the dense one first.
        without_int8: why there is no int8; empty where there is, or where the runtime has none.
    """

    runtime: str
    threads: int | None
    inputs: tuple[tuple[int, ...], ...]
    models: tuple[Timed, ...]
    without_int8: str = ""

    def __str__(self) -> str:
        return "\n".join((self.header, *self.table(), *self.notes()))

    @property
    def header(self) -> str:
        threads = "" if self.threads is None else f", {counted(self.threads, 'thread')}"
        return f"{self.runtime}{threads}, inputs {', '.join('x'.join(map(str, shape)) for shape in self.inputs)}"

    def line(self) -> tuple[float, float] | None:
        """Constant and slope of the shares of the dense seconds by those of the FLOPs; None of fewer than three."""
        read = [(model.flops, model.floats.share) for model in self.models if model.floats is not None]
        if len(read) < 3:
            return None
        flops, shares = np.array(read).T
        slope, constant = np.polyfit(flops, shares, 1)
        if constant < 0:  # of noise
            constant, slope = 0.0, flops @ shares / (flops @ flops)
        return float(constant), float(slope)

    def notes(self) -> Iterator[str]:
        """What the table says of budgets, by the line."""
        line, dense = self.line(), self.models[0].floats
        if line is not None and dense is not None:
            constant, slope = line
            yield f"constant part: {percent(constant)} of the dense time stays at any width"
            half = constant + slope / 2
            yield f'"50% flops" gives about {duration(half * dense.seconds)}, {percent(half)} of the dense time'
            flops, least = (0.5 - constant) / slope if slope > 0 else 0.0, min(model.flops for model in self.models)
            needs = f"about {percent(flops)}" if flops >= least else f"less than {percent(least)}"
            yield f"half of the dense time takes {needs} of the FLOPs"
        if any(model.floats is None for model in self.models):
            yield f"{NOTHING}: the machine is busy, no two readings agree; try again on a quiet one"
        if self.without_int8:
            yield f"no int8: {self.without_int8}"

    def table(self) -> tuple[str, ...]:
        """One line for the names of the columns, and one for each model."""
        names = ["", "FLOPs", "one forward", "of dense", "spread"]
        has_int8 = any(model.int8 is not None for model in self.models)
        names += ["int8", "of dense", "spread"] if has_int8 else []
        cells = [names]
        for model in self.models:
            cells.append([model.name, percent(model.flops), *_cells(model.floats)])
            cells[-1] += _cells(model.int8) if has_int8 else []
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return tuple(
            "  ".join((row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:]))).rstrip() for row in cells
        )


def _cells(reading: Reading | None) -> list[str]:
    if reading is None:
        return [NOTHING] * 3
    spread = percent(reading.spread) if reading.spread else NOTHING
    return [duration(reading.seconds), percent(reading.share), spread]


def time_cuts(
    model: nn.Module, example: Example, runtime: Any = "onnxruntime", *, shares: Sequence[float] = SHARES
) -> Timing:
    """Time a model in a runtime in turns with copies that are cut evenly, before any training.

    What a forward takes depends on widths, and hardly on weights: so a copy shows what a trained model of its widths
    will take. Where the runtime has int8, the dense model and the copies are also quantised and timed. The model stays
    as it is.

    Args:
        model: to time; on the device where it is.
        example: a tuple of positional inputs or a mapping of keyword inputs, as they will be served.
        runtime: one of `setpoint.runtimes`, its name, or a function `(model, example) -> seconds`.
        shares: of the dense FLOPs, that copies are cut to; those that the model does not reach are left out.

    Raises:
        BudgetError: for a runtime that is none.
        ExampleError: the model does not run on the example.
        ExportError: the model cannot be exported to the runtime.
        GroupError: nothing of the model can be cut.
        RuntimeUnavailable: a package is missing, or the runtime cannot run the model.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 16))
    >>> [round(timed.flops, 2) for timed in time_cuts(net, (torch.ones(1, 16),), "eager").models]
    [1.0, 0.75, 0.5, 0.38, 0.25]
    """
    runtime, example = as_runtime(runtime), without_cache(model, example)
    with progress("looking for what can be cut"):
        found = trace(model, example)
    # In whole blocks of the grid, as a budget of seconds cuts: a width that ends in a part of one may be slow.
    groups = on_grid([replace(group, usual_block=0) for group in found.groups if group.lossless], GRID)
    if not groups:
        raise GroupError("nothing of the model can be cut: `setpoint inspect` says why")
    flops, dense = flops_cost(restricted(found, groups)), widths_of(groups)
    whole, copies = flops.total(dense), list[tuple[str, float, Model]]()
    for share in sorted(shares, reverse=True):
        widths = landing_widths(flops, dense, dense, groups, share * whole)
        reached = flops.total(widths) / whole
        if reached <= share and reached < min((other for _, other, _ in copies), default=1.0):
            make = partial(replica, model, (), example, groups, [], widths, data=True, trains=False)
            copies.append(("cut", reached, partial(_copy, make)))
    return timing(runtime, model, example, copies)


def time_cut(dense: nn.Module, cut: nn.Module | None, example: Example, runtime: Any = "onnxruntime") -> Timing:
    """Time a cut model in turns with the dense one, or the dense one alone; as floats and in int8.

    Raises:
        SetpointError: as `time_cuts`.
    """
    runtime, example = as_runtime(runtime), without_cache(dense, example)
    if cut is None:
        return timing(runtime, dense, example, [])
    traces = [trace(model, example) for model in (dense, cut)]
    whole, part = (flops_cost(found).total(widths_of(found.groups)) for found in traces)
    return timing(runtime, dense, example, [("cut", part / whole, lambda: nullcontext(answering(cut)))])


@contextmanager
def _copy(make: Callable[[], AbstractContextManager[Any]]) -> Iterator[nn.Module]:
    with make() as made:
        yield made.model


def timing(runtime: Runtime, dense: nn.Module, example: Example, others: Sequence[tuple[str, float, Model]]) -> Timing:
    """Time models in a runtime, each in turns with the dense one; with their names and their shares of its FLOPs."""
    models: list[tuple[str, float, Model]] = [("dense", 1.0, lambda: nullcontext(answering(dense))), *others]
    int8, without = _int8_of(runtime), ""
    floats: list[list[float]] = [[1.0]]
    quantised: list[list[float]] = []
    with progress(f"timing in {runtime.name}"):
        with progress("loading the dense model"):
            served = Served(dense, example, runtime)
        if not others:  # no turn would read the dense model
            served.ratios(answering(dense), calibrates=True)
        for name, share, copy in others:
            with progress(f"{name} to {percent(share)} of the FLOPs"), copy() as made:
                floats.append(served.ratios(made, calibrates=True))
        try:
            for name, share, copy in models if int8 is not None else ():
                with progress(f"int8, {name}, {percent(share)} of the FLOPs"), copy() as made:
                    quantised.append(served.ratios(made, int8, calibrates=True))
        except SetpointError as error:
            without, quantised = str(error), []
    read = [_reading(turns, served.dense_s) for turns in floats]
    other = [_reading(turns, served.dense_s) for turns in quantised] or [None] * len(models)
    args, kwargs = inputs_of(example)
    return Timing(
        runtime.name,
        getattr(runtime, "threads", None),
        tuple(map(tuple, shapes_of([*args, *kwargs.values()]))),
        tuple(Timed(name, share, *pair) for (name, share, _), *pair in zip(models, read, other, strict=True)),
        without,
    )


def _reading(turns: Sequence[float], dense_s: float) -> Reading | None:
    if not turns or dense_s == float("inf"):
        return None
    low, middle, high = statistics.quantiles(turns, n=4, method="inclusive") if len(turns) > 1 else 3 * [turns[0]]
    return Reading(middle * dense_s, middle, (high - low) / 2 / middle)


def _int8_of(runtime: Any) -> Runtime | None:
    """The runtime that quantises first; None where it has no such setting, or quantises anyway."""
    has = is_dataclass(runtime) and "int8" in [field.name for field in fields(runtime)]
    return replace(runtime, int8=True) if has and not runtime.int8 else None
