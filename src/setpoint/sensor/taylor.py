"""The Taylor sensor: saliency from the gradients that an ordinary training step leaves behind."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from setpoint.distributed import Ranks
from setpoint.sensor.averaging import AveragingSensor
from setpoint.sensor.criterion import Values, criterion
from setpoint.sensor.reading import Traits
from setpoint.sensor.units import Units

_IN_LOSS = Traits(shards=True, hooks=True)


def curvature(mean: Values, variance: Values, num_samples: int) -> Values:
    """Half the Fisher diagonal of a gate, `1/2 (B var(r) + mean(r)^2)`."""
    saliency: Values = 0.5 * (num_samples * variance + mean**2)
    return saliency


def with_slope(mean: Values, variance: Values, num_samples: int) -> Values:
    """The same with the first-order term."""
    saliency: Values = np.maximum(0.0, curvature(mean, variance, num_samples) - mean)
    return saliency


@criterion(saliency=curvature, traits=_IN_LOSS, is_slope=True)
def taylor(units: Units) -> Tensor:
    """Gate gradient `r = sum of w * dL/dw` over the weights that read a unit."""
    return units.add_up(torch.mul) + units.tapped()


@criterion(saliency=with_slope, traits=_IN_LOSS, is_slope=True)
def taylor_with_slope(units: Units) -> Tensor:
    """The same, of which the slope counts too."""
    return taylor.measure(units)


class TaylorSensor(AveragingSensor):
    """Taylor estimate of the loss increase when a unit is dropped, from its gate's gradient.

    A gate g on a unit's output is 1 now and 0 when the unit is dropped. With `r = dL/dg` at g = 1, the loss changes by

        L(0) - L(1) = -r + 1/2 d2L/dg2 + ...

    *The gate's gradient* needs no gate in the forward pass (Molchanov et al. 2019). The gate could as well scale every
    weight that reads the unit. By the chain rule, exactly and for any activation, `r = sum of w * dL/dw over the unit's
    outgoing ("consume") weights`.

    *The curvature* (optimal brain damage, LeCun et al. 1990; by the Fisher information, Theis et al. 2018). For a
    log-likelihood loss the expected curvature is the Fisher diagonal `E[r_sample^2]`, where `r_sample` is the gate
    gradient of one sample's loss. A step shows only the mean of B samples, whose variance over steps is `var(r) =
    var(r_sample) / B`; hence `E[r_sample^2] = B var(r) + mean(r)^2`. With mean and variance over recent steps,

        saliency = 1/2 (B var(r) + mean(r)^2)                          by default,
        saliency = max(0, -mean(r) + 1/2 (B var(r) + mean(r)^2))       with first_order=True.

    The first-order term is a local slope and left out by default, since a drop is a large step: before a normalisation
    the slopes of a group add up to zero, whatever the units are worth.

    Saliency has the unit of the loss. Gradients that are clipped or scaled before the optimizer's step scale r, too. A
    weight that is tied to another one carries the gradients of both.

    Mean and variance are exponentially weighted with decay `1 - 1/window`, without start-up bias, in float32 (float64
    for float64 models). A step in which any gradient is NaN or infinite is left out and counted. Each rank adds up its
    own part of sharded weights, and one sum over ranks makes r exact. While outgoing weights of a group are frozen in
    the middle of a run, its earlier readings stand.

    *Weights that are frozen from the beginning* (the base of a low-rank adapter) have no gradient. The gate may as well
    scale the layer's inputs: `r = sum of x * dL/dx over the unit's inputs x of that layer`. A hook on the layer (`Tap`)
    keeps x until the backward pass and reads r there, at the scale that gradients have at the step (under
    `fully_shard`, at that of the backward pass). One all-reduce at each update averages it over ranks.

    Args:
        num_samples: independent samples behind each optimizer step's gradient (B), over ranks and micro-batches.
        window: number of recent steps that count, in optimizer steps.
        first_order: whether the slope counts too.
        ranks: over which gradients are averaged, where what hooks read is to be averaged too.

    Raises:
        ValueError: if either is not a positive integer.

    References:
        Molchanov et al.: "Importance Estimation for Neural Network Pruning", CVPR 2019. LeCun, Denker, Solla: "Optimal
        Brain Damage", NIPS 1990. Theis et al.: "Faster gaze prediction with dense networks and Fisher pruning", 2018.

    >>> import setpoint
    >>> from torch import nn
    >>> model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(16, 4)
    >>> optimizer, sensor = torch.optim.SGD(model.parameters(), lr=0.1), TaylorSensor(num_samples=16, window=20)
    >>> loop = setpoint.attach(model, optimizer, 0.5, total_steps=30, example=(x,), sensor=sensor)
    >>> model(x).square().mean().backward()
    >>> optimizer.step()
    >>> loop.reading().saliency["0"].shape
    (8,)
    >>> loop.detach()
    """

    def __init__(
        self, num_samples: int, window: int = 50, first_order: bool = False, ranks: Ranks | None = None
    ) -> None:
        super().__init__(taylor_with_slope if first_order else taylor, num_samples, window, ranks)
        self.first_order = first_order
