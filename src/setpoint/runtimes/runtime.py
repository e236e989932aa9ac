"""A runtime: anything that says how many seconds one forward of a model takes; and readings of several, in turns."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from setpoint.errors import RuntimeUnavailable
from setpoint.groups.example import Example, inputs_of

Forward = Callable[[], float]  # makes one forward of a model on its example, and returns the seconds that it took

ENOUGH_S = 0.3  # of one model in a round
_LEAST, _MOST, _LONG_S = 7, 60, 1.0


@runtime_checkable
class Runtime(Protocol):
    """Where a model is served: it loads a model once, and then times one forward after the other."""

    @property
    def name(self) -> str:
        """As a budget names it: "onnxruntime" in "8 ms onnxruntime"."""

    def load(self, model: nn.Module, example: Example) -> Forward:
        """Make a model ready to answer on the example.

        The model is in eval mode, and is nobody else's: it may be changed, or kept. The runtime leaves its seconds to
        the clock that fits: wall-clock seconds, or those of the calling thread where all the work is done on it.

        Raises:
            RuntimeUnavailable: a package is missing, or the model cannot be run there; the message says what to do.
        """


@dataclass(frozen=True)
class Eager:
    """PyTorch itself, operation by operation, on the model's device; under the autocast that is active at loading.

    Where PyTorch has one thread (`torch.set_num_threads(1)`), seconds on the CPU are those of that thread.
    Nobody serves it: it spends much of a small model's time on calling operations, which other runtimes do not.
    """

    name = "eager"

    def load(self, model: nn.Module, example: Example) -> Forward:
        args, kwargs = inputs_of(example)
        kind = next((parameter.device.type for parameter in model.parameters()), "cpu")
        active = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if active else None

        def forward() -> float:
            # Without a cache: weights that autocast keeps from here would have no gradient in a step of training.
            with torch.no_grad(), torch.autocast(kind, dtype=dtype, enabled=active, cache_enabled=False):
                began = _now(kind)
                model(*args, **kwargs)
                return _now(kind) - began

        return forward


@dataclass(frozen=True)
class Compiled:
    """PyTorch with `torch.compile`, on the model's device; the first forward compiles."""

    name = "compiled"

    def load(self, model: nn.Module, example: Example) -> Forward:
        model.compile(dynamic=False)  # in place: the model is nobody else's
        return Eager().load(model, example)


@dataclass(frozen=True)
class Called:
    """A runtime that is a function of the user's own: `(model, example) -> seconds`."""

    function: Callable[[nn.Module, Example], float]

    @property
    def name(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)

    def load(self, model: nn.Module, example: Example) -> Forward:
        def forward() -> float:
            try:
                seconds = float(self.function(model, example))
            except Exception as error:  # of the user's own
                raise RuntimeUnavailable(f"{self.name} failed with {type(error).__name__}: {error}") from error
            if not 0 < seconds < math.inf:
                raise RuntimeUnavailable(f"{self.name} returned {seconds:g}: it has to return positive seconds")
            return seconds

        return forward


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    alone = device == "cpu" and torch.get_num_threads() == 1  # then other programs of a busy machine do not count
    return time.thread_time() if alone else time.perf_counter()


def thread_seconds(run: Callable[[], Any]) -> float:
    """Seconds of the processor that this thread spends on a call: other programs of a busy machine do not count."""
    before = time.thread_time()
    run()
    return time.thread_time() - before


def wall_seconds(run: Callable[[], Any]) -> float:
    before = time.perf_counter()
    run()
    return time.perf_counter() - before


def in_turns(forwards: Sequence[Forward], enough_s: float = ENOUGH_S) -> list[list[float]]:
    """Seconds of each of several models, forward by forward in turns, so that all see the same machine.

    There are as many as take `enough_s` a model, or 1 s of the wall clock; but 60 at most and 7 at least. After 3 s
    of the wall clock a model one is enough: a program that takes long to start makes several forwards itself.
    """
    read: list[list[float]] = [[] for _ in forwards]
    began, wall_s = time.monotonic(), 0.0
    while len(read[0]) < (_LEAST if wall_s < 3 * _LONG_S else 1) or (
        len(read[0]) < _MOST and sum(map(sum, read)) < enough_s * len(forwards) and wall_s < _LONG_S
    ):
        for forward, seconds in zip(forwards, read, strict=True):
            seconds.append(forward())
        wall_s = (time.monotonic() - began) / len(forwards)
    return read


def ratios(of: Sequence[float], to: Sequence[float]) -> list[float]:
    """The ratio in each turn, sorted; turns in which a coarse clock stood still are left out."""
    return sorted(one / other for one, other in zip(of, to, strict=True) if one > 0 and other > 0)


def typical(seconds: Sequence[float]) -> float:
    """The lower quartile: what else a machine does only ever makes a forward longer."""
    return statistics.quantiles(seconds, n=4, method="inclusive")[0] if len(seconds) > 1 else seconds[0]
