"""Clocks of blocks and steps, and a meter: what the user's own optimizer steps take of what they are held to."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from setpoint.spending.limits import Limits


class Stopwatch:
    """Adds up the wall-clock seconds spent inside `with` blocks.

    Without `synchronize` only the host's time is seen. With it each block first waits for work that a GPU was given
    earlier, which is not counted, and ends when its own is done.
    """

    def __init__(self, synchronize: bool = False) -> None:
        self.seconds = self.last_seconds = 0.0
        self._synchronize = synchronize
        self._started: float | None = None

    def __enter__(self) -> Stopwatch:
        self._started = _now(self._synchronize)
        return self

    def __exit__(self, *error: object) -> None:
        self.lap()
        self._started = None

    def lap(self) -> None:
        """Stop, add, and start again at the same moment."""
        now = _now(self._synchronize)
        self.last_seconds = 0.0 if self._started is None else now - self._started
        self.seconds += self.last_seconds
        self._started = now

    @property
    def seconds_so_far(self) -> float:
        """Seconds of all blocks, the present one included."""
        return self.seconds + (0.0 if self._started is None else _now(self._synchronize) - self._started)


def _now(synchronize: bool) -> float:
    if synchronize and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
    return time.perf_counter()


class StepMeter:
    """Smoothed seconds per optimizer step: the median of the last 50 intervals between steps.

    The median ignores an evaluation or a checkpoint between two steps, and the lower one does so even of two.
    With `synchronize` CUDA, if it is in use, is waited for at both ends of each step.
    """

    def __init__(self, synchronize: bool = False) -> None:
        self._intervals: deque[float] = deque(maxlen=50)
        self._began: float | None = None
        self._synchronize = synchronize

    def begin(self) -> None:
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
        self._intervals.clear()
        self._began = None

    @property
    def seconds_per_step(self) -> float | None:
        return statistics.median_low(self._intervals) if self._intervals else None

    @property
    def intervals(self) -> tuple[float, ...]:
        return tuple(self._intervals)

    def state_dict(self) -> dict[str, list[float]]:
        return {"intervals": list(self._intervals)}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        self.clear()  # the present step is skipped: part of it was made in another process
        self._intervals.extend(map(float, state["intervals"]))


@dataclass(frozen=True)
class Readings:
    """What meters have read since the last cut, by resource; what was not read is not there."""

    values: Mapping[str, float] = field(default_factory=dict)  # cost of a step, or of a forward pass
    margins: Mapping[str, float] = field(default_factory=dict)  # relative excess over a limit that it cannot tell
    run_j: float | None = None  # joules of the run so far; None if they are not known


class Meter:
    """What is read of the user's steps between two cuts; it changes at every step.

    This one reads nothing: FLOPs and parameters are counted. `Metering` reads bytes, seconds and joules.
    `watts` is the power that the user has stated, where joules are this times seconds; else 0.
    """

    def __init__(self, steps: StepMeter | None = None, watts: float = 0.0) -> None:
        self.steps, self.watts = steps or StepMeter(), watts

    @property
    def sources(self) -> Mapping[str, str]:
        """By resource that is metered, what reads it."""
        return {}

    @property
    def waits(self) -> str:
        """Why no decision can be made yet; "" if one can."""
        return ""

    @property
    def peak_wanted(self) -> bool:
        """Whether a step's bytes can be read, and none have been since the last cut."""
        return False

    @property
    def peak_known(self) -> bool:
        """Whether a step's bytes have been read since the last cut."""
        return False

    @property
    def incomplete(self) -> bool:
        """Whether clocks are to be read once more at the end of a run, as after a cut in the last decision."""
        return False

    def prepare(self, due: bool) -> bool:
        """The next step begins, `due` if a decision comes after it; whether its bytes are watched, which is slow."""
        return False

    def stepped(self) -> None: ...

    def read_clocks(self, widths: Mapping[str, int]) -> None:
        """Time forwards of the model now, at these widths, if inference is metered; ranks share what clocks read."""

    def read(self) -> Readings:
        return Readings()

    def corrected(self, limits: Limits, widths: Mapping[str, int]) -> tuple[Limits, Mapping[str, float]]:
        """The limits by what is read at these widths, and the costs of a step that the controller learns of."""
        return limits, {}

    def cut(self) -> None: ...

    def stop(self) -> None: ...

    def state_dict(self) -> dict[str, float | None]:
        return {}

    def load_state_dict(self, state: Mapping[str, float | None]) -> None: ...
