"""Leave-outs: saliency calibrated across layers by measuring what a few units are really missed by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import numpy as np
import torch
from torch import Tensor, nn

from setpoint.controller.plan import Observation, Plan
from setpoint.controller.priced import PricedController, PricedState
from setpoint.cost.cost import Cost
from setpoint.groups.group import Group
from setpoint_bench.counter import forward_flops
from setpoint_bench.silenced import without
from setpoint_bench.task import Task

_FARTHEST = 4.0
"""No group's saliency is multiplied or divided by more."""


@final
@dataclass(frozen=True, eq=False)
class LeaveOuts:
    """Revises a plan by measured losses: of each group, the units that the plan drops are left out together.

    Where it drops none of a group, its least salient tenth is left out. With L(g) the loss that rises on batches kept
    for this, and S(g) the sum of these units' saliencies, the saliency of every unit of group g is multiplied by
    `L(g) / S(g)`, within a factor of 4 of 1, and the units are chosen again at the same cost. The passes are counted.

    Args:
        task: whose loss it is.
        model: the live model.
        batches: that the loss is measured on.
    """

    task: Task
    model: nn.Module
    batches: Sequence[tuple[Tensor, Tensor]]

    def __call__(
        self,
        priced: PricedController,
        state: PricedState,
        plan: Plan,
        observation: Observation,
        cost: Cost,
        groups: tuple[Group, ...],
    ) -> Plan:
        """The plan by calibrated saliency; as it is where it drops nothing."""
        reading = observation.reading
        if not plan.drops() or reading is None or not reading.calibrated:
            return plan
        base, saliency, passes = self._loss(), {}, 1
        for group in groups:
            values = reading.saliency[group.name]
            out = np.flatnonzero(~plan.keep[group.name]) if group.name in plan.keep else np.zeros(0, dtype=np.int64)
            if not len(out):
                out = np.argsort(values)[: max(1, group.num_units // 10)]
            with without(self.model, groups, {group.name: out}):
                risen = self._loss() - base
            passes += 1
            told = float(values[out].sum())
            factor = risen / told if told > 0 else 1.0
            saliency[group.name] = values * float(np.clip(factor, 1 / _FARTHEST, _FARTHEST))
        flops = passes * len(self.batches) * forward_flops(self.model, self.task.example())
        return replace(priced.reordered(state, plan, observation, cost, groups, saliency), flops=plan.flops + flops)

    @torch.no_grad()
    def _loss(self) -> float:
        """Mean loss over the batches, normalised by their own statistics; the model's are left as they are."""
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        try:
            return float(torch.stack([self.task.loss(self.model, *batch) for batch in self.batches]).mean())
        finally:
            for buffer, value in buffers:
                buffer.copy_(value)
