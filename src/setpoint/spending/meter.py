"""A meter: what the user's own optimizer steps really take of what they are held to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from setpoint.spending.seconds import StepMeter


class Meter:
    """The meter of a run that is held to FLOPs and parameters, which are counted: it reads nothing; others override it.

    Args:
        steps: tells how long a step takes, for the account and for whatever reads seconds.
    """

    watts = 0.0
    """The power that the user has stated, where joules are this times seconds; else 0."""

    def __init__(self, steps: StepMeter | None = None) -> None:
        self.steps = steps or StepMeter()

    @property
    def sources(self) -> Mapping[str, str]:
        """By resource that is metered, what reads it."""
        return {}

    @property
    def peak_wanted(self) -> bool:
        """Whether a step's bytes can be read, and none has been since the last cut."""
        return False

    @property
    def peak_known(self) -> bool:
        """Whether a step's bytes have been read since the last cut."""
        return False

    @property
    def watching(self) -> bool:
        """Whether the step that begins now is watched for its bytes, which makes it slow."""
        return False

    @property
    def waits(self) -> str:
        """Why no decision can be made yet; "" if one can."""
        return ""

    @property
    def vanished(self) -> bool:
        """Whether what reads joules has gone in the middle of the run."""
        return False

    def stepped(self) -> None:
        """An optimizer step is done."""

    def prepare(self, due: bool) -> None:
        """The next step begins; `due` if a decision comes after it."""

    def time_inference(self, widths: Mapping[str, int]) -> float:
        """Time forward passes of the model now, if inference is metered; returns the FLOPs that this took."""
        return 0.0

    def read(self) -> dict[str, float]:
        """Readings since the last cut, by resource; what was not read is not there."""
        return {}

    def settled(self) -> dict[str, float]:
        """The readings that enough steps are behind to be held against a limit."""
        return {}

    def margin(self, resource: str) -> float:
        """How far spending may lie over a limit, relatively, before this meter can tell."""
        return 0.0

    def run_j(self) -> float | None:
        """Joules of the run so far; None if they are not known."""
        return None

    def resident_bytes(self) -> int | None:
        """Largest resident set of the process so far, for information; None where it is of no interest."""
        return None

    def cut(self) -> None:
        """The model has changed: forget."""

    def stop(self) -> None:
        """End the watch of a step, if there is one."""

    def state_dict(self) -> dict[str, Any]:
        """What is remembered, in plain numbers."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
