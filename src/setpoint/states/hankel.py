"""The Hankel sensor: states ranked by Hankel singular value, weighed by what their layer is worth to the loss."""

from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Float64
from torch import nn

from setpoint.errors import GroupError, StateSpaceError
from setpoint.groups.follow import of_groups
from setpoint.groups.group import Group
from setpoint.groups.states import state_layer
from setpoint.sensor.reading import Reading, Sensor
from setpoint.sensor.taylor import Moments, TaylorSensor
from setpoint.states.balance import Balance, balance, check_system
from setpoint.states.modes import BalancedPairs


@dataclass(frozen=True, eq=False)
class HankelState:
    """The model whose live layers are read, and the running moments of each whole layer's gate gradient."""

    model: nn.Module = field(metadata={"live": True})
    layers: Moments = field(metadata=of_groups(None))  # one unit a layer, whatever its states


class HankelSensor(Sensor[HankelState]):
    """Saliency of balanced states.

    Unit i of a group of kind "state" is the i-th pair of states of the layer's real form in *balanced* coordinates,
    from the largest Hankel singular value down. Its energy is `e_i = sigma_{2i}^2 + sigma_{2i+1}^2` (summed over
    channels where a layer runs one system for each).

    A Hankel value says how much of a layer's output is at stake, not what that output is good for. So the sensor puts
    one gate on the output of all states of a layer; its gradient, `r = sum of C * dL/dC`, is the same in all
    coordinates, and `TaylorSensor` estimates from it the loss `S` of a layer without its states. Units share
    `S` by energy:

        saliency_i = S * e_i / sum of e

    Saliencies can be compared across layers and with units of other kinds (`Reading.calibrated`). They are
    estimates: output error is proportional to energy at best, and the removal of all states is a large step for a
    second-order expansion.

    The reading carries the balancing pair in `Reading.basis`, for the actuator.

    Args:
        num_samples: independent samples behind each optimizer step's gradient.
        window: number of recent steps that count, in optimizer steps.

    Raises:
        ValueError: if either is not a positive integer.

    References:
        Moore: "Principal component analysis in linear systems", IEEE TAC 26(1), 1981. CompreSSM: "The Curious Case of
        In-Training Compression of State Space Models", ICLR 2026 (ranking by Hankel values in training).

    >>> import setpoint
    >>> from setpoint_bench.models import LRU  # pip install setpoint-bench
    >>> model, x = nn.Sequential(nn.Linear(1, 4), LRU(4, 8), nn.Linear(4, 2)), torch.randn(4, 12, 1)
    >>> optimizer, sensor = torch.optim.SGD(model.parameters(), lr=0.01), HankelSensor(num_samples=4)
    >>> with setpoint.attach(model, optimizer, "70% params", total_steps=20, example=(x,), sensor=sensor) as loop:
    ...     for _ in range(20):
    ...         model(x).square().mean().backward()
    ...         optimizer.step()
    ...         optimizer.zero_grad()
    >>> loop.dense_widths, loop.widths
    ({'1': 8}, {'1': 5})
    """

    def __init__(self, num_samples: int, window: int = 50) -> None:
        self.taylor = TaylorSensor(num_samples, window)

    def readable(self, groups: tuple[Group, ...], model: nn.Module) -> tuple[Group, ...]:
        return self.taylor.readable(tuple(group for group in groups if _is_balanceable(model, group)), model)

    def init(self, groups: tuple[Group, ...], model: nn.Module) -> HankelState:
        for group in groups:
            name, layer = state_layer(model, group)
            check_system(layer.state_space(), f"layer {name!r}")
        return HankelState(model, self.taylor.init(_as_one(groups), model))

    def update(
        self, state: HankelState, groups: tuple[Group, ...], model: nn.Module, grad_scale: torch.Tensor | None = None
    ) -> HankelState:
        return replace(state, layers=self.taylor.update(state.layers, _as_one(groups), model, grad_scale))

    def flops(self, groups: tuple[Group, ...], model: nn.Module) -> float:
        return self.taylor.flops(_as_one(groups), model)

    def read(self, state: HankelState, groups: tuple[Group, ...], step: int) -> Reading:
        layers = self.taylor.read(state.layers, _as_one(groups), step)
        # NaN makes it a bad reading, on which nothing is decided; raising would end the user's training.
        saliency = {group.name: np.full(group.num_units, np.nan) for group in groups}
        basis: dict[str, BalancedPairs] = {}
        for group in groups:
            name, layer = state_layer(state.model, group)
            with suppress(StateSpaceError):
                found = balance(layer.state_space(), f"layer {name!r}")
                basis[group.name] = BalancedPairs(found)
                saliency[group.name] = float(layers.saliency[group.name][0]) * energy_shares(found)
        return replace(layers, saliency=saliency, basis=basis, slope={}, norm={})


def energy_shares(basis: Balance) -> Float64[np.ndarray, " units"]:
    """Share of each pair of balanced states in the summed squares of the Hankel values; equal where all are 0."""
    squares = basis.values.square()
    energy: np.ndarray = squares.reshape(-1, squares.shape[-1] // 2, 2).sum((0, 2)).cpu().numpy()
    total = float(energy.sum())
    return energy / total if total > 0 else np.full(len(energy), 1.0 / len(energy))


def _is_balanceable(model: nn.Module, group: Group) -> bool:
    with suppress(GroupError):
        return bool(state_layer(model, group))
    return False


def _as_one(groups: tuple[Group, ...]) -> tuple[Group, ...]:
    """The same groups with all their units as one."""
    found = []
    for group in groups:
        slices = tuple(replace(place, index=np.minimum(place.index, 0)) for place in group.slices)
        found.append(replace(group, num_units=1, slices=slices))
    return tuple(found)
