"""SNIP: the weights that the loss is least sensitive to go before training, by one look at one batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from setpoint_bench.baselines.rule import Allocation, Masks, Sight, Target, all_active


def connection_sensitivity(weight: Float[Tensor, "..."], gradient: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """`|w * dL/dw|`: how much the loss would move, to first order, if the weight went.

    >>> connection_sensitivity(torch.tensor([2.0, -1.0]), torch.tensor([-3.0, 0.5])).tolist()
    [6.0, 0.5]
    """
    return (weight * gradient).abs()


@final
@dataclass(frozen=True)
class Snip:
    """Keeps the weights of highest sensitivity on the first batch, all tensors ranked together, until the limit.

    The first step is taken with that batch's gradients too, as far as they belong to kept weights.
    Where the limit is one of FLOPs, a weight of a large feature map uses up more of it; the ranking is the paper's.

    References:
        Lee, Ajanthan, Torr: "SNIP: single-shot network pruning based on connection sensitivity", ICLR 2019.
    """

    allocation: Allocation = "uniform"
    dense_gradient: bool = False

    def start(self, weights: Mapping[str, Tensor], target: Target, generator: torch.Generator) -> Masks:
        """All weights: the first batch is needed to choose."""
        return all_active(weights)

    def due(self, step: int, total_steps: int) -> bool:
        """Ahead of the first optimizer step."""
        return step == 0

    def update(self, sight: Sight, target: Target, generator: torch.Generator) -> Masks:
        """The most sensitive weights whose cost together stays within the limit."""
        scores = {
            name: connection_sensitivity(weight, sight.gradients[name]).flatten()
            for name, weight in sight.weights.items()
        }
        costs = [torch.full_like(each, target.cost[name], dtype=torch.float64) for name, each in scores.items()]
        order = torch.argsort(torch.cat(list(scores.values())), descending=True, stable=True)
        within = torch.cat(costs)[order].cumsum(0) <= target.limit
        kept = torch.zeros_like(within)
        kept[order] = within
        parts = torch.split(kept, [each.numel() for each in scores.values()])
        return {name: part.view(sight.weights[name].shape) for name, part in zip(scores, parts, strict=True)}
