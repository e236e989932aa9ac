"""The meter: what the hardware really spent; today seconds, from the monotonic clock."""

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
        self.seconds = 0.0
        self.last_seconds = 0.0
        self._synchronize = synchronize
        self._started: float | None = None

    def __enter__(self) -> Stopwatch:
        """Start."""
        assert self._started is None, "a stopwatch measures one block at a time"
        self._started = self._now()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop and add."""
        assert self._started is not None
        self.last_seconds = self._now() - self._started
        self.seconds += self.last_seconds
        self._started = None

    def _now(self) -> float:
        if self._synchronize and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
        return time.perf_counter()


class StepMeter:
    """Smoothed seconds per optimizer step: the median of recent intervals between steps.

    The median ignores an evaluation or a checkpoint between two steps. An interval without a known
    beginning is no reading.

    Args:
        window: number of recent steps that count.
    """

    def __init__(self, window: int = 50) -> None:
        self._intervals: deque[float] = deque(maxlen=window)
        self._began: float | None = None

    def begin(self) -> None:
        """Mark the moment from which the next step counts."""
        self._began = time.perf_counter()

    def end(self) -> None:
        """Mark the end of the step."""
        if self._began is not None:
            self._intervals.append(time.perf_counter() - self._began)
            self._began = None

    def extra(self) -> float:
        """End a step of another kind, which is no reading: by how many seconds it was longer than the median."""
        usual, began, self._began = self.seconds_per_step, self._began, None
        return 0.0 if began is None or usual is None else max(0.0, time.perf_counter() - began - usual)

    def clear(self) -> None:
        """Forget everything: the steps from here on are of another kind."""
        self._intervals.clear()
        self._began = None

    @property
    def seconds_per_step(self) -> float | None:
        """Median of the recent intervals in seconds, or None before the first."""
        return statistics.median(self._intervals) if self._intervals else None

    def state_dict(self) -> dict[str, list[float]]:
        """The recent intervals."""
        return {"intervals": list(self._intervals)}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        """Go on with these recent intervals; the step under way is no reading."""
        self.clear()
        self._intervals.extend(map(float, state["intervals"]))
