"""The Taylor sensor, and others that average a `@criterion()` of an ordinary step's gradients over recent steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Shaped
from torch import Tensor, nn

from setpoint.distributed import Ranks
from setpoint.errors import GroupError, LoopError
from setpoint.groups.follow import FOUND_ANEW, ByUnit
from setpoint.groups.group import Group, Slice
from setpoint.messages import counts
from setpoint.sensor.reading import UNCALIBRATED, Reading, Sensor, Traits
from setpoint.sensor.tap import GradientScale, Tap, tappable
from setpoint.sensor.units import Source, Units, find_units

_FOLD_AT = 16  # steps that are folded into the moments at a time: on small models calls cost more than arithmetic
_TINY = 1e-30  # keeps a division by a weight of zero, which then counts for nothing, from making NaN

Values = Float64[np.ndarray, " all_units"]
Measure = Callable[[Units], Float[Tensor, " all_units"]]


def the_mean(mean: Values, variance: Values, num_samples: int) -> Values:
    """Saliency of a measure that is never negative."""
    saliency: Values = np.maximum(mean, 0.0)
    return saliency


@dataclass(frozen=True)
class Criterion:
    """A measure by unit, and how its mean and variance over recent steps become a saliency.

    Args:
        measure: of all units in one step, from their weights and gradients; no host sync.
        saliency: of the mean, the unbiased variance, and the number of independent samples behind each step's gradient.
        role: of the weights that are read: "consume" for those that read a unit, "produce" for those that write it.
        traits: of the readings. With `hooks` the measure uses `Units.tapped` where these weights are frozen.
        is_slope: whether the mean is the gradient of the loss with respect to a gate on the unit.
    """

    measure: Measure
    saliency: Callable[[Values, Values, int], Values] = the_mean
    role: str = "consume"
    traits: Traits = UNCALIBRATED
    is_slope: bool = False

    def places(self, group: Group) -> tuple[Slice, ...]:
        """Where the weights lie that are read of a group."""
        return tuple(place for place in group.slices if place.role == self.role)


CRITERIA: dict[str, Criterion] = {}  # by name


def criterion(**settings: Any) -> Callable[[Measure], Criterion]:
    """Register a function of `Units` as a criterion, under its own name; the settings are fields of `Criterion`."""

    def register(measure: Measure) -> Criterion:
        CRITERIA[measure.__name__] = Criterion(measure, **settings)
        return CRITERIA[measure.__name__]

    return register


@dataclass(frozen=True, eq=False)
class Moments:
    """Running moments of what is measured of all units, a step's weight being `decay^age` in steps taken in since."""

    names: tuple[str, ...]  # of the groups, in the order in which their units lie
    num_units: tuple[int, ...]
    mean: ByUnit[Float[Tensor, " all_units"]]  # weighted mean over the folded steps
    variance: ByUnit[Float[Tensor, " all_units"]]  # weighted mean of the squared distance from it
    weight: ByUnit[Float[Tensor, " all_units"]]  # sum of the weights of the steps in which the unit was there
    squares: ByUnit[Float[Tensor, " all_units"]]  # sum of their squared weights
    num_steps: Float[Tensor, ""]  # how many there are (0-dim tensors, so that counting needs no host sync)
    skipped_steps: Float[Tensor, ""]  # steps left out because a gradient was NaN or infinite
    steps_seen: tuple[int, ...]  # by group, steps in which any of its weights had a gradient
    recent: tuple[Float[Tensor, " all_units"], ...] = ()  # what was measured in steps not folded yet, the latest last
    units: Units | None = field(default=None, metadata=FOUND_ANEW)  # whose weights are read
    tapped: frozenset[str] = field(default=frozenset(), metadata={"live": True})  # weights frozen at `init`
    scale: GradientScale | None = field(default=None, metadata={"live": True})  # of gradients against taps
    window: int = field(default=50, metadata={"live": True})  # number of recent steps that count

    def by_group(self, values: Shaped[np.ndarray, " all_units"]) -> dict[str, Shaped[np.ndarray, " _units"]]:
        return dict(zip(self.names, np.split(values, np.cumsum(self.num_units)[:-1]), strict=True))

    @torch.no_grad()
    def folded(self, seen: Bool[Tensor, " all_units"] | None = None) -> Moments:
        """The recent steps taken into the moments, but only of the units that were seen in them; no host sync.

        With `s` the newer steps' share of the weight, `m = m1 + s (m2 - m1)` and `v = (1 - s) v1 + s v2 + s (1 - s)
        (m2 - m1)^2` are exact.
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


class AveragingSensor(Sensor[Moments]):
    """A criterion, averaged over recent optimizer steps.

    Mean and variance are exponentially weighted with decay `1 - 1/window`, without start-up bias, in float32 (float64
    for float64 models). A step in which any gradient is NaN or infinite is left out and counted. While the weights that
    are read of a group are frozen in the middle of a run, its earlier readings stand.

    Args:
        criterion: what is measured, and what its average says.
        num_samples: independent samples behind each optimizer step's gradient, over ranks and micro-batches.
        window: number of recent steps that count, in optimizer steps.
    """

    def __init__(self, criterion: Criterion, num_samples: int = 1, window: int = 50) -> None:
        self.criterion, self.traits = criterion, criterion.traits
        self.num_samples, self.window = counts(num_samples=num_samples, window=window)
        self.ranks = Ranks()  # over which gradients are averaged; what taps read is averaged too

    def over(self, ranks: Ranks) -> AveragingSensor:
        other = copy.copy(self)
        other.ranks = ranks
        return other

    def readable(self, groups: tuple[Group, ...], model: nn.Module) -> tuple[Group, ...]:
        found = self._tapped(groups, model)
        return tuple(group for group in groups if group.name in found)

    def _tapped(self, groups: tuple[Group, ...], model: nn.Module) -> dict[str, set[str]]:
        """The frozen weights of each group that can be read: the others are trained, and taps read inputs of these."""
        parameters = model.named_parameters(remove_duplicate=False)
        trained = {name for name, parameter in parameters if parameter.requires_grad}
        found = dict[str, set[str]]()
        for group in groups:
            read = {place.tensor for place in self.criterion.places(group)}
            frozen = read - trained
            if read and (not frozen or (self.traits.hooks and frozen <= tappable(group, model))):
                found[group.name] = frozen
        return found

    def init(self, groups: tuple[Group, ...], model: nn.Module) -> Moments:
        by_group = self._tapped(groups, model)
        if unreadable := sorted({group.name for group in groups} - by_group.keys()):
            name, kind = type(self).__name__, {"consume": "outgoing", "produce": "incoming"}[self.criterion.role]
            raise GroupError(
                f"groups {unreadable} have {kind} weights without gradients, so {name} cannot read them: leave them "
                f"out ({name}.readable picks the others) or use another sensor"
            )
        tapped = frozenset[str]().union(*by_group.values())
        scale = GradientScale.of(groups, model, tapped) if tapped else None
        units = find_units(groups, model, self.criterion.places, tapped, scale, self.ranks)
        zeros, none = units.like.new_zeros(sum(units.num_units)), units.like
        names, seen = tuple(group.name for group in groups), (0,) * len(groups)
        moments = (zeros, zeros, zeros, zeros, none, none)
        return Moments(names, units.num_units, *moments, seen, (), units, tapped, scale, self.window)

    @torch.no_grad()
    def update(
        self, state: Moments, groups: tuple[Group, ...], model: nn.Module, grad_scale: Tensor | None = None
    ) -> Moments:
        units = state.units
        # A rank cannot know what others have seen through their taps: what nobody has seen counts as zero, unless it
        # could not be seen, since the taps have only just been put there.
        shared = self.ranks.count > 1 and units is not None
        units = units or find_units(groups, model, self.criterion.places, state.tapped, state.scale, self.ranks)

        def elsewhere(source: Source) -> bool:
            return shared and source.tap is not None

        steps_seen = tuple(
            steps + any(elsewhere(source) or source.has_gradient() for source in sources)
            for steps, sources in zip(state.steps_seen, units.by_group, strict=True)
        )
        # A weight without a gradient was not used by the loss, and is worth nothing in this step. But as long as
        # nothing was ever seen of a group it may as well be frozen, or behind a `detach`: then it is unknown.
        counts = [
            steps > 0 and all(elsewhere(source) or source.readable() for source in sources)
            for steps, sources in zip(steps_seen, units.by_group, strict=True)
        ]
        measured = self.criterion.measure(units if grad_scale is None else replace(units, grad_scale=grad_scale))
        if not all(counts):
            counted = torch.from_numpy(np.repeat(counts, state.num_units)).to(measured.device)
            state = replace(state.folded(), recent=(measured,), units=units, steps_seen=steps_seen)
            return state.folded(counted)
        state = replace(state, recent=(*state.recent, measured), units=units, steps_seen=steps_seen)
        return state if len(state.recent) < _FOLD_AT else state.folded()

    def forget(self, state: Moments) -> None:
        for tap in _taps(state):
            tap.take()
        if state.scale is not None:
            state.scale.forget()

    def release(self, state: Moments) -> None:
        for tap in _taps(state):
            tap.stop()
        if state.scale is not None:
            state.scale.stop()

    def flops(self, groups: tuple[Group, ...], model: nn.Module) -> float:
        units = find_units(groups, model, self.criterion.places)
        read = sum(source.num_read for sources in units.by_group for source in sources)
        return (3.0 * read + sum(parameter.numel() for parameter in units.others)) / units.ranks.count

    def read(self, state: Moments, groups: tuple[Group, ...], step: int) -> Reading:
        """With fewer than two steps the variance counts as zero; LoopError for a group that taps have not seen."""
        state = state.folded()
        facts = torch.stack([state.num_steps, state.skipped_steps])
        # One transfer to the host, which waits for the device, in place of six.
        values = torch.cat([facts, state.mean, state.variance, state.weight, state.squares]).double().cpu().numpy()
        num_steps, skipped = (float(value) for value in values[:2])
        mean, variance, weight, squares = np.split(values[2:], 4)
        if state.tapped and num_steps:
            # Where readings are shared, a step counts that nobody saw anything in.
            seen = weight > 0 if self.ranks.count == 1 else (mean != 0) | (variance != 0)
            for name, of_units in state.by_group(seen).items():
                if _taps(state, name) and len(of_units) and not of_units.any():
                    raise LoopError(
                        f"nothing was seen of group {name!r}, whose outgoing weights are frozen: no gradient comes "
                        "through its layer, or the layer is not called as a module, or it runs as compiled code. Leave "
                        "the group out (groups=...), or train the weights"
                    )
        # The weighted variance of n steps is too small by 1 - (sum of squares of their shares); 1 - 1/n if equal.
        shares = squares / np.maximum(weight, _TINY) ** 2
        several = (weight > 0) & (shares < 1.0)
        unbiased = np.where(several, variance, 0.0) / np.where(several, 1.0 - shares, 1.0)
        slope, norm = dict[str, np.ndarray](), dict[str, np.ndarray]()
        if self.criterion.is_slope:
            slope = state.by_group(mean)
            if state.units is not None:
                norm = state.by_group(state.units.squares().sqrt().double().cpu().numpy())
        return Reading(
            step,
            state.by_group(self.criterion.saliency(mean, unbiased, self.num_samples)),
            self.num_samples,
            calibrated=self.traits.calibrated,
            in_loss=self.traits.in_loss,
            num_steps=round(num_steps),
            skipped_steps=round(skipped),
            steps_seen=dict(zip(state.names, state.steps_seen, strict=True)),
            slope=slope,
            norm=norm,
        )


def _taps(state: Moments, *names: str) -> list[Tap]:
    by_group = zip(state.names, () if state.units is None else state.units.by_group, strict=False)
    sources = (source for name, found in by_group if not names or name in names for source in found)
    return [source.tap for source in sources if source.tap is not None]


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

    *The gate's gradient* needs no gate in the forward pass (Molchanov et al. 2019): by the chain rule, exactly and for
    any activation, `r = sum of w * dL/dw over the unit's outgoing ("consume") weights`.

    *The curvature* (optimal brain damage, LeCun et al. 1990; by the Fisher information, Theis et al. 2018) of a
    log-likelihood loss is in expectation the Fisher diagonal `E[r_sample^2]`, where `r_sample` is the gate gradient of
    one sample's loss. A step shows only the mean of B samples, whose variance over steps is `var(r) = var(r_sample) /
    B`; hence `E[r_sample^2] = B var(r) + mean(r)^2`. With mean and variance over recent steps (`AveragingSensor`),

        saliency = 1/2 (B var(r) + mean(r)^2)                          by default,
        saliency = max(0, -mean(r) + 1/2 (B var(r) + mean(r)^2))       with first_order=True.

    The first-order term is a local slope and left out by default, since a drop is a large step: before a normalisation
    the slopes of a group add up to zero, whatever the units are worth.

    Saliency has the unit of the loss. Gradients that are clipped or scaled before the optimizer's step scale r, too. A
    weight that is tied to another one carries the gradients of both.

    *Weights that are frozen from the beginning* (the base of a low-rank adapter) have no gradient. The gate may as well
    scale the layer's inputs: `r = sum of x * dL/dx over the unit's inputs x of that layer`, which a hook on the layer
    reads in the backward pass, at the scale that gradients have at the step (under `fully_shard`, at that of the
    backward pass). One all-reduce at each update averages it over ranks.

    Args:
        num_samples: independent samples behind each optimizer step's gradient (B), over ranks and micro-batches.
        window: number of recent steps that count, in optimizer steps.
        first_order: whether the slope counts too.

    Raises:
        ValueError: if `num_samples` or `window` is not a positive integer.

    References:
        Molchanov et al.: "Importance Estimation for Neural Network Pruning", CVPR 2019. LeCun, Denker, Solla: "Optimal
        Brain Damage", NIPS 1990. Theis et al.: "Faster gaze prediction with dense networks and Fisher pruning", 2018.

    >>> import setpoint
    >>> model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(16, 4)
    >>> optimizer, sensor = torch.optim.SGD(model.parameters(), lr=0.1), TaylorSensor(num_samples=16, window=20)
    >>> loop = setpoint.attach(model, optimizer, 0.5, total_steps=300, example=(x,), sensor=sensor)
    >>> model(x).square().mean().backward()
    >>> optimizer.step()
    >>> loop.reading().saliency["0"].shape
    (8,)
    >>> loop.detach()
    """

    def __init__(self, num_samples: int, window: int = 50, first_order: bool = False) -> None:
        super().__init__(taylor_with_slope if first_order else taylor, num_samples, window)
