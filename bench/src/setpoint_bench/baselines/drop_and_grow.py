"""Sparse training from a random start: static masks, and masks whose smallest weights are replaced (SET, RigL)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from setpoint_bench.baselines.rule import Allocation, Masks, Sight, Target, highest
from setpoint_bench.baselines.schedule import cosine_fraction

Growth = Literal["random", "gradient"]
"""Which inactive weights come in: any (SET), or those of the largest gradient (RigL)."""


def random_masks(weights: Mapping[str, Tensor], target: Target, generator: torch.Generator) -> dict[str, Tensor]:
    """Masks of the target's counts, drawn at random."""
    return {
        name: highest(torch.rand(weight.shape, generator=generator).to(weight.device), target.counts[name])
        for name, weight in weights.items()
    }


@final
@dataclass(frozen=True)
class Static:
    """A random mask that never changes."""

    allocation: Allocation = "erk"
    dense_gradient: bool = False

    def start(self, weights: Mapping[str, Tensor], target: Target, generator: torch.Generator) -> Masks:
        """Random weights."""
        return random_masks(weights, target, generator)

    def due(self, step: int, total_steps: int) -> bool:
        """Never."""
        return False

    def update(self, sight: Sight, target: Target, generator: torch.Generator) -> Masks:
        """Nothing changes."""
        return sight.masks


@final
@dataclass(frozen=True)
class DropAndGrow:
    """At every update the smallest active weights of each tensor make room for as many others.

    With `k = cosine_fraction(step) * active weights` rounded down, the k active weights of least magnitude go and
    k come in with the value zero: random ones in SET, those of the largest `|dL/dw|` in RigL. What has just gone may
    come in again, and then keeps its value. The number of active weights never changes.
    The update precedes the optimizer's step on the same batch (the papers' pseudocode leaves that step out).

    Args:
        growth: "random" for SET, "gradient" for RigL.
        fraction: share of the active weights dropped for others at the beginning (alpha).
        period: optimizer steps between updates (delta T); 0 for 100, or a fortieth of the run where that is less.
        end: fraction of the run after which masks stay (T_end).
        allocation: how the density is spread over tensors.

    Raises:
        ValueError: for a setting out of range.

    References:
        SET: Mocanu, Mocanu, Stone, Nguyen, Gibescu, Liotta, Nature Communications 9 (2018), there without the
        cosine. RigL: Evci, Gale, Menick, Castro, Elsen, ICML 2020, which gives it to both.
    """

    growth: Growth
    fraction: float = 0.3
    period: int = 0
    end: float = 0.75
    allocation: Allocation = "erk"

    def __post_init__(self) -> None:
        if not (0 < self.fraction < 1 and self.period >= 0 and 0 < self.end <= 1):
            raise ValueError(f"drop and grow needs 0 < fraction < 1, period >= 0 and 0 < end <= 1, got {self!r}")
        if self.growth not in ("random", "gradient"):
            raise ValueError(f"growth must be 'random' or 'gradient', got {self.growth!r}")

    @property
    def dense_gradient(self) -> bool:
        """RigL looks at all gradients when it updates."""
        return self.growth == "gradient"

    def start(self, weights: Mapping[str, Tensor], target: Target, generator: torch.Generator) -> Masks:
        """Random weights."""
        return random_masks(weights, target, generator)

    def due(self, step: int, total_steps: int) -> bool:
        """Every period until the end of drop and grow."""
        period = self.period or max(1, min(100, total_steps // 40))
        return 0 < step < round(self.end * total_steps) and step % period == 0

    def update(self, sight: Sight, target: Target, generator: torch.Generator) -> Masks:
        """The masks after one drop and grow."""
        share = cosine_fraction(sight.step, round(self.end * sight.total_steps), self.fraction)
        return {name: self._dropped_and_grown(sight, name, share, generator) for name in sight.weights}

    def _dropped_and_grown(self, sight: Sight, name: str, share: float, generator: torch.Generator) -> Tensor:
        weight, mask = sight.weights[name], sight.masks[name]
        active = int(mask.sum())
        count = int(share * active)
        stays = highest(weight.abs().masked_fill(~mask, -1.0), active - count)
        if self.growth == "gradient":
            scores = sight.gradients[name].abs()
        else:
            scores = torch.rand(weight.shape, generator=generator).to(weight.device)
        return stays | highest(scores.masked_fill(stays, -1.0), count)
