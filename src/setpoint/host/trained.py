"""Trained: how many weights the optimizers train; those that were frozen when a loop began have no price in it."""

from __future__ import annotations

from collections.abc import Sequence

from torch.optim import Optimizer

from setpoint.warn import warn


class Trained:
    """Warns once when optimizers train more tensors than they did at first."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._optimizers: Sequence[Optimizer] = optimizers
        self._first = _count(optimizers)

    def check(self) -> None:
        """Compare with what was trained at first."""
        now = _count(self._optimizers)
        if now <= self._first:
            return
        self._optimizers = ()
        warn(
            f"the optimizer trains {now} tensors now, and trained {self._first} when the loop began: FLOPs are still "
            "counted as for those, so a step takes more than the loop reports. Call loop.detach(), and attach again"
        )


def _count(optimizers: Sequence[Optimizer]) -> int:
    groups = (settings["params"] for each in optimizers for settings in each.param_groups)
    return sum(parameter.requires_grad for parameters in groups for parameter in parameters)
