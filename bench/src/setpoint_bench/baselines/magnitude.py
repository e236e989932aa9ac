"""Magnitude pruning of single weights: the smallest go, once or little by little."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from setpoint_bench.baselines.rule import Allocation, Masks, Sight, Target, all_active, highest
from setpoint_bench.baselines.schedule import cubic_density


@final
@dataclass(frozen=True)
class OneShot:
    """The smallest weights of each tensor go at once, before the first step.

    References:
        Han, Pool, Tran, Dally: "Learning both weights and connections for efficient neural networks", NIPS 2015.
    """

    allocation: Allocation = "uniform"
    dense_gradient: bool = False

    def start(self, weights: Mapping[str, Tensor], target: Target, generator: torch.Generator) -> Masks:
        """The largest weights of each tensor."""
        return {name: highest(weight.abs(), target.counts[name]) for name, weight in weights.items()}

    def due(self, step: int, total_steps: int) -> bool:
        """Never."""
        return False

    def update(self, sight: Sight, target: Target, generator: torch.Generator) -> Masks:
        """Nothing changes."""
        return sight.masks


@final
@dataclass(frozen=True)
class Gradual:
    """Gradual magnitude pruning (GMP): the smallest active weights go, along a cubic schedule.

    A weight that has gone does not come back.

    Args:
        begin: fraction of the run that stays dense.
        end: fraction of the run by which the final density is reached.
        num_updates: number of updates in between, in runs too short for that one per step.
        allocation: the paper gives all tensors the same density.
        dense_gradient: not needed.

    Raises:
        ValueError: unless `0 <= begin < end <= 1` and there is an update.

    References:
        Zhu, Gupta: "To prune, or not to prune: exploring the efficacy of pruning for model compression",
        ICLR workshop 2018.
    """

    begin: float = 0.05
    end: float = 0.7
    num_updates: int = 50
    allocation: Allocation = "uniform"
    dense_gradient: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.begin < self.end <= 1 or self.num_updates < 1:
            raise ValueError(f"gradual pruning needs 0 <= begin < end <= 1 and at least one update, got {self!r}")

    def start(self, weights: Mapping[str, Tensor], target: Target, generator: torch.Generator) -> Masks:
        """All weights."""
        return all_active(weights)

    def due(self, step: int, total_steps: int) -> bool:
        """Evenly from `begin` to `end`, the last one at `end`."""
        first, last = self._span(total_steps)
        if not first < step <= last:
            return False
        spacing = (last - first) / self.num_updates
        return int((step - first) / spacing) > int((step - 1 - first) / spacing) or step == last

    def update(self, sight: Sight, target: Target, generator: torch.Generator) -> Masks:
        """The largest active weights, as many as the schedule allows."""
        first, last = self._span(sight.total_steps)
        progress = (sight.step - first) / (last - first)
        masks = {}
        for name, weight in sight.weights.items():
            final = target.counts[name] / weight.numel()
            count = max(round(cubic_density(progress, final=final) * weight.numel()), target.counts[name])
            masks[name] = highest(weight.abs().masked_fill(~sight.masks[name], -1.0), count)
        return masks

    def _span(self, total_steps: int) -> tuple[int, int]:
        last = max(0, min(round(self.end * total_steps), total_steps - 1))
        return min(round(self.begin * total_steps), last - 1), last
