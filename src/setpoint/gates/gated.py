"""Learned gates: a small network, trained with the model, says how open the gate of each unit should be."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, final

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64
from torch import Tensor

from setpoint.controller.plan import Conduct, Controller, Observation, Plan
from setpoint.controller.priced import PricedController, PricedState
from setpoint.controller.selection import lowest_width
from setpoint.cost.cost import Cost
from setpoint.groups.group import Group
from setpoint.messages import plain_fields

_TINY = 1e-30
_FARTHEST = 10.0  # no feature is farther from 0
_FEATURES = 11
_DECAY = (0.9, 0.99)
_EPSILON = 1e-8
_STEEPEST = 30.0  # no logit is larger: its exponential, the gate's odds, stays far from the ends of float32


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
        """A network that adds nothing yet to the first feature; it draws from a generator of its own."""
        generator = torch.Generator(device="cpu").manual_seed(seed)
        weights: list[Tensor] = []
        plain: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever the user's defaults are
        for fan_in in (num_features, hidden):
            matrix = torch.randn(hidden, fan_in, generator=generator, **plain)
            weights += [matrix / fan_in**0.5, torch.zeros(hidden, **plain)]
        weights += [torch.zeros(1, hidden, **plain), torch.zeros(1, **plain)]
        zeros = tuple(torch.zeros_like(weight) for weight in weights)
        return cls(tuple(weights), zeros, zeros)

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
        """The network after so many steps of Adam (Kingma and Ba, ICLR 2015) down `J = sum of J_u`, with

            dJ_u/dg_u = slope - curvature * (1 - g_u) + 1,

        first and second derivative of the loss by the unit's open gate, both / what the unit costs, price x saving.
        Each is divided by `1 + curvature`, which moves no unit's optimum, and without which the few most salient units
        would drown out all others.
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


@dataclass(frozen=True, eq=False)
class GatedState:
    """What the controller remembers between decisions: the priced controller's memory, and the gate network."""

    priced: PricedState
    net: GateNet


@final
@dataclass(frozen=True)
class GatedController(Controller[GatedState]):
    """The priced controller with learned gates in place of the saliency.

    A network of a few thousand weights, shared by all units, maps what is known of a unit to its gate g in (0, 1).
    It is trained on `J = loss + price * cost` by an optimizer of its own. No gate stands in the forward pass: the
    sensor's readings of the ordinary backward passes hold the gate's gradient at the open gate, r, and the
    curvature, twice the saliency, and so

        dJ/dg = r - curvature * (1 - g) + price * saving.

    This vanishes at `g = 1/2` for a unit whose saliency with slope, `curvature / 2 - r`, is just what it costs. So a
    gate of one half is a worth equal to the price, and `price * saving * g / (1 - g)` goes into the priced
    controller's selection in place of the saliency. Price, guards and regrowth are those of the priced controller.

    The network adds to the logit of a gate that starts at `log(worth / price)`: untrained, it decides as the priced
    controller does. It sees of each unit worth / price, r in standard units, the norm of its outgoing weights within
    the group, saving, depth, kind, density of its group, age, the run's progress and the price. It learns at decisions
    that drop something: `steps` steps each, or as many as `Observation.learning_flops` pay for. Where that is less than
    one, or the reading is not in the unit of the loss, the plan is the priced controller's.

    Args:
        priced: finds the price, selects, and meets the budget.
        hidden: units of each of the network's two hidden layers.
        steps: optimizer steps of the network at a decision.
        learning_rate: of the network.
        seed: of its first weights.

    Raises:
        ValueError: for a setting out of range.

    References:
        Gates learned on loss and cost: Louizos, Welling, Kingma, "Learning sparse neural networks through L0
        regularization", ICLR 2018; from features by a shared network: Wang et al., "SkipNet", ECCV 2018.

    >>> GatedController().num_weights
    2977
    """

    priced: PricedController = field(default_factory=PricedController)
    hidden: int = 48
    steps: int = 16
    learning_rate: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        plain_fields(self)
        if self.hidden < 1 or self.steps < 1 or not 0 < self.learning_rate < 1:
            raise ValueError(f"gates need hidden and steps >= 1 and learning_rate in (0, 1), got {self!r}")

    @property
    def num_weights(self) -> int:
        return self.hidden * (_FEATURES + self.hidden + 3) + 1

    @property
    def conduct(self) -> Conduct:
        return replace(self.priced.conduct, learns=True)

    def init(self, groups: tuple[Group, ...]) -> GatedState:
        return GatedState(self.priced.init(groups), GateNet.fresh(_FEATURES, self.hidden, self.seed))

    def probe_due(self, step: int, total_steps: int) -> bool:
        return self.priced.probe_due(step, total_steps)

    def transferred(
        self, state: GatedState, *, step: int, total_steps: int, present: float, limit: float
    ) -> GatedState:
        at = {"step": step, "total_steps": total_steps}
        return replace(state, priced=self.priced.transferred(state.priced, **at, present=present, limit=limit))

    def flops(self, groups: tuple[Group, ...], allowance: float = math.inf) -> float:
        if all(lowest_width(group) == group.num_units for group in groups):
            return 0.0
        steps = self._affordable(allowance, groups)
        return self._flops(steps, groups) if steps else 0.0

    def decide(
        self, state: GatedState, observation: Observation, cost: Cost, groups: tuple[Group, ...]
    ) -> tuple[GatedState, Plan]:
        priced, plan = self.priced.decide(state.priced, observation, cost, groups)
        reading, price = observation.reading, plan.price[cost.resource]
        learns = plan.drops() and price > 0 and self.priced.allocation == "worth"
        if not learns or reading is None or not (reading.calibrated and reading.in_loss):
            return replace(state, priced=priced), plan
        steps = self._affordable(observation.learning_flops, groups)
        if steps < 1:
            note = f"{plan.reason}; no gates, since learning them would take more than its share of FLOPs"
            return replace(state, priced=priced), replace(plan, reason=note)
        features, slope, curvature, costs = _units(state.priced, observation, cost, groups, price)
        net = state.net.trained(features, slope, curvature, steps, self.learning_rate)
        # Odds of one, a gate of one half, stand for a saliency that just pays for the unit.
        logits = net.logits(features)
        odds = np.exp(logits.double().numpy())
        by_group = np.split(costs * odds, np.cumsum([group.num_units for group in groups]))[:-1]
        gated = {group.name: values for group, values in zip(groups, by_group, strict=True)}
        plan = self.priced.reordered(state.priced, plan, observation, cost, groups, gated)
        closed = float((logits < 0).double().mean())
        reason = f"{plan.reason}; {closed:.0%} of gates below one half"
        return GatedState(priced, net), replace(plan, reason=reason, flops=self._flops(steps, groups))

    def _flops(self, steps: int, groups: tuple[Group, ...]) -> float:
        # A step is a forward and a backward on all units; a last forward gives the gates.
        return (6.0 * steps + 2.0) * self.num_weights * sum(group.num_units for group in groups)

    def _affordable(self, flops: float, groups: tuple[Group, ...]) -> int:
        """Steps of the network that so many FLOPs pay for, at most `steps`."""
        paid = (flops / (self.num_weights * sum(group.num_units for group in groups)) - 2.0) / 6.0
        return int(min(float(self.steps), max(0.0, paid)))


