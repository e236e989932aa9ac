"""A Lagrangian with two multipliers: what holds an expected cost to a target while the cost is learned."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor


@final
class Lagrangian:
    """`l1 (c - t) + l2 (c - t)^2`, whose multipliers rise along its gradient; both change at every step.

    The quadratic term makes far misses dear at once. The linear one grows until none is left.

    Args:
        learning_rate: of both multipliers, by Adam.
        device: where the cost is computed.

    References:
        Wang, Wohlwend, Lei: "Structured pruning of large language models", EMNLP 2020, section 3.3.

    >>> lagrangian = Lagrangian(learning_rate=0.5, device=torch.device("cpu"))
    >>> for _ in range(2):
    ...     penalty = lagrangian.penalty(torch.tensor(0.9), target=0.5)
    ...     penalty.backward()
    ...     lagrangian.rise()
    >>> [round(float(each), 2) for each in lagrangian.multipliers.detach()]
    [1.0, 1.0]
    """

    def __init__(self, learning_rate: float, device: torch.device) -> None:
        self.multipliers = torch.zeros(2, device=device, requires_grad=True)
        self._optimizer = torch.optim.Adam([self.multipliers], lr=learning_rate, maximize=True)

    def penalty(self, cost: Tensor, target: float) -> Tensor:
        """What a cost adds to the loss; its backward pass reaches the multipliers, too.

        Args:
            cost: expected cost as a share of the dense one, 0-dim.
            target: share that it is to have.
        """
        apart = cost - target
        return self.multipliers[0] * apart + self.multipliers[1] * apart.square()

    def rise(self) -> None:
        """Move the multipliers along the gradients that backward passes have left."""
        self._optimizer.step()
        self._optimizer.zero_grad()
