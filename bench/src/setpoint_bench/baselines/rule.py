"""A rule: which single weights are active, at the start and from update to update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Masks = Mapping[str, Bool[Tensor, "..."]]
"""By name of the weight tensor, a boolean per element, True = active."""

Allocation = Literal["erk", "uniform"]
"""How a density is spread over tensors: by `erk_densities`, or the same for all."""


@dataclass(frozen=True, eq=False)
class Target:
    """What a rule must come to, at the latest with its last update.

    Args:
        counts: active weights of each tensor.
        cost: what one active weight of each tensor costs, in the unit of `limit`.
        limit: what all active weights may cost together: FLOPs, or simply their number.
    """

    counts: Mapping[str, int]
    cost: Mapping[str, float]
    limit: float


@dataclass(frozen=True, eq=False)
class Sight:
    """What a rule sees at an update: gradients are ready, weights not yet moved.

    Args:
        step: optimizer steps done.
        total_steps: optimizer steps of the whole run.
        weights: present values, zero where a weight is not active.
        gradients: of the loss, for active and other weights alike.
        masks: active weights so far.
    """

    step: int
    total_steps: int
    weights: Mapping[str, Float[Tensor, "..."]]
    gradients: Mapping[str, Float[Tensor, "..."]]
    masks: Masks


@runtime_checkable
class Rule(Protocol):
    """Chooses active weights. It holds settings only, and the same arguments get the same answer."""

    @property
    def allocation(self) -> Allocation:
        """How it wants its density spread over tensors."""
        ...

    @property
    def dense_gradient(self) -> bool:
        """Whether an update looks at the gradients of weights that are not active, which cost FLOPs to know."""
        ...

    def start(self, weights: Mapping[str, Tensor], target: Target, generator: torch.Generator) -> Masks:
        """Active weights before the first step."""
        ...

    def due(self, step: int, total_steps: int) -> bool:
        """Whether there is an update ahead of the optimizer step that follows `step` others."""
        ...

    def update(self, sight: Sight, target: Target, generator: torch.Generator) -> Masks:
        """Active weights from this step on."""
        ...


def all_active(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks that keep everything."""
    return {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}


def highest(scores: Float[Tensor, "..."], count: int) -> Bool[Tensor, "..."]:
    """A mask of the `count` highest scores, of equal ones the first; NaN is lower than anything. Time O(elements).

    >>> highest(torch.tensor([[1.0, 3.0], [3.0, 2.0]]), 2).tolist()
    [[False, True], [True, False]]
    """
    flat = torch.where(scores.isnan(), -torch.inf, scores).flatten()
    if count < 1:
        return torch.zeros_like(scores, dtype=torch.bool)
    bound = flat.kthvalue(flat.numel() - count + 1).values
    mask = flat > bound
    mask[(flat == bound).nonzero().flatten()[: count - int(mask.sum())]] = True
    return mask.view(scores.shape)
