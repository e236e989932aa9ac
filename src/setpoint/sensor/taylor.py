"""The Taylor sensor: saliency from the gradients that an ordinary training step leaves behind."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from setpoint.errors import GroupError
from setpoint.groups.group import Group, Slice
from setpoint.sensor.reading import Reading
from setpoint.sensor.unit_sum import UnitSum


@dataclass(frozen=True, eq=False)
class Source:
    """One outgoing weight of a group and how its entries add up by unit."""

    weight: nn.Parameter
    sums: UnitSum


@dataclass(frozen=True, eq=False)
class TaylorState:
    """Running moments of the gate gradients of all units, one group after the other.

    Args:
        names: group names, in the order in which their units lie in `mean` and `variance`.
        num_units: units of each group.
        mean: exponentially weighted mean of r over steps, bias-corrected.
        variance: exponentially weighted variance of r over steps, around that mean.
        num_steps: steps taken in (a 0-dim tensor, so that counting needs no host sync).
        skipped_steps: steps left out because a gate gradient was NaN or infinite.
        sources: outgoing weights by group, found at the first update after `init` or `cut`.
    """

    names: tuple[str, ...]
    num_units: tuple[int, ...]
    mean: Float[Tensor, " all_units"]
    variance: Float[Tensor, " all_units"]
    num_steps: Float[Tensor, ""]
    skipped_steps: Float[Tensor, ""]
    sources: tuple[tuple[Source, ...], ...] | None = None


class TaylorSensor:
    """Second-order Taylor estimate of the loss increase when a unit is dropped.

    Put a gate g on a unit's output, with g = 1 now and g = 0 when it is dropped. With
    `r = dL/dg` at g = 1, the loss changes by

        L(0) - L(1) = -r + 1/2 d2L/dg2 + ...

    *First order* (Molchanov et al. 2019). The gate scales what the unit hands on, so it could as well
    scale every weight that reads the unit; by the chain rule `r = sum of w * dL/dw over the unit's
    outgoing ("consume") weights`. This is exact for any activation, and needs no change to the
    forward pass.

    *Second order* (optimal brain damage, LeCun et al. 1990; by the Fisher information, Theis et al.
    2018). For a log-likelihood loss the expected curvature is the Fisher diagonal `E[r_sample^2]`,
    where `r_sample` is the gate gradient of one sample's loss. A step shows only the mean of B
    samples, whose variance over steps is `var(r) = var(r_sample) / B`; hence
    `E[r_sample^2] = B var(r) + mean(r)^2`. Together, with mean and variance over recent steps,

        saliency = max(0, -mean(r) + 1/2 (B var(r) + mean(r)^2)).

    The unit of the saliency is that of the loss. What biases it: gradients that were clipped or
    scaled before the optimizer's step scale r with them; a weight that is tied to another one carries
    the gradients of both.

    Mean and variance are exponentially weighted with decay `1 - 1/window`, without start-up bias, and
    kept in float32 (float64 for float64 models) whatever the model's own precision. A step in which
    any r is NaN or infinite is left out as a whole and counted.

    Args:
        num_samples: independent samples behind each optimizer step's gradient (B), over ranks and
            micro-batches.
        window: number of recent steps that count, in optimizer steps.

    Raises:
        ValueError: if either is not a positive integer.

    References:
        Molchanov, Mallya, Tyree, Frosio, Kautz: "Importance Estimation for Neural Network Pruning",
        CVPR 2019. LeCun, Denker, Solla: "Optimal Brain Damage", NIPS 1990. Theis, Korshunova, Tejani,
        Huszar: "Faster gaze prediction with dense networks and Fisher pruning", arXiv 1801.05787, 2018.
    """

    def __init__(self, num_samples: int, window: int = 50) -> None:
        for name, value in (("num_samples", num_samples), ("window", window)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        self.num_samples = num_samples
        self.window = window

    def readable(self, groups: tuple[Group, ...], model: nn.Module) -> tuple[Group, ...]:
        """The groups whose outgoing weights all get gradients; r of any other would be a part of the truth.

        Incoming ("produce") weights are no substitute: before a normalisation their sum of w * dL/dw
        is zero, and through a curved activation it has the wrong size or sign.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))

        def trained(group: Group) -> bool:
            outgoing = [place.tensor for place in group.slices if place.role == "consume"]
            return bool(outgoing) and all(name in parameters and parameters[name].requires_grad for name in outgoing)

        return tuple(group for group in groups if trained(group))

    def init(self, groups: tuple[Group, ...], model: nn.Module) -> TaylorState:
        """Empty moments on the device of the outgoing weights.

        Raises:
            GroupError: for a group that is not `readable`.
        """
        unreadable = sorted({g.name for g in groups} - {g.name for g in self.readable(groups, model)})
        if unreadable:
            raise GroupError(
                f"groups {unreadable} have outgoing weights without gradients, so the Taylor sensor cannot read "
                "them: leave them out (TaylorSensor.readable picks the others) or use another sensor"
            )
        sources = _find_sources(groups, model)
        first = next((source.weight for of_group in sources for source in of_group), torch.zeros(()))
        dtype = torch.promote_types(first.dtype, torch.float32)
        zeros = torch.zeros(sum(group.num_units for group in groups), dtype=dtype, device=first.device)
        none = torch.zeros((), dtype=dtype, device=first.device)
        names, num_units = tuple(g.name for g in groups), tuple(g.num_units for g in groups)
        return TaylorState(names, num_units, zeros, zeros.clone(), none, none.clone(), sources)

    @torch.no_grad()
    def update(
        self, state: TaylorState, groups: tuple[Group, ...], model: nn.Module, grad_scale: Tensor | None = None
    ) -> TaylorState:
        """Take in the gradients of one optimizer step. No host sync.

        Args:
            state: the state so far.
            groups: the active groups, as in `init`.
            model: the model, gradients ready, weights not yet moved.
            grad_scale: what the gradients are still multiplied by (a fused optimizer under a
                GradScaler), or None; NaN leaves the step out.
        """
        sources = state.sources if state.sources is not None else _find_sources(groups, model)
        gate_gradient = _gate_gradients(state, sources)
        if grad_scale is not None:
            gate_gradient = gate_gradient / grad_scale
        finite = torch.isfinite(gate_gradient.sum())
        num_steps = state.num_steps + finite
        # (1 - decay) / (1 - decay^n), written so that float32 does not round it for long windows.
        rate = math.log1p(-1.0 / self.window) if self.window > 1 else -math.inf
        weight = torch.where(finite, (-1.0 / self.window) / torch.expm1(num_steps * rate), 0.0)
        deviation = torch.where(finite, gate_gradient - state.mean, 0.0)
        step = weight * deviation
        return replace(
            state,
            mean=state.mean + step,
            variance=(1.0 - weight) * (state.variance + step * deviation),
            num_steps=num_steps,
            skipped_steps=state.skipped_steps + ~finite,
            sources=sources,
        )

    def flops(self, groups: tuple[Group, ...], model: nn.Module) -> float:
        """FLOPs of one update: a multiplication and an addition per outgoing weight, and one more for the moments."""
        return 3.0 * sum(
            source.sums.select(source.weight).numel() for of_group in _find_sources(groups, model) for source in of_group
        )

    def read(self, state: TaylorState, groups: tuple[Group, ...], step: int) -> Reading:
        """Saliency of all units; with fewer than two steps the variance counts as zero.

        Args:
            state: the state so far.
            groups: the active groups, as in `init`.
            step: optimizer steps done, for the record.
        """
        counts = torch.stack([state.num_steps, state.skipped_steps])
        values = torch.cat([counts, state.mean, state.variance]).double().cpu().numpy()
        num_steps, skipped = round(float(values[0])), round(float(values[1]))
        mean, variance = np.split(values[2:], 2)
        curvature = self.num_samples * variance * _unbiasing(self.window, num_steps) + mean**2
        saliency = np.maximum(0.0, -mean + 0.5 * curvature)
        by_group = np.split(saliency, np.cumsum(state.num_units))[:-1]
        return Reading(
            step=step,
            saliency=dict(zip(state.names, by_group, strict=True)),
            num_samples=self.num_samples,
            calibrated=True,
            num_steps=num_steps,
            skipped_steps=skipped,
        )

    def cut(self, state: TaylorState, keep: Mapping[str, Bool[np.ndarray, " units"]]) -> TaylorState:
        """Moments of the kept units."""
        masks = [
            np.asarray(keep.get(name, np.ones(n, bool)), dtype=bool)
            for name, n in zip(state.names, state.num_units, strict=True)
        ]
        kept = torch.from_numpy(np.flatnonzero(np.concatenate([np.zeros(0, bool), *masks]))).to(state.mean.device)
        return replace(
            state,
            num_units=tuple(int(mask.sum()) for mask in masks),
            mean=state.mean[kept],
            variance=state.variance[kept],
            sources=None,
        )


