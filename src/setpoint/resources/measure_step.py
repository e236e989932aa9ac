"""Measure a training step: seconds and joules, on a copy of the model."""

from __future__ import annotations

from statistics import median

import torch
from torch import nn

from setpoint.groups.example import Example
from setpoint.resources.joules import find_energy_meter
from setpoint.resources.replica import replica
from setpoint.spending.seconds import Stopwatch

_STEPS = 7
_LEAST_S = 0.5


def measure_step(model: nn.Module, example: Example) -> tuple[float, float | None, str]:
    """Median seconds of a step with AdamW, joules or None, and what meters them or why nothing does."""
    optimizer, times = torch.optim.AdamW(model.parameters()), list[float]()
    meter, source = find_energy_meter([parameter.device for parameter in model.parameters()])
    watch = Stopwatch(synchronize=True)
    with replica(model, (optimizer,), example, (), {}, data=True) as copy:
        before_j = meter.read_j() if meter else None
        while len(times) < _STEPS or watch.seconds < _LEAST_S:
            with watch:
                copy.step()
            times.append(watch.last_seconds)
        after_j = meter.read_j() if meter else None
    spent_j = None if before_j is None or after_j is None or after_j <= before_j else (after_j - before_j) / len(times)
    return median(times), spent_j, source
