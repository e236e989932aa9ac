"""The account of a run: FLOPs and seconds, the user's and Setpoint's own."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from setpoint.checkpoint.fields import fields_of
from setpoint.spending.break_even import Segment
from setpoint.spending.seconds import StepMeter, Stopwatch

_UNKEPT = ("_attached", "sensing_flops")
"""A moment means nothing to another process, and what a sensing takes is asked of the sensor again."""


@dataclass(eq=False)
class Totals:
    """What is counted: one number more is a field here, one in `Summary`, and a line on the page of a run."""

    train_flops: float = 0.0
    overhead_flops: float = 0.0
    probing_flops: float = 0.0
    probed_steps: int = 0
    resizes: int = 0
    recompiles: int = 0
    recompiling_seconds: float = 0.0


class Account(Totals):
    """Counts every FLOP and second of a run, from the first ones, which went into attaching and verification."""

    def __init__(self, attach: Stopwatch, steps: StepMeter, step_flops: float, verification_flops: float) -> None:
        super().__init__(train_flops=verification_flops, overhead_flops=verification_flops)
        self.attach, self.steps, self.step_flops, self.sensing_flops = attach, steps, step_flops, 0.0
        self.sensing, self.probing, self.running = Stopwatch(), Stopwatch(), Stopwatch()
        self.deciding, self.resizing = Stopwatch(synchronize=True), Stopwatch(synchronize=True)
        self.probed_seconds = self.learning_flops = self.run_j = self.step_j = self._extra_seconds = 0.0
        self._sensing_noted = self._probing_noted = self._recompiling_noted = self._users_noted = 0.0
        self._recompiles_noted = self._steps_in_segment = self._num_steps = 0
        self._attached, self._probed, self._segments = time.perf_counter(), False, list[Segment]()

    @property
    def seconds(self) -> float:
        """Wall-clock seconds since attach began."""
        return time.perf_counter() - self._attached + self.attach.seconds

    @property
    def run_seconds(self) -> float:
        """Wall-clock seconds since attach began, up to the end of the last optimizer step."""
        return self.attach.seconds_so_far + self.running.seconds

    @property
    def num_steps(self) -> int:
        """Optimizer steps done."""
        return self._num_steps

    @property
    def extra_seconds_per_step(self) -> float:
        """Mean over the run of what steps take beyond their median, as evaluations between them do."""
        return max(0.0, self._extra_seconds / self._num_steps) if self._num_steps else 0.0

    @property
    def overhead_seconds(self) -> float:
        """Setpoint's own seconds so far."""
        watched = self.attach.seconds + self.sensing.seconds + self.deciding.seconds + self.resizing.seconds
        return watched + self.probing_seconds + self.recompiling_seconds

    @property
    def probing_seconds(self) -> float:
        """Seconds for taking resting units in and out and easing them in, and what probed steps took longer."""
        return self.probing.seconds + self.probed_seconds

    def share_left(self, share: float, used: float, num_steps: int = 0) -> float:
        """What is left, so many steps from now, of a share of the steps' FLOPs, of which some have been used."""
        return share * (self.train_flops - self.overhead_flops + num_steps * self.step_flops) - used

    def sensed(self, flops: float) -> None:
        """Count the FLOPs of one sensing."""
        self.train_flops += flops
        self.overhead_flops += flops

    def probed(self, flops: float) -> None:
        """Count the FLOPs that resting units add to the step under way; its duration is no ordinary step's."""
        self.sensed(flops)
        self.probing_flops += flops
        self.probed_steps += 1
        self._probed = True

    def stepped(self) -> None:
        """Count one optimizer step at the present widths."""
        if self._probed:
            self.probed_seconds += self.steps.extra()
            self._probed = False
        else:
            self.steps.end()
        self.running.lap()
        self.train_flops += self.step_flops
        self.run_j += self.step_j
        self._steps_in_segment += 1
        self._num_steps += 1
        users = self.running.seconds - self.deciding.seconds - self.resizing.seconds
        usual = self.steps.seconds_per_step
        self._extra_seconds += 0.0 if usual is None else users - self._users_noted - usual
        self._users_noted = users

    def resized(self, step_flops: float) -> None:
        """Begin a new segment: from here on a step has these FLOPs."""
        self._segments = self.segments()
        self._steps_in_segment = 0
        self.steps.clear()
        self.step_flops = step_flops
        self.resizes += 1

    def segments(self) -> list[Segment]:
        """The stretches of the run between cuts, the present one last."""
        return [*self._segments, Segment(self._steps_in_segment, self.steps.seconds_per_step, self.overhead_seconds)]

    def news(self) -> dict[str, Any]:
        """What has gone into sensing, probing and recompiling since the last call, by name of an entry's fields."""
        found = {
            "sensing_seconds": self.sensing.seconds - self._sensing_noted,
            "probing_seconds": self.probing_seconds - self._probing_noted,
            "recompiles": self.recompiles - self._recompiles_noted,
            "recompiling_seconds": self.recompiling_seconds - self._recompiling_noted,
        }
        self._sensing_noted, self._probing_noted = self.sensing.seconds, self.probing_seconds
        self._recompiles_noted, self._recompiling_noted = self.recompiles, self.recompiling_seconds
        return found

    def state_dict(self) -> dict[str, Any]:
        """All that was counted so far, in plain numbers."""
        counts = {n: each for n, each in vars(self).items() if isinstance(each, (int, float)) and n not in _UNKEPT}
        return {
            "seconds": self.seconds - self.attach.seconds,
            "watches": {name: each.seconds for name, each in vars(self).items() if isinstance(each, Stopwatch)},
            "numbers": counts,
            "steps": self.steps.state_dict(),
            "segments": [asdict(each) for each in self._segments],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting where `state_dict` was taken.

        The seconds of attaching again are added; its FLOPs are not, so that no decision depends on an interruption.
        """
        own = self.state_dict()
        self._attached = time.perf_counter() - float(state["seconds"])
        for name in own["watches"]:
            getattr(self, name).seconds += float(state["watches"][name])
        for name, value in own["numbers"].items():
            setattr(self, name, type(value)(state["numbers"][name]))
        self.steps.load_state_dict(state["steps"])
        self._segments = [Segment(**fields_of(Segment, each)) for each in state["segments"]]
