"""A meter: what the user's own optimizer steps really take of what they are held to."""

# ruff: noqa: D102 - `Meter` says what the methods of both classes do

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, final

from setpoint.spending.seconds import StepMeter


@dataclass(frozen=True)
class Readings:
    """What meters have read since the last cut, by resource; what was not read is not there.

    Args:
        values: cost of a step, or of a pass.
        learnable: the same, with joules by the user's watts where those are what the controller follows.
        quickest: of `learnable`, by the quickest step and pass: others may have an evaluation in them.
        settled: of `values`, those that enough steps stand behind to be compared with a limit.
        margins: how far spending may lie over a limit, relatively, before the meter can tell.
        run_j: joules of the run so far; None if they are not known.
        blocked: resources that could not be read, since foreign code stood in the way.
        vanished: whether what reads joules has gone in the middle of the run.
    """

    values: Mapping[str, float] = field(default_factory=dict)
    learnable: Mapping[str, float] = field(default_factory=dict)
    quickest: Mapping[str, float] = field(default_factory=dict)
    settled: Mapping[str, float] = field(default_factory=dict)
    margins: Mapping[str, float] = field(default_factory=dict)
    run_j: float | None = None
    blocked: frozenset[str] = frozenset()
    vanished: bool = False


class Meter(Protocol):
    """Reads what steps take between two cuts; it changes at every step.

    Attributes:
        steps: tells how long a step takes, for the account and for whatever reads seconds.
        sources: by resource that is metered, what reads it.
        watts: the power that the user has stated, where joules are this times seconds; else 0.
        waits: why no decision can be made yet; "" if one can.
        peak_wanted: whether a step's bytes can be read, and none have been since the last cut.
        peak_known: whether a step's bytes have been read since the last cut.
    """

    steps: StepMeter
    watts: float

    @property
    def sources(self) -> Mapping[str, str]: ...

    @property
    def waits(self) -> str: ...

    @property
    def peak_wanted(self) -> bool: ...

    @property
    def peak_known(self) -> bool: ...

    def prepare(self, due: bool) -> bool:
        """The next step begins, `due` if a decision comes after it; whether its bytes are watched, which is slow."""

    def stepped(self) -> None:
        """An optimizer step is done."""

    def time_inference(self, widths: Mapping[str, int]) -> float:
        """Time forward passes of the model now, if inference is metered; returns the FLOPs that this took."""

    def read(self) -> Readings:
        """What has been read since the last cut."""

    def cut(self) -> None:
        """The model has changed: forget."""

    def stop(self) -> None:
        """End the watch of a step, if there is one."""

    def state_dict(self) -> dict[str, Any]:
        """What is remembered, in plain numbers."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""


@final
class Unmetered:
    """The meter of a run that is held to FLOPs and parameters, which are counted: it reads nothing (see `Meter`)."""

    sources: Mapping[str, str] = {}
    watts = 0.0
    waits = ""
    peak_wanted = peak_known = False

    def __init__(self) -> None:
        self.steps, self._readings = StepMeter(), Readings()

    def prepare(self, due: bool) -> bool:
        return False

    def stepped(self) -> None: ...

    def time_inference(self, widths: Mapping[str, int]) -> float:
        return 0.0

    def read(self) -> Readings:
        return self._readings

    def cut(self) -> None: ...

    def stop(self) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...
