"""Seconds: what a block of code or a training step takes, by the monotonic clock."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Mapping, Sequence
from types import TracebackType

import torch


class Stopwatch:
    """Adds up the wall-clock seconds spent inside `with` blocks.

    A GPU works behind the host's back: without `synchronize` only the host's time is seen; with it,
    each block first waits for work queued earlier (which is not counted) and ends when its own is done.

    Args:
        synchronize: wait for CUDA, if it is in use, at both ends of each block.

    >>> watch = Stopwatch()
    >>> with watch:
    ...     pass
    >>> watch.seconds >= watch.last_seconds >= 0.0
    True
    """

    def __init__(self, synchronize: bool = False) -> None:
        self.seconds = self.last_seconds = 0.0
        self._synchronize = synchronize
        self._started: float | None = None

    def __enter__(self) -> Stopwatch:
        assert self._started is None, "a stopwatch measures one block at a time"
        self._started = _now(self._synchronize)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.lap()
        self._started = None

    def lap(self) -> None:
        """Stop, add, and start again at the same moment."""
        assert self._started is not None
        now = _now(self._synchronize)
        self.last_seconds = now - self._started
        self.seconds += self.last_seconds
        self._started = now

    @property
    def seconds_so_far(self) -> float:
        """Seconds of all blocks, the present one included."""
        return self.seconds + (0.0 if self._started is None else _now(self._synchronize) - self._started)


def _now(synchronize: bool) -> float:
    """The clock, read once the GPU is done if that is wanted and one is in use."""
    if synchronize and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
    return time.perf_counter()


class StepMeter:
    """Smoothed seconds per optimizer step: the median of recent intervals between steps.

    The median ignores an evaluation or a checkpoint between two steps, and the lower one does so even of two.

    Args:
        window: number of recent steps that count.
        synchronize: wait for CUDA, if it is in use, at both ends of each step.
    """

    def __init__(self, window: int = 50, synchronize: bool = False) -> None:
        self._intervals: deque[float] = deque(maxlen=window)
        self._began: float | None = None
        self._synchronize = synchronize

    def begin(self) -> None:
        """Mark the moment from which the next step counts."""
        self._began = _now(self._synchronize)

    def end(self) -> None:
        """Mark the end of the step; one whose beginning was not marked is skipped."""
        interval = 0.0 if self._began is None else _now(self._synchronize) - self._began
        self._began = None
        if interval > 0:  # a coarse clock may not have moved
            self._intervals.append(interval)

    def extra(self) -> float:
        """End a step of another kind, which is skipped: by how many seconds it was longer than the median."""
        usual, began, self._began = self.seconds_per_step, self._began, None
        return 0.0 if began is None or usual is None else max(0.0, _now(self._synchronize) - began - usual)

    def clear(self) -> None:
        """Forget everything: the steps from here on are of another kind."""
        self._intervals.clear()
        self._began = None

    @property
    def seconds_per_step(self) -> float | None:
        """Median of the recent intervals in seconds, or None before the first."""
        return statistics.median_low(self._intervals) if self._intervals else None

    @property
    def intervals(self) -> tuple[float, ...]:
        """The recent intervals in seconds."""
        return tuple(self._intervals)

    def state_dict(self) -> dict[str, list[float]]:
        """The recent intervals."""
        return {"intervals": list(self._intervals)}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        """Go on with these recent intervals; the present step is skipped."""
        self.clear()
        self._intervals.extend(map(float, state["intervals"]))
