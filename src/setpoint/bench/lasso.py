"""A loop with a group lasso: the penalty's gradient joins the loss's until the loop has landed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

from torch import Tensor, nn
from torch.optim import Optimizer

from setpoint.baselines.group_lasso import add_lasso_gradient, lasso_norms, lasso_strength
from setpoint.bench.course import Outcome
from setpoint.bench.looped import Looped
from setpoint.loop import Loop
from setpoint.loop.hooks import StepHooks


@final
class LassoLooped:
    """The pruner that is a loop, and a group lasso on the units that the loop may cut.

    Args:
        loop: attached to the model.
        model: the model.
        optimizer: trains it.
        ratio: penalty / (loss + penalty) at the first step, from which the penalty's weight follows.
    """

    def __init__(self, loop: Loop, model: nn.Module, optimizer: Optimizer, ratio: float) -> None:
        self.looped, self.model, self.ratio = Looped(loop), model, ratio
        self.loss: Tensor | None = None
        self.strength: Tensor | None = None
        self.hooks = StepHooks((optimizer,), self._before_step, lambda: None)

    @property
    def widths(self) -> Mapping[str, int]:
        """Active units by group."""
        return self.looped.widths

    def observe(self, loss: Tensor) -> None:
        """Remember the loss, and hand it on."""
        self.loss = loss
        self.looped.observe(loss)

    def finish(self) -> Outcome:
        """Take the hooks away and finish the loop."""
        self.hooks.remove()
        return self.looped.finish()

    def _before_step(self, grad_scale: Tensor | None) -> None:
        loop = self.looped.loop
        if loop.landed:
            return
        if self.strength is None:
            assert self.loss is not None, "observe() comes before the optimizer's step"
            self.strength = lasso_strength(self.loss, lasso_norms(self.model, loop.groups), self.ratio)
        add_lasso_gradient(self.model, loop.groups, self.strength)
