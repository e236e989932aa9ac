"""Movement scores beside a loop: the movements of every unit, added up over all steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor, nn
from torch.optim import Optimizer

from setpoint.groups.group import Group
from setpoint.loop.hooks import StepHooks
from setpoint.loop.loop import Loop
from setpoint.spending.seconds import Stopwatch
from setpoint_bench.baselines.movement import Movements, places_of

_FLOPS_PER_WEIGHT = 2.0
"""A product and a sum."""


@final
class MovementScores:
    """Adds up each unit's movement before every optimizer step, until the loop has met its budget.

    Args:
        model: whose units move.
        optimizer: trains it.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.model = model
        self.watch = Stopwatch(synchronize=True)
        self.flops = 0.0
        self._sums: dict[str, Tensor] = {}
        self._groups: tuple[Group, ...] = ()
        self._movements: dict[str, Movements] = {}
        self._hooks = StepHooks((optimizer,), self._before_step, lambda: None)

    def start(self, loop: Loop) -> None:
        """Keep scores of the units of this loop, from the coming step on."""
        self.loop = loop
        self._find()
        self._sums = {name: torch.zeros_like(each.now()) for name, each in self._movements.items()}

    @property
    def seconds(self) -> float:
        """Seconds that scores have taken."""
        return self.watch.seconds

    def observe(self, loss: Tensor) -> None:
        """The loss plays no part."""

    def remove(self) -> None:
        """Take the hooks away."""
        self._hooks.remove()

    def readable(self, groups: tuple[Group, ...], model: nn.Module) -> tuple[Group, ...]:
        """Groups that trained matrices write or read."""
        return tuple(group for group in groups if places_of(group, model))

    def scores(self, groups: tuple[Group, ...]) -> Mapping[str, Float64[np.ndarray, " _units"]]:
        """The sums so far of the active units."""
        sums = {name: each.double().cpu().numpy() for name, each in self._sums.items()}
        return {group.name: sums[group.name][self.loop.origin[group.name]] for group in groups}

    def _find(self) -> None:
        """Where units lie in the model as it is now."""
        self._groups, device = self.loop.groups, next(self.model.parameters()).device
        self._movements = {group.name: Movements.of(group, self.model) for group in self._groups}
        self._origin = {name: torch.from_numpy(units).to(device) for name, units in self.loop.origin.items()}

    def _before_step(self, grad_scale: Tensor | None) -> None:
        if self.loop.budget_met:
            return
        with self.watch:
            if self.loop.groups is not self._groups:
                self._find()
            for name, each in self._movements.items():
                self._sums[name].index_add_(0, self._origin[name], each.now())
                self.flops += _FLOPS_PER_WEIGHT * sum(weight.numel() for weight, _ in each.parts)
