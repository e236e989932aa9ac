"""Hard concrete gates: random numbers in [0, 1] that are exactly 0 or 1 with a probability that can be learned."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

TEMPERATURE = 2 / 3
"""beta of the paper: the lower, the nearer draws are to 0 and 1."""
LOW, HIGH = -0.1, 1.1
"""gamma and zeta of the paper: draws are stretched to this interval, and what lies beyond 0 and 1 is cut off."""
FARTHEST = math.log(100.0)
"""Logits stay within plus and minus this, as in the authors' code: beyond it hardly any gradient would lead back."""
_TINY = 1e-6


def drawn(logits: Float[Tensor, "*units"], uniform: Float[Tensor, "*units"]) -> Float[Tensor, "*units"]:
    """Gates drawn by the inverse of their distribution, so that gradients reach the logits.

    `s = sigmoid((log u - log(1 - u) + logit) / beta)`, and the gate is `min(1, max(0, s * (zeta - gamma) + gamma))`.

    Args:
        logits: log alpha of each gate.
        uniform: u, uniform in [0, 1].

    References:
        Louizos, Welling, Kingma: "Learning sparse neural networks through L0 regularization", ICLR 2018, section 2.2.

    >>> [round(float(gate), 3) for gate in drawn(torch.zeros(3), torch.tensor([0.1, 0.5, 0.9]))]
    [0.0, 0.5, 1.0]
    """
    u = uniform.clamp(_TINY, 1.0 - _TINY)
    s = torch.sigmoid((torch.log(u) - torch.log(1.0 - u) + logits) / TEMPERATURE)
    return (s * (HIGH - LOW) + LOW).clamp(0.0, 1.0)


def probability_above(logits: Float[Tensor, "*units"], threshold: float = 0.0) -> Float[Tensor, "*units"]:
    """Probability that a gate is above a threshold in [0, 1): `sigmoid(logit - beta log((t - gamma) / (zeta - t)))`.

    At 0 it is the probability that the unit is there. Its integral over t from 0 to 1 is the mean of the gate.

    >>> [round(float(p), 3) for p in probability_above(torch.tensor([-1.6, 0.0, 10.0]))]
    [0.5, 0.832, 1.0]
    """
    return torch.sigmoid(logits - TEMPERATURE * math.log((threshold - LOW) / (HIGH - threshold)))


def logit_of(probability: float) -> float:
    """The logit at which a gate is above 0 with this probability.

    >>> round(float(probability_above(torch.tensor(logit_of(0.9)))), 3)
    0.9
    """
    return math.log(probability / (1.0 - probability)) + TEMPERATURE * math.log(-LOW / HIGH)


def settled(logits: Float[Tensor, "*units"]) -> Float[Tensor, "*units"]:
    """The value of a gate when nothing is drawn: `min(1, max(0, sigmoid(logit) * (zeta - gamma) + gamma))`.

    >>> [round(float(gate), 3) for gate in settled(torch.tensor([-3.0, 0.0, 3.0]))]
    [0.0, 0.5, 1.0]
    """
    return (torch.sigmoid(logits) * (HIGH - LOW) + LOW).clamp(0.0, 1.0)
