"""Random switch-offs beside a loop: in each step of training some units are silent, until the loop has landed."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from setpoint.loop.hooks import StepHooks
from setpoint.loop.loop import Loop
from setpoint_bench.silenced import outgoing, without


@final
class SwitchOffs:
    """Excitation: a step's forward and backward pass do without a random share of each group's units.

    Their outgoing weights are zero in the pass, are back before the optimizer moves, and have no gradient.

    Args:
        loop: attached to the model.
        model: the model.
        optimizer: trains it.
        share: of each group's units, drawn anew for each step.

    References:
        Srivastava et al., "Dropout", JMLR 15, 2014. Gomez et al., "Learning sparse networks using targeted dropout",
        2019: units that may go are made to be missed less.
    """

    flops = seconds = 0.0

    def __init__(self, loop: Loop, model: nn.Module, optimizer: Optimizer, share: float) -> None:
        self.loop, self.model, self.share = loop, model, share
        self.silent, self.places = ExitStack(), list[tuple[nn.Parameter, int, Tensor]]()
        self.armed = True
        self.handle = model.register_forward_pre_hook(lambda *seen: self._switch_off(*seen))
        self.hooks = StepHooks((optimizer,), lambda _: None, self._arm)

    def observe(self, loss: Tensor) -> None:
        """All units are back, with gradients only where they took part."""
        self.silent.close()
        for weight, dim, entries in self.places:
            if weight.grad is not None:
                weight.grad.index_fill_(dim, entries, 0.0)
        self.places = []

    def remove(self) -> None:
        """Take the hooks away, with all units back."""
        self.silent.close()
        self.hooks.remove()
        self.handle.remove()

    def _arm(self) -> None:
        self.armed = not self.loop.landed

    def _switch_off(self, model: nn.Module, args: Any) -> None:
        if model is not self.model or not (self.armed and model.training and torch.is_grad_enabled()):
            return
        self.armed = False
        off = {
            group.name: torch.nonzero(torch.rand(group.num_units) < self.share).flatten().numpy()
            for group in self.loop.groups
        }
        self.places = outgoing(model, self.loop.groups, off)
        self.silent.enter_context(without(model, self.loop.groups, off))
