"""A history: what was measured while a run trained, and the loss around each event of its ledger."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from setpoint.report.drawing import BLUE, GREY, INK, ORANGE, Figure, Trace, layout, line
from setpoint.report.record import Record, dropped, num_grown

AROUND = 0.03
"""Share of the run on either side of an event over which the loss is shown."""


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


def loss_around(record: Record, history: Sequence[Point]) -> Figure | None:
    """The training loss around each decision that changed the model, less its mean before; None without a history.

    A jump at 0 is the effect of the event; the bold line is the mean over all events.
    """
    steps, losses = _training_losses(history)
    reach = max(4.0, AROUND * record.last_step)
    data: list[Trace] = []
    every: dict[int, list[float]] = {}
    width = reach / 8
    for entry in record.entries:
        back = sum(num_grown(entry).values())
        before = [loss for step, loss in zip(steps, losses, strict=True) if entry.step - reach < step <= entry.step]
        after = [loss for step, loss in zip(steps, losses, strict=True) if entry.step < step <= entry.step + reach]
        if not (dropped(entry) or back) or len(before) < 2 or len(after) < 2:
            continue
        base = statistics.fmean(before)
        by_bin: dict[int, list[float]] = {}
        for step, loss in zip(steps, losses, strict=True):
            if entry.step - reach < step <= entry.step + reach:
                by_bin.setdefault(math.ceil((step - entry.step) / width), []).append(loss - base)
        points = [((place - 0.5) * width, statistics.fmean(values)) for place, values in sorted(by_bin.items())]
        for place, values in by_bin.items():
            every.setdefault(place, []).append(statistics.fmean(values))
        label = f"step {entry.step:,}: {dropped(entry):,} dropped, {back:,} back"
        data.append(line(label, points, ORANGE if not back else BLUE, width=1.0) | {"opacity": 0.5})
    if not data:
        return None
    means = [((place - 0.5) * width, statistics.fmean(values)) for place, values in sorted(every.items())]
    data.append(line("mean over events", means, INK, width=3.0))
    shape = layout("loss less its mean before", "optimizer steps since the event", height=340)
    shape["showlegend"] = len(data) <= 8
    shape["shapes"] = [{"x0": 0, "line": {"color": GREY, "dash": "dot", "width": 1.4}}]
    return Figure(data, shape)


def _training_losses(history: Sequence[Point]) -> tuple[list[float], list[float]]:
    """Steps and training losses, in order of steps."""
    found = sorted((p.step, p.loss) for p in history if p.split == "train" and p.loss is not None)
    return [step for step, _ in found], [loss for _, loss in found]
