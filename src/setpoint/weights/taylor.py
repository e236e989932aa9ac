"""The weight Taylor sensor: what each single weight contributes to the loss, in readings that keep to a pattern."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor, nn

from setpoint.groups.follow import ByWeight, fresh
from setpoint.groups.group import Group
from setpoint.messages import counts
from setpoint.sensor.reading import Reading, Sensor
from setpoint.weights.find import Pattern, active_of


@dataclass(frozen=True, eq=False)
class WeightTaylorState:
    """Weighted sums of `r = w * dL/dw` over the steps so far, a step's weight being `decay^age`; by tensor name."""

    first: Mapping[str, ByWeight[Float[Tensor, "..."]]]  # sum of r
    second: Mapping[str, ByWeight[Float[Tensor, "..."]]]  # sum of r^2
    # Steps that had been taken in when the weight came back; 0 for one that never left.
    since: Mapping[str, ByWeight[Float[Tensor, "..."]]] = field(metadata=fresh("num_steps"))
    num_steps: Float[Tensor, ""]  # taken in (0-dim, so that counting needs no host sync)
    skipped_steps: Float[Tensor, ""]  # left out because a gradient was NaN or infinite
    model: nn.Module = field(metadata={"live": True})  # whose gradients are read
    steps_seen: Mapping[str, int]  # by tensor name, steps in which it had a gradient


class WeightTaylorSensor(Sensor[WeightTaylorState]):
    """The estimate of `TaylorSensor` with each weight as its own gate: `r = w * dL/dw`.

    With mean and variance of r over recent steps and B samples behind each step's gradient,

        saliency = 1/2 (B var(r) + mean(r)^2),

    the expected loss increase when the weight becomes zero, by the Fisher diagonal. A weight that came back is
    judged by the steps since then. The state has three numbers for each weight.

    Args:
        num_samples: independent samples behind each optimizer step's gradient (B).
        window: number of recent steps that count.

    Raises:
        ValueError: if either is not a positive integer.

    References:
        LeCun, Denker, Solla: "Optimal Brain Damage", NIPS 1990. Theis, Korshunova, Tejani, Huszar: "Faster gaze
        prediction with dense networks and Fisher pruning", arXiv 1801.05787, 2018.
    """

    def __init__(self, num_samples: int, window: int = 50) -> None:
        self.num_samples, self.window = counts(num_samples=num_samples, window=window)
        self.pattern = Pattern()

    def in_pattern(self, pattern: Pattern) -> WeightTaylorSensor:
        """The same sensor; saliencies are raised where the pattern holds a weight back."""
        other = copy.copy(self)
        other.pattern = pattern
        return other

    def init(self, groups: tuple[Group, ...], model: nn.Module) -> WeightTaylorState:
        zeros = {
            name: torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
            for name, weight in _weights(groups, model)
        }
        none = next(iter(zeros.values())).new_zeros(())
        return WeightTaylorState(zeros, dict(zeros), dict(zeros), none, none, model, dict.fromkeys(zeros, 0))

    @torch.no_grad()
    def update(
        self, state: WeightTaylorState, groups: tuple[Group, ...], model: nn.Module, grad_scale: Tensor | None = None
    ) -> WeightTaylorState:
        """Take in the gradients of one optimizer step. No host sync."""
        finite = _all_finite(model, grad_scale, state.num_steps)
        first, second, seen = {}, {}, {}
        decay = torch.where(finite, torch.full_like(state.num_steps, 1.0 - 1.0 / self.window), 1.0)
        for name, weight in _weights(groups, model):
            r = torch.zeros_like(state.first[name])
            seen[name] = state.steps_seen[name] + int(weight.grad is not None)
            if weight.grad is not None:
                gradient = weight.grad.to(r.dtype)
                gradient = gradient if grad_scale is None else gradient / grad_scale
                r = weight.detach() * torch.where(finite, gradient, 0.0)
            here = decay.to(r)
            first[name] = state.first[name] * here + r
            second[name] = torch.addcmul(state.second[name] * here, r, r)
        taken = finite.to(state.num_steps)
        num_steps, skipped = state.num_steps + taken, state.skipped_steps + (1.0 - taken)
        return replace(state, first=first, second=second, steps_seen=seen, num_steps=num_steps, skipped_steps=skipped)

    def flops(self, groups: tuple[Group, ...], model: nn.Module) -> float:
        """FLOPs of one update: six for each weight that is read, one for every other gradient, which is checked."""
        read = sum(weight.numel() for _, weight in _weights(groups, model))
        return 5.0 * read + sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)

    @torch.no_grad()
    def scores(self, state: WeightTaylorState) -> dict[str, Float[Tensor, "..."]]:
        """By tensor name, the saliency of every element; with fewer than two steps the variance counts as zero."""
        decay, found = 1.0 - 1.0 / self.window, {}
        for name, first in state.first.items():
            # Sums of the weights of the steps since the weight came, and of their squares: geometric series.
            seen = state.num_steps.to(first) - state.since[name]
            weight = (1.0 - torch.pow(decay, seen)) / (1.0 - decay) if decay else (seen > 0).to(first)
            squares = (1.0 - torch.pow(decay**2, seen)) / (1.0 - decay**2) if decay else weight
            weight = weight.clamp_min(1e-30)
            mean = first / weight
            variance = (state.second[name] / weight - mean.square()).clamp_min(0.0)
            rest = 1.0 - squares / weight.square()  # 1 - 1/n where steps count alike
            variance = torch.where(seen >= 2.0, variance / rest.clamp_min(1e-12), 0.0)
            found[name] = 0.5 * (self.num_samples * variance + mean.square())
        return found

    def read(self, state: WeightTaylorState, groups: tuple[Group, ...], step: int) -> Reading:
        scores = {name: values.reshape(-1).double().cpu().numpy() for name, values in self.scores(state).items()}
        reading = Reading(
            step,
            {group.name: scores[group.name][active_of(group)] for group in groups},
            self.num_samples,
            num_steps=round(float(state.num_steps)),
            skipped_steps=round(float(state.skipped_steps)),
            steps_seen={group.name: state.steps_seen[group.name] for group in groups},
            scores=partial(self.scores, state),
        )
        if self.pattern.free or not reading.finite():
            return reading
        saliency = {
            group.name: raised(reading.saliency[group.name], group, state.first[group.name].shape, self.pattern)
            for group in groups
        }
        return replace(reading, saliency=saliency)