def _units(
    state: PricedState, observation: Observation, cost: Cost, groups: tuple[Group, ...], price: float
) -> tuple[Tensor, Tensor, Tensor, Float64[np.ndarray, " units"]]:
    """Of all units, one group after the other: features, slope and curvature of the loss by the gate, each / what the
    unit costs, and that cost, price x saving: the saliency at which it just pays.
    """
    reading, dense = observation.reading, observation.dense[cost.resource]
    assert reading is not None
    saliency_sum = sum(float(values.sum()) for values in reading.saliency.values())
    dearness = np.log((price * dense + _TINY) / (saliency_sum + _TINY))
    rows: list[Float64[np.ndarray, "units features"]] = []
    slopes, curvatures, costs = [], [], []
    for place, group in enumerate(groups):
        width, block = group.num_units, min(group.multiple_of, group.num_units)
        saving = max(cost.saving(observation.widths, group.name, block) / block, _TINY * dense)
        saliency, earns = reading.saliency[group.name], price * saving
        slope = reading.slope.get(group.name, np.zeros(width))
        norms = np.log(reading.norm.get(group.name, np.ones(width)) + _TINY)
        columns = (
            np.log((saliency + _TINY * earns) / earns),
            slope / np.sqrt(2.0 * saliency + _TINY),
            (norms - norms.mean()) / max(float(norms.std()), 1e-6),
            np.log(saving * width / dense + _TINY),
            place / max(1, len(groups) - 1),
            float(group.what == "channel"),
            float(group.what == "head"),
            width / observation.dense_widths[group.name],
            state.age[group.name] / max(1, state.age[group.name].max(initial=0)),
            observation.step / observation.planned_steps,
            dearness,
        )
        rows.append(np.stack(np.broadcast_arrays(np.zeros(width), *columns)[1:], axis=1))
        slopes.append(slope / earns)
        curvatures.append(2.0 * saliency / earns)
        costs.append(np.full(width, earns))
    features = np.clip(np.concatenate(rows), -_FARTHEST, _FARTHEST)
    slope, curvature = np.concatenate(slopes), np.concatenate(curvatures)
    return _tensor(features), _tensor(slope), _tensor(curvature), np.concatenate(costs)


def _tensor(values: Float64[np.ndarray, " ..."]) -> Tensor:
    return torch.from_numpy(np.clip(values, -1e6, 1e6).astype(np.float32))
