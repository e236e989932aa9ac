"""Rewarming beside a loop: after each cut the learning rate warms up again."""

from __future__ import annotations

from typing import final

from torch import Tensor
from torch.optim import Optimizer

from setpoint.loop.hooks import StepHooks
from setpoint.loop.loop import Loop


@final
class Rewarming:
    """After each cut the learning rate rises again to the schedule's, in a straight line.

    Args:
        loop: attached to the model.
        optimizer: trains it.
        steps: over which the learning rate rises.
    """

    flops = seconds = 0.0

    def __init__(self, loop: Loop, optimizer: Optimizer, steps: int) -> None:
        self.loop, self.optimizer, self.steps = loop, optimizer, steps
        self.seen, self.since, self.rates = dict(loop.widths), steps, list[float]()
        self.hooks = StepHooks((optimizer,), self._before_step, self._after_step)

    def observe(self, loss: Tensor) -> None:
        """Of no interest here."""

    def remove(self) -> None:
        """Take the hooks away."""
        self.hooks.remove()

    def _before_step(self, grad_scale: Tensor | None) -> None:
        if self.loop.widths != self.seen:
            self.seen, self.since = dict(self.loop.widths), 0
        share = min(1.0, (self.since + 1) / (self.steps + 1))
        self.since += 1
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] *= share

    def _after_step(self) -> None:
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate
