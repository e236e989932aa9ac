"""A loop whose learning rate warms up again after each cut."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

from torch import Tensor
from torch.optim import Optimizer

from setpoint.bench.course import Outcome
from setpoint.bench.looped import Looped
from setpoint.loop import Loop
from setpoint.loop.hooks import StepHooks


@final
class RewarmedLooped:
    """The pruner that is a loop; after each cut the learning rate rises again to the schedule's, in a straight line.

    Args:
        loop: attached to the model.
        optimizer: trains it.
        steps: over which the learning rate rises.
    """

    def __init__(self, loop: Loop, optimizer: Optimizer, steps: int) -> None:
        self.looped, self.optimizer, self.steps = Looped(loop), optimizer, steps
        self.seen, self.since, self.rates = dict(self.widths), steps, list[float]()
        self.hooks = StepHooks((optimizer,), self._before_step, self._after_step)

    @property
    def widths(self) -> Mapping[str, int]:
        """Active units by group."""
        return self.looped.widths

    def observe(self, loss: Tensor) -> None:
        """Hand the loss on."""
        self.looped.observe(loss)

    def finish(self) -> Outcome:
        """Take the hooks away and finish the loop."""
        self.hooks.remove()
        return self.looped.finish()

    def _before_step(self, grad_scale: Tensor | None) -> None:
        if self.widths != self.seen:
            self.seen, self.since = dict(self.widths), 0
        share = min(1.0, (self.since + 1) / (self.steps + 1))
        self.since += 1
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] *= share

    def _after_step(self) -> None:
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate
