"""The account of a run: FLOPs and seconds, the user's and Setpoint's own."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from setpoint.spending.break_even import Segment
from setpoint.spending.seconds import StepMeter, Stopwatch


class Account:
    """Counts every FLOP and second of a run; the loop tells it what happens.

    Args:
        attach: the stopwatch that has run since `attach` was called.
        steps: tells how long a step takes.
        step_flops: FLOPs of one optimizer step of the dense model.
        verification_flops: FLOPs spent on verifying the groups.
    """

    def __init__(self, attach: Stopwatch, steps: StepMeter, step_flops: float, verification_flops: float) -> None:
        self.attach = attach
        self.sensing = Stopwatch()
        self.deciding = Stopwatch(synchronize=True)
        self.resizing = Stopwatch(synchronize=True)
        self.probing = Stopwatch()
        self.running = Stopwatch()
        self.probed_seconds = 0.0
        self.probing_flops = self.learning_flops = 0.0
        self.probed_steps = 0
        self._probed = False
        self.recompiles = 0
        self.recompiling_seconds = 0.0
        self.step_flops = step_flops
        self.train_flops = verification_flops
        self.overhead_flops = verification_flops
        self.resizes = 0
        self.run_j = self.step_j = 0.0
        self.steps = steps
        self._segments: list[Segment] = []
        self._steps_in_segment = 0
        self._sensing_noted = self._probing_noted = self._recompiling_noted = self._users_noted = 0.0
        self._extra_seconds = 0.0
        self._recompiles_noted = self._num_steps = 0
        self._attached = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Wall-clock seconds since attach began."""
        return time.perf_counter() - self._attached + self.attach.seconds

    @property
    def run_seconds(self) -> float:
        """Wall-clock seconds since attach began, up to the end of the last optimizer step."""
        return self.attach.seconds_so_far + self.running.seconds

    @property
    def extra_seconds_per_step(self) -> float:
        """Mean over the run of what steps take beyond their median, as evaluations between them do."""
        return max(0.0, self._extra_seconds / self._num_steps) if self._num_steps else 0.0

    @property
    def _users_seconds(self) -> float:
        return self.running.seconds - self.deciding.seconds - self.resizing.seconds

    @property
    def overhead_seconds(self) -> float:
        """Setpoint's own seconds so far."""
        watches = (self.attach, self.sensing, self.deciding, self.resizing)
        return sum(watch.seconds for watch in watches) + self.probing_seconds + self.recompiling_seconds

    @property
    def probing_seconds(self) -> float:
        """Seconds for taking resting units in and out and easing them in, and what probed steps took longer."""
        return self.probing.seconds + self.probed_seconds

    def sensed(self, flops: float) -> None:
        """Count the FLOPs of one sensing."""
        self.train_flops += flops
        self.overhead_flops += flops

    def learned(self, flops: float) -> None:
        """Count the FLOPs that a controller has spent on learning."""
        self.sensed(flops)
        self.learning_flops += flops

    def probed(self, flops: float) -> None:
        """Count the FLOPs that resting units add to the step under way; its duration is no ordinary step's."""
        self.train_flops += flops
        self.overhead_flops += flops
        self.probing_flops += flops
        self.probed_steps += 1
        self._probed = True

    def recompiled(self, seconds: float, count: int = 1) -> None:
        """Count what was compiled again because sizes had changed."""
        self.recompiles += count
        self.recompiling_seconds += seconds

    def begin(self) -> None:
        """The first step begins."""
        self.running.__enter__()
        self.steps.begin()

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
        before, self._users_noted = self._users_noted, self._users_seconds
        usual = self.steps.seconds_per_step
        self._extra_seconds += 0.0 if usual is None else self._users_noted - before - usual

    def resized(self, step_flops: float) -> None:
        """Begin a new segment: from here on a step has these FLOPs."""
        self._segments.append(self._segment())
        self._steps_in_segment = 0
        self.steps.clear()
        self.step_flops = step_flops
        self.resizes += 1

    def segments(self) -> list[Segment]:
        """The stretches of the run between cuts, the present one last."""
        return [*self._segments, self._segment()]

    def new_sensing_seconds(self) -> float:
        """Seconds spent sensing since the last call."""
        before, self._sensing_noted = self._sensing_noted, self.sensing.seconds
        return self.sensing.seconds - before

    def new_probing_seconds(self) -> float:
        """Seconds spent on probing since the last call."""
        before, self._probing_noted = self._probing_noted, self.probing_seconds
        return self.probing_seconds - before

    def new_recompiles(self) -> tuple[int, float]:
        """How often code was compiled again since the last call, and the seconds."""
        count, seconds = self.recompiles - self._recompiles_noted, self.recompiling_seconds - self._recompiling_noted
        self._recompiles_noted, self._recompiling_noted = self.recompiles, self.recompiling_seconds
        return count, seconds

    def state_dict(self) -> dict[str, Any]:
        """All that was counted so far, in plain numbers."""
        return {
            "seconds": self.seconds - self.attach.seconds,
            "watches": {name: watch.seconds for name, watch in self._watches().items()},
            "numbers": {name: value for name, value in vars(self).items() if name in self._numbers()},
            "steps": self.steps.state_dict(),
            "segments": [asdict(each) for each in self._segments],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting where `state_dict` was taken.

        The seconds of attaching again are added; its FLOPs are not, so that no decision depends on an interruption.

        Args:
            state: from `state_dict`.
        """
        self._attached = time.perf_counter() - float(state["seconds"])
        for name, watch in self._watches().items():
            watch.seconds += float(state["watches"][name])
        for name in self._numbers():
            setattr(self, name, type(getattr(self, name))(state["numbers"][name]))
        self.steps.load_state_dict(state["steps"])
        self._segments = [Segment(**each) for each in state["segments"]]

    def _watches(self) -> dict[str, Stopwatch]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Stopwatch)}

    def _numbers(self) -> list[str]:
        """Names of the attributes that are counts; `_attached` is a moment, which means nothing to another process."""
        return [name for name, each in vars(self).items() if isinstance(each, (int, float)) and name != "_attached"]

    def _segment(self) -> Segment:
        return Segment(self._steps_in_segment, self.steps.seconds_per_step, self.overhead_seconds)
