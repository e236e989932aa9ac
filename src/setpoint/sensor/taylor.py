"""The Taylor sensor: saliency from the gradients that an ordinary training step leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Shaped
from torch import Tensor, nn

from setpoint.arguments import counts
from setpoint.distributed import Ranks, local
from setpoint.errors import GroupError, LoopError
from setpoint.groups.follow import FOUND_ANEW, ByUnit
from setpoint.groups.group import Group
from setpoint.sensor.reading import Reading
from setpoint.sensor.sentinel import Sentinels
from setpoint.sensor.source import Source, Sources, find_sources, zero_if_finite
from setpoint.sensor.tap import Tap, tappable

_FOLD_AT = 16  # steps that are folded into the moments at a time: on small models calls cost more than arithmetic
_TINY = 1e-30  # keeps a division by a weight of zero, which then counts for nothing, from making NaN


@dataclass(frozen=True, eq=False)
class TaylorState:
    """Running moments of the gate gradients r of all units, one group after the other.

    A step's weight is `decay^age`, its age counted in later steps that were taken in.
    """

    names: tuple[str, ...]  # of the groups, in the order in which their units lie
    num_units: tuple[int, ...]
    mean: ByUnit[Float[Tensor, " all_units"]]  # weighted mean of r over the folded steps
    variance: ByUnit[Float[Tensor, " all_units"]]  # weighted mean of (r - mean)^2 over them
    weight: ByUnit[Float[Tensor, " all_units"]]  # sum of the weights of the steps in which the unit was there
    squares: ByUnit[Float[Tensor, " all_units"]]  # sum of their squared weights
    num_steps: Float[Tensor, ""]  # how many there are (0-dim tensors, so that counting needs no host sync)
    skipped_steps: Float[Tensor, ""]  # steps left out because a gradient was NaN or infinite
    steps_seen: tuple[int, ...]  # by group, steps in which any of its outgoing weights had a gradient
    recent: tuple[Float[Tensor, " all_units"], ...] = ()  # r of the steps not folded yet, the latest last
    sources: Sources | None = field(default=None, metadata=FOUND_ANEW)  # whose gradients are read
    tapped: frozenset[str] = field(default=frozenset(), metadata={"live": True})  # weights frozen at `init`
    sentinels: Sentinels | None = field(default=None, metadata={"live": True})  # scale what is read of those
    window: int = field(default=50, metadata={"live": True})  # number of recent steps that count

    def __post_init__(self) -> None:
        if any(each.shape != self.mean.shape for each in self.recent):
            raise ValueError(f"each recent step holds a number for each of the {len(self.mean)} units")

    def by_group(self, values: Shaped[np.ndarray, " all_units"]) -> dict[str, Shaped[np.ndarray, " _units"]]:
        """What lies one group after the other, by group."""
        return dict(zip(self.names, np.split(values, np.cumsum(self.num_units)[:-1]), strict=True))

    @torch.no_grad()
    def folded(self, seen: Bool[Tensor, " all_units"] | None = None) -> TaylorState:
        """The recent steps taken into the moments, but only of the units that were seen in them; no host sync.

        Two weighted sets of steps with weights Z, means m and variances v merge exactly: with `s` the newer set's share
        of the weight, `m = m1 + s (m2 - m1)` and `v = (1 - s) v1 + s v2 + s (1 - s) (m2 - m1)^2`.
        """
        if not self.recent:
            return self
        steps, decay = torch.stack(self.recent), 1.0 - 1.0 / self.window
        finite = torch.isfinite(steps.sum(1))
        steps = torch.where(finite[:, None], steps, 0.0)
        taken = finite.to(steps.dtype)
        count = taken.sum()
        weights = (taken * torch.pow(decay, count - taken.cumsum(0)))[:, None]
        new_weight, new_squares, ageing = weights.sum(), weights.square().sum(), torch.pow(decay, count)
        if seen is not None:
            weights, ageing = weights * seen, torch.where(seen, ageing, 1.0)
            new_weight, new_squares = weights.sum(0), weights.square().sum(0)
        weight = self.weight * ageing + new_weight
        share = new_weight / weight.clamp_min(_TINY)
        per_step = weights / new_weight.clamp_min(_TINY)
        new_mean = (per_step * steps).sum(0)
        new_variance = (per_step * (steps - new_mean).square()).sum(0)
        apart = new_mean - self.mean
        return replace(
            self,
            mean=self.mean + share * apart,
            variance=(1.0 - share) * (self.variance + share * apart.square()) + share * new_variance,
            weight=weight,
            squares=self.squares * ageing.square() + new_squares,
            num_steps=self.num_steps + count,
            skipped_steps=self.skipped_steps + (len(self.recent) - count),
            recent=(),
        )


class TaylorSensor:
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
    keeps x until the backward pass and reads r there. One all-reduce at each update averages it over ranks.

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
    >>> model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(16, 4)
    >>> optimizer, sensor = torch.optim.SGD(model.parameters(), lr=0.1), TaylorSensor(num_samples=16, window=20)
    >>> loop = setpoint.attach(model, optimizer, 0.5, total_steps=30, example=(x,), sensor=sensor)
    >>> model(x).square().mean().backward()
    >>> optimizer.step()
    >>> loop.reading().saliency["0"].shape
    (8,)
    >>> loop.detach()
    """

    reads_shards = averages_hooks = True

    def __init__(
        self, num_samples: int, window: int = 50, first_order: bool = False, ranks: Ranks | None = None
    ) -> None:
        self.num_samples, self.window = counts(num_samples=num_samples, window=window)
        self.first_order = first_order
        self.ranks = Ranks() if ranks is None else ranks

    def over(self, ranks: Ranks) -> TaylorSensor:
        """The sensor where gradients are averaged over ranks."""
        return TaylorSensor(self.num_samples, self.window, self.first_order, ranks)

    def hooked(self, state: TaylorState) -> bool:
        """Whether weights that were frozen at `init` are read by hooks."""
        return bool(state.tapped)

    def readable(self, groups: tuple[Group, ...], model: nn.Module) -> tuple[Group, ...]:
        """The groups of which every outgoing weight is trained, or frozen where a tap can read the layer's input.

        The r of any other would be a part of the truth. Incoming ("produce") weights are no substitute: before a
        normalisation their sum of w * dL/dw is zero, and through a curved activation it has the wrong size or sign.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        trained = {name for name, parameter in parameters.items() if parameter.requires_grad}

        def seen(group: Group) -> bool:
            outgoing = {place.tensor for place in group.slices if place.role == "consume"}
            return bool(outgoing) and outgoing <= trained | tappable(group, model)

        return tuple(group for group in groups if seen(group))

    def init(self, groups: tuple[Group, ...], model: nn.Module) -> TaylorState:
        """Empty moments on the device of the outgoing weights; GroupError for a group that is not `readable`."""
        unreadable = sorted({g.name for g in groups} - {g.name for g in self.readable(groups, model)})
        if unreadable:
            raise GroupError(
                f"groups {unreadable} have outgoing weights without gradients, so the Taylor sensor cannot read "
                "them: leave them out (TaylorSensor.readable picks the others) or use another sensor"
            )
        tapped = frozenset[str]().union(*(tappable(group, model) for group in groups))
        sentinels = Sentinels(model.parameters(), model) if tapped else None
        if sentinels is not None:
            sentinels.start()
        sources = find_sources(groups, model, tapped, sentinels)
        first = next((source.weight for of_group in sources.by_group for source in of_group), torch.zeros(()))
        dtype = torch.promote_types(first.real.dtype, torch.float32)
        zeros = torch.zeros(sum(group.num_units for group in groups), dtype=dtype, device=first.device)
        none = torch.zeros((), dtype=dtype, device=first.device)
        names, num_units = tuple(g.name for g in groups), tuple(g.num_units for g in groups)
        moments, seen = (zeros, zeros, zeros, zeros, none, none), (0,) * len(groups)
        return TaylorState(names, num_units, *moments, seen, (), sources, tapped, sentinels, self.window)

    @torch.no_grad()
    def update(
        self, state: TaylorState, groups: tuple[Group, ...], model: nn.Module, grad_scale: Tensor | None = None
    ) -> TaylorState:
        """Take in the gradients of one optimizer step. No host sync."""
        sources = state.sources or find_sources(groups, model, state.tapped, state.sentinels)
        # A rank cannot know what others have seen: where it is shared, what nobody has seen counts as zero, unless it
        # could not be seen, since what reads it has only just been put there.
        shared = self.ranks.count > 1 and state.sources is not None
        taps = [shared and any(each.tap for each in of_group) for of_group in sources.by_group]
        now = [tap or any(each.has_gradient() for each in of) for tap, of in zip(taps, sources.by_group, strict=True)]
        steps_seen = tuple(steps + one for steps, one in zip(state.steps_seen, now, strict=True))
        # A weight without a gradient was not used by the loss, and is worth nothing in this step. But as long as
        # nothing was ever seen of a group it may as well be frozen, or behind a `detach`: then it is unknown.
        trains = [
            bool(steps) and all(each.seen() or (shared and each.tap) for each in of_group)
            for steps, of_group in zip(steps_seen, sources.by_group, strict=True)
        ]
        gate_gradient = _summed(state, sources.by_group, lambda source: source.gate_gradient(state.mean))
        gate_gradient = sources.ranks.total(gate_gradient + zero_if_finite(sources.others, state.mean))
        if state.sentinels is not None:
            tapped = _summed(state, sources.by_group, lambda source: source.tapped(state.mean))
            gate_gradient = gate_gradient + state.sentinels.in_scale(tapped, self.ranks)
            state.sentinels.forget()
        if grad_scale is not None:
            gate_gradient = gate_gradient / grad_scale
        if not all(trains):
            seen = torch.from_numpy(np.repeat(trains, state.num_units)).to(gate_gradient.device)
            state = replace(state.folded(), recent=(gate_gradient,), sources=sources, steps_seen=steps_seen)
            return state.folded(seen)
        recent = (*state.recent, gate_gradient)
        state = replace(state, recent=recent, sources=sources, steps_seen=steps_seen)
        return state if len(state.recent) < _FOLD_AT else state.folded()

    def forget(self, state: TaylorState) -> None:
        """A step passes that is not taken in: what hooks have seen of it does not count."""
        for tap in _taps(state):
            tap.take()
        if state.sentinels is not None:
            state.sentinels.forget()

    def release(self, state: TaylorState) -> None:
        """Take the hooks off the model; nothing is read through them any more."""
        for tap in _taps(state):
            tap.stop()
        if state.sentinels is not None:
            state.sentinels.stop()

    def flops(self, groups: tuple[Group, ...], model: nn.Module) -> float:
        """FLOPs of one update on each rank: three for each outgoing weight, one for every gradient only checked."""
        sources = find_sources(groups, model)
        read = sum(each.num_read for of_group in sources.by_group for each in of_group)
        return (3.0 * read + sum(parameter.numel() for parameter in sources.others)) / sources.ranks.count

    def read(self, state: TaylorState, groups: tuple[Group, ...], step: int) -> Reading:
        """Saliency of all units; with fewer than two steps the variance counts as zero.

        Raises:
            LoopError: when nothing was ever seen of a group whose outgoing weights are frozen.
        """
        state = state.folded()
        facts = torch.stack([state.num_steps, state.skipped_steps])
        values = torch.cat([facts, state.mean, state.variance, state.weight, state.squares]).double().cpu().numpy()
        num_steps, skipped = (float(value) for value in values[:2])
        mean, variance, weight, squares = np.split(values[2:], 4)
        # Where readings are shared, a step counts that nobody saw anything in.
        _check_seen(state, num_steps, weight > 0 if self.ranks.count == 1 else (mean != 0) | (variance != 0))
        # The weighted variance of n steps is too small by 1 - (sum of squares of their shares); 1 - 1/n if equal.
        shares = squares / np.maximum(weight, _TINY) ** 2
        several = (weight > 0) & (shares < 1.0)
        unbiased = np.where(several, variance, 0.0) / np.where(several, 1.0 - shares, 1.0)
        curvature = self.num_samples * unbiased + mean**2
        saliency = np.maximum(0.0, 0.5 * curvature - (mean if self.first_order else 0.0))
        counts: dict[str, Any] = {"num_steps": round(num_steps), "skipped_steps": round(skipped)}
        counts["steps_seen"] = dict(zip(state.names, state.steps_seen, strict=True))
        parts: dict[str, Any] = {"slope": state.by_group(mean), "norm": _weight_norms(state)}
        return Reading(step, state.by_group(saliency), self.num_samples, **counts, **parts)


def _taps(state: TaylorState) -> list[Tap]:
    by_group = () if state.sources is None else state.sources.by_group
    return [source.tap for of_group in by_group for source in of_group if source.tap is not None]


def _check_seen(state: TaylorState, num_steps: float, seen: Bool[np.ndarray, " all_units"]) -> None:
    """Check that hooks have seen something of each group that they are to read, once steps were taken in."""
    if not state.tapped or not num_steps or state.sources is None:
        return
    for (name, of_units), of_group in zip(state.by_group(seen).items(), state.sources.by_group, strict=True):
        if any(source.tap is not None for source in of_group) and len(of_units) and not of_units.any():
            raise LoopError(
                f"nothing was seen of group {name!r}, whose outgoing weights are frozen: no gradient comes through its "
                "layer, or the layer is not called as a module, or it runs as compiled code. Leave the group out "
                "(groups=...), or train the weights"
            )


def _summed(
    state: TaylorState, sources: tuple[tuple[Source, ...], ...], read: Callable[[Source], Tensor | None]
) -> Float[Tensor, " all_units"]:
    """By unit of all groups, the sum of what is read of the sources; one of which nothing is read adds nothing."""
    parts = [state.mean.new_zeros(0)]
    for num_units, of_group in zip(state.num_units, sources, strict=True):
        there = [found for source in of_group if (found := read(source)) is not None]
        parts.append(sum(there[1:], there[0]) if there else state.mean.new_zeros(num_units))
    return torch.cat(parts)


@torch.no_grad()
def _weight_norms(state: TaylorState) -> dict[str, Float64[np.ndarray, " units"]]:
    if state.sources is None:
        return {}

    def squares(source: Source) -> Tensor:
        weight = source.sums.select(local(source.weight))
        weight = weight.abs() if weight.is_complex() else weight
        return source.sums.add_up(weight.to(state.mean.dtype).square()).to(state.mean)

    total = state.sources.ranks.total(_summed(state, state.sources.by_group, squares))
    return state.by_group(total.sqrt().double().cpu().numpy())
