"""The gate network: one small network, shared by all units, from a unit's features to its gate."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

_DECAY = (0.9, 0.99)
_EPSILON = 1e-8
_STEEPEST = 30.0
"""No logit is larger: its exponential, the gate's odds, stays far from the ends of float32."""


@dataclass(frozen=True, eq=False)
class GateNet:
    """Two hidden layers, and the memory of their own optimizer (Adam); plain float32 tensors on the host.

    A gate's logit is the first feature plus what the layers make of all features.
    """

    weights: tuple[Tensor, ...]  # matrices and biases, in the order in which they act
    mean: tuple[Tensor, ...]  # Adam's running mean of each one's gradient
    square: tuple[Tensor, ...]  # Adam's running mean of its square
    count: int = 0  # steps of Adam done

    @classmethod
    def fresh(cls, num_features: int, hidden: int, seed: int) -> GateNet:
        """A network that adds nothing yet to the first feature; it draws from a generator of its own.

        >>> net = GateNet.fresh(num_features=2, hidden=48, seed=0)
        >>> net.num_weights, net.logits(torch.tensor([[1.0, 5.0], [-2.0, 5.0]])).tolist()
        (2545, [1.0, -2.0])
        """
        generator = torch.Generator(device="cpu").manual_seed(seed)
        weights: list[Tensor] = []
        for fan_in in (num_features, hidden):
            matrix = torch.randn(hidden, fan_in, generator=generator, dtype=torch.float32, device="cpu")
            weights += [matrix / fan_in**0.5, torch.zeros(hidden, dtype=torch.float32, device="cpu")]
        weights += [torch.zeros(size, dtype=torch.float32, device="cpu") for size in ((1, hidden), (1,))]
        zeros = tuple(torch.zeros_like(weight) for weight in weights)
        return cls(tuple(weights), zeros, zeros)

    @property
    def num_weights(self) -> int:
        return sum(weight.numel() for weight in self.weights)

    def logits(self, features: Float[Tensor, "units features"]) -> Float[Tensor, " units"]:
        """Logit of each unit's gate, within +-30, in float32 whatever mode the user's training is in."""
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return _logits(self.weights, features)

    def trained(
        self,
        features: Float[Tensor, "units features"],
        slope: Float[Tensor, " units"],
        curvature: Float[Tensor, " units"],
        steps: int,
        learning_rate: float,
    ) -> GateNet:
        """The network after so many steps of Adam down the gradient of `J = sum of J_u`, with

            dJ_u/dg_u = slope - curvature * (1 - g_u) + 1,

        the slope of the loss along the unit's gate, as far as a quadratic tells it, plus what the unit costs; both
        counted in that cost, price x saving. Each is divided by `1 + curvature`, which moves no unit's optimum, and
        without which the few most salient units would drown out all others.

        Args:
            slope: mean gradient of the loss with respect to the open gate, r, / (price x saving).
            curvature: second derivative of the loss by the gate / (price x saving).
        """
        net = self
        with torch.enable_grad(), torch.autocast("cpu", enabled=False):
            for _ in range(steps):
                weights = tuple(weight.detach().requires_grad_() for weight in net.weights)
                gates = torch.sigmoid(_logits(weights, features))
                towards = (slope - curvature * (1.0 - gates.detach()) + 1.0) / (1.0 + curvature) / len(gates)
                gradients = torch.autograd.grad(gates, weights, grad_outputs=towards)
                net = net._stepped(gradients, learning_rate)
        return net

    def _stepped(self, gradients: tuple[Tensor, ...], learning_rate: float) -> GateNet:
        """One step of Adam (Kingma and Ba, ICLR 2015)."""
        count, (first, second) = self.count + 1, _DECAY
        mean = tuple(torch.lerp(g, m, first) for g, m in zip(gradients, self.mean, strict=True))
        square = tuple(torch.lerp(g * g, s, second) for g, s in zip(gradients, self.square, strict=True))
        rate, bias = learning_rate / (1 - first**count), 1 - second**count
        weights = tuple(
            w - rate * m / ((s / bias).sqrt() + _EPSILON) for w, m, s in zip(self.weights, mean, square, strict=True)
        )
        return replace(self, weights=weights, mean=mean, square=square, count=count)


def _logits(weights: tuple[Tensor, ...], features: Tensor) -> Tensor:
    inner = features
    for place in (0, 2):
        inner = F.silu(F.linear(inner, weights[place], weights[place + 1]))
    added = F.linear(inner, weights[4], weights[5]).squeeze(1)
    return (features[:, 0] + added).clamp(-_STEEPEST, _STEEPEST)