def _find_sources(groups: tuple[Group, ...], model: nn.Module) -> tuple[tuple[Source, ...], ...]:
    """Outgoing weights of each group, with their index tables on the device."""
    parameters = dict(model.named_parameters(remove_duplicate=False))

    def source(place: Slice, num_units: int) -> Source:
        weight = parameters[place.tensor]
        return Source(weight, UnitSum.of(place, num_units, weight.device))

    return tuple(
        tuple(source(place, group.num_units) for place in group.slices if place.role == "consume") for group in groups
    )


def _gate_gradients(state: TaylorState, sources: tuple[tuple[Source, ...], ...]) -> Tensor:
    """Gate gradients r of all units: a weight without a gradient in this step did not take part, and adds nothing."""
    parts = []
    for num_units, of_group in zip(state.num_units, sources, strict=True):
        total: Tensor | None = None
        for source in of_group:
            gradient = source.weight.grad
            if gradient is None:
                continue
            weight, gradient = source.sums.select(source.weight.detach()), source.sums.select(gradient)
            added = source.sums.add_up(weight * gradient.to(state.mean.dtype)).to(state.mean)
            total = added if total is None else total + added
        parts.append(state.mean.new_zeros(num_units) if total is None else total)
    return torch.cat(parts) if parts else state.mean


def _unbiasing(window: int, num_steps: int) -> float:
    """1 / (1 - sum of squared weights): what turns the weighted variance into an unbiased one.

    With weights proportional to decay^age, the sum of squares is
    `(1 - decay) (1 + decay^n) / ((1 + decay) (1 - decay^n))`.
    """
    if num_steps < 2:
        return 0.0
    decay = 1.0 - 1.0 / window
    power = math.pow(decay, num_steps)
    squares = (1.0 - decay) * (1.0 + power) / ((1.0 + decay) * (1.0 - power))
    return 1.0 / (1.0 - squares) if squares < 1.0 else 0.0