def _weights(groups: tuple[Group, ...], model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(group.name, model.get_parameter(group.name)) for group in groups]


def _all_finite(model: nn.Module, grad_scale: Tensor | None, like: Tensor) -> Bool[Tensor, ""]:
    total = torch.zeros_like(like)
    for parameter in model.parameters():
        gradient = parameter.grad
        if parameter.requires_grad and gradient is not None:
            gradient = gradient.coalesce().values() if gradient.is_sparse else gradient
            gradient = torch.view_as_real(gradient) if gradient.is_complex() else gradient
            total = total + gradient.sum(dtype=like.dtype).to(like.device)
    if grad_scale is not None:
        total = total / grad_scale.to(like)
    return torch.isfinite(total)


def raised(
    saliency: Float64[np.ndarray, " units"], group: Group, shape: tuple[int, ...], pattern: Pattern
) -> Float64[np.ndarray, " units"]:
    """Saliencies of a tensor's active weights, raised where the pattern holds a weight back.

    A tensor loses the `pattern.stride` least salient weights of each block at a time. So that the least salient of the
    tensor are just these, what goes later counts as at least a hair more than all that go earlier.
    """
    active = active_of(group)
    whole = np.full(active.size, -np.inf)
    whole[active] = saliency
    blocks = pattern.blocks(whole.reshape(shape))
    ranks = np.argsort(np.argsort(blocks, axis=-1, kind="stable"), axis=-1)
    ranks -= np.isneginf(blocks).sum(-1, keepdims=True)
    raised, floor = blocks.copy(), -np.inf
    for stride in range(-(-pattern.block // pattern.stride)):
        here = (ranks >= stride * pattern.stride) & (ranks < (stride + 1) * pattern.stride)
        raised[here] = np.maximum(raised[here], floor)
        if here.any():
            floor = np.nextafter(raised[here].max(), np.inf)
    result: Float64[np.ndarray, " units"] = np.moveaxis(raised, -1, 2).reshape(-1)[active]
    return result
