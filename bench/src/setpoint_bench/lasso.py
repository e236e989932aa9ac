"""A group lasso beside a loop: a penalty on the units that may be cut, until the loop has met its budget."""

from __future__ import annotations

from typing import final

from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from setpoint.loop.hooks import StepHooks
from setpoint.loop.loop import Loop
from setpoint.spending.seconds import Stopwatch
from setpoint_bench.baselines.group_lasso import add_lasso_gradient, lasso_norms, lasso_strength, shrink_by_lasso


@final
class Lasso:
    """A group lasso on the units that a loop may cut.

    Under SGD, as in the paper, the penalty's gradient joins the loss's. Adam and its kind would divide it by the size
    of the loss's own gradient, so that it takes whole layers where that is small; there units shrink in a step apart,
    as weight decay is decoupled (Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019).

    Args:
        loop: attached to the model.
        model: the model.
        optimizer: trains it.
        ratio: penalty / (loss + penalty) at the first step, from which the penalty's weight follows.
    """

    def __init__(self, loop: Loop, model: nn.Module, optimizer: Optimizer, ratio: float) -> None:
        self.loop, self.model, self.optimizer, self.ratio = loop, model, optimizer, ratio
        self.loss: Tensor | None = None
        self.strength: Tensor | None = None
        self.watch = Stopwatch(synchronize=True)
        self.hooks = StepHooks((optimizer,), self._before_step, self._after_step)

    @property
    def seconds(self) -> float:
        """Seconds that the penalty has taken."""
        return self.watch.seconds

    @property
    def flops(self) -> float:
        """None are counted: norms are elementwise work."""
        return 0.0

    def observe(self, loss: Tensor) -> None:
        """Remember the loss."""
        self.loss = loss

    def remove(self) -> None:
        """Take the hooks away."""
        self.hooks.remove()

    def _before_step(self, grad_scale: Tensor | None) -> None:
        if self.loop.budget_met:
            return
        with self.watch:
            if self.strength is None:
                assert self.loss is not None, "observe() comes before the optimizer's step"
                self.strength = lasso_strength(self.loss, lasso_norms(self.model, self.loop.groups), self.ratio)
            if isinstance(self.optimizer, SGD):
                add_lasso_gradient(self.model, self.loop.groups, self.strength)

    def _after_step(self) -> None:
        if self.loop.budget_met or self.strength is None or isinstance(self.optimizer, SGD):
            return
        with self.watch:
            rates = {id(each): float(group["lr"]) for group in self.optimizer.param_groups for each in group["params"]}
            shrink_by_lasso(self.model, self.loop.groups, self.strength, rates)
