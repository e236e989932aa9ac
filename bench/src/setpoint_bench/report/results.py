"""Results of runs as values: one cell per run, with its history, its ledger and its timing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from setpoint.report.record import Record


@dataclass(frozen=True)
class Point:
    """One line of a history: optimizer steps, wall-clock seconds and FLOPs of training so far, and what was measured.

    Args:
        split: "train", "validation" or "test".
        loss: mean over the split; None if it was not measured.
        accuracy: share of right answers in [0, 1], None if it was not measured.
    """

    step: float
    seconds: float | None
    flops: float | None
    split: str
    loss: float | None
    accuracy: float | None


@dataclass(frozen=True)
class Timing:
    """Seconds of a run on an idle machine, measured separately, in turns with the other runs.

    Args:
        seconds: of the run, everything counted.
        rounds: the same by each round of the measurement.
        own_seconds: the part that the method itself spends in addition to plain training steps.
        load: the machine's load average before the measurement; None where it is unknown.
        control: by round, seconds of the dense model's steps / seconds of the same steps timed a second time.
        environment: hardware and versions of the measurement.
        date: ISO 8601 in UTC.
    """

    seconds: float
    rounds: tuple[float, ...] = ()
    own_seconds: float = 0.0
    load: float | None = None
    control: tuple[float, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    date: str = ""


@dataclass(frozen=True)
class Cell:
    """One run as the report reads it; fields are those of `setpoint_bench.results.Result`, unknown numbers are None.

    Args:
        timing: seconds on an idle machine; None where they were not measured.
        history: loss and accuracy over the run.
        record: the ledger, None where there is none.
    """

    task: str
    method: str
    value: float
    metric: str = "accuracy"
    split: str = "test"
    budget: float | None = None
    seed: int | None = None
    final_flops: float | None = None
    final_params: float | None = None
    train_flops: float | None = None
    seconds: float | None = None
    overhead_seconds: float | None = None
    overhead_flops: float | None = None
    resizes: int | None = None
    budget_met: bool | None = None
    widths: Mapping[str, int] = field(default_factory=dict)
    dense_widths: Mapping[str, int] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    date: str = ""
    family: str = ""
    steps: int | None = None
    clock: str = "interleaved"
    theoretical_flops: float | None = None
    theoretical_train_flops: float | None = None
    density: float | None = None
    energy_j: float | None = None
    notes: str = ""
    unit: str = "nats"
    timing: Timing | None = None
    history: tuple[Point, ...] = ()
    record: Record | None = None


@dataclass(frozen=True)
class Results:
    """All cells of a results folder, and what could not be read."""

    cells: tuple[Cell, ...]
    remarks: tuple[str, ...] = ()

    def tasks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(cell.task for cell in self.cells))

    def of(self, task: str) -> tuple[Cell, ...]:
        return tuple(cell for cell in self.cells if cell.task == task)
