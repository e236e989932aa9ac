"""The account of a run: FLOPs and seconds, the user's and Setpoint's own."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from setpoint.spending.meter import StepMeter, Stopwatch

_LEARNING_SHARE = 0.01  # of the FLOPs of the steps so far, the most that a controller that learns takes
_COUNTED = (  # what is saved; what a sensing takes is not: it is asked of the sensor again
    *("train_flops", "overhead_flops", "probing_flops", "learning_flops", "step_flops"),
    *("probed_steps", "resizes", "num_steps", "run_j", "step_j"),
)


@dataclass
class Watches:
    """Setpoint's own seconds, by what they go into; on a GPU, sensing and probing see the host's only."""

    attach: Stopwatch
    sensing: Stopwatch = field(default_factory=Stopwatch)
    deciding: Stopwatch = field(default_factory=lambda: Stopwatch(synchronize=True))
    resizing: Stopwatch = field(default_factory=lambda: Stopwatch(synchronize=True))
    probing: Stopwatch = field(default_factory=Stopwatch)

    def seconds(self) -> dict[str, float]:
        return {name: watch.seconds for name, watch in vars(self).items()}


class Account:
    """Counts every FLOP and second of a run, from the first ones, which went into attaching and verification."""

    def __init__(
        self, attach: Stopwatch, steps: StepMeter, *, step_flops: float, verification_flops: float, sensing_flops: float
    ) -> None:
        self.watch, self.steps, self.running = Watches(attach), steps, Stopwatch()
        self.train_flops = self.overhead_flops = verification_flops
        self.step_flops, self.sensing_flops = step_flops, sensing_flops
        self.probing_flops = self.learning_flops = 0.0
        self.run_j = self.step_j = 0.0  # joules of the run, as last read, then as expected: `step_j` for each step
        self.probed_steps = self.resizes = self.num_steps = 0
        self._began, self._probed, self._segments = time.perf_counter(), False, list[Segment]()
        self._users_seconds = self._extra_seconds = 0.0
        self._noted = dict[str, float]()

    def begin(self) -> None:
        self.running.__enter__()  # it runs until the end, and each step is a lap of it
        self.steps.begin()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began + self.watch.attach.seconds

    @property
    def run_seconds(self) -> float:
        """From the beginning of attach up to the end of the last optimizer step."""
        return self.watch.attach.seconds_so_far + self.running.seconds

    @property
    def extra_seconds_per_step(self) -> float:
        """Mean over the run of what steps take beyond their median, as evaluations between them do."""
        return max(0.0, self._extra_seconds / self.num_steps) if self.num_steps else 0.0

    @property
    def overhead_seconds(self) -> float:
        return sum(self.watch.seconds().values())

    def share_left(self, share: float, used: float, num_steps: int = 0) -> float:
        """Of a share of the FLOPs of steps, what is not `used`, `num_steps` from now."""
        return share * (self.train_flops - self.overhead_flops + num_steps * self.step_flops) - used

    def learning_left(self, num_steps: int = 0) -> float:
        """FLOPs that a controller that learns may spend on it, `num_steps` from now."""
        return max(0.0, self.share_left(_LEARNING_SHARE, self.learning_flops, num_steps))

    def sensed(self, flops: float) -> None:
        """Count FLOPs that are no step's: of a sensing, or of passes of a teacher."""
        self.train_flops += flops
        self.overhead_flops += flops

    def learned(self, flops: float) -> None:
        self.sensed(flops)
        self.learning_flops += flops

    def probed(self, flops: float) -> None:
        """Count the FLOPs that resting units add to the present step."""
        self.sensed(flops)
        self.probing_flops += flops
        self.probed_steps += 1
        self._probed = True

    def stepped(self) -> None:
        if self._probed:  # resting units made it longer than the model's own steps are
            self.watch.probing.seconds += self.steps.extra()
            self._probed = False
        else:
            self.steps.end()
        self.running.lap()
        self.train_flops += self.step_flops
        self.run_j += self.step_j
        self.num_steps += 1
        # What is left of a step beyond the usual one is the user's, such as an evaluation, and will come again.
        users = self.running.seconds - self.watch.deciding.seconds - self.watch.resizing.seconds
        usual = self.steps.seconds_per_step
        self._extra_seconds += 0.0 if usual is None else users - self._users_seconds - usual
        self._users_seconds = users

    def resized(self, step_flops: float) -> None:
        self._segments = self.segments()
        self.steps.clear()  # steps at the old widths say nothing of those to come
        self.step_flops = step_flops
        self.resizes += 1

    def segments(self) -> list[Segment]:
        """The stretches of the run between cuts, the present one last."""
        num_steps = self.num_steps - sum(segment.num_steps for segment in self._segments)
        return [*self._segments, Segment(num_steps, self.steps.seconds_per_step, self.overhead_seconds)]

    def seconds_since_entry(self) -> dict[str, float]:
        seconds = self.watch.seconds()
        since = {name: value - self._noted.get(name, 0.0) for name, value in seconds.items() if name != "attach"}
        self._noted = seconds
        return since

    def state_dict(self) -> dict[str, Any]:
        return {
            "seconds": self.seconds - self.watch.attach.seconds,
            "watches": {**self.watch.seconds(), "running": self.running.seconds},
            "noted": dict(self._noted),
            "users": [self._users_seconds, self._extra_seconds],
            "numbers": {name: getattr(self, name) for name in _COUNTED},
            "steps": self.steps.state_dict(),
            "segments": [asdict(segment) for segment in self._segments],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Add the seconds of attaching again, but not its FLOPs: no decision may depend on an interruption."""
        # A moment means nothing to another process: the clock is set back by what the run has taken.
        self._began = time.perf_counter() - float(state["seconds"])
        for name, watch in {**vars(self.watch), "running": self.running}.items():
            watch.seconds += float(state["watches"][name])
        for name in _COUNTED:
            setattr(self, name, type(getattr(self, name))(state["numbers"][name]))  # counts stay integers
        self._users_seconds, self._extra_seconds = map(float, state["users"])
        self._noted = {str(name): float(value) for name, value in state["noted"].items()}
        self.steps.load_state_dict(state["steps"])
        self._segments = [Segment(**segment) for segment in state["segments"]]


@dataclass(frozen=True)
class Segment:
    """A stretch of the run between two cuts."""

    num_steps: int
    seconds_per_step: float | None  # the median; None if no step was timed
    overhead_seconds: float  # Setpoint's own from attach to the end of the segment
