"""The averaging sensor: a criterion, measured in optimizer steps and averaged over the recent ones."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from setpoint.arguments import counts
from setpoint.distributed import Ranks
from setpoint.errors import GroupError, LoopError
from setpoint.groups.follow import FOUND_ANEW, ByUnit
from setpoint.groups.group import Group
from setpoint.sensor.criterion import Criterion
from setpoint.sensor.reading import Reading, Sensor
from setpoint.sensor.tap import GradientScale, Tap, tappable
from setpoint.sensor.units import Units, find_units

_FOLD_AT = 16  # steps that are folded into the moments at a time: on small models calls cost more than arithmetic
_TINY = 1e-30  # keeps a division by a weight of zero, which then counts for nothing, from making NaN


@dataclass(frozen=True, eq=False)
class Moments:
    """Running moments of what is measured of all units, one group after the other.

    A step's weight is `decay^age`, its age counted in later steps that were taken in.
    """

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

    def __post_init__(self) -> None:
        if any(step.shape != self.mean.shape for step in self.recent):
            raise ValueError(f"each recent step holds a number for each of the {len(self.mean)} units")

    def by_group(self, values: Shaped[np.ndarray, " all_units"]) -> dict[str, Shaped[np.ndarray, " _units"]]:
        """What lies one group after the other, by group."""
        return dict(zip(self.names, np.split(values, np.cumsum(self.num_units)[:-1]), strict=True))

    @torch.no_grad()
    def folded(self, seen: Bool[Tensor, " all_units"] | None = None) -> Moments:
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


class AveragingSensor(Sensor[Moments]):
    """A criterion, averaged over recent optimizer steps.

    Mean and variance are exponentially weighted with decay `1 - 1/window`, without start-up bias, in float32 (float64
    for float64 models). A step in which any gradient is NaN or infinite is left out and counted. Each rank adds up its
    own part of sharded weights. While the weights that are read of a group are frozen in the middle of a run, its
    earlier readings stand.

    Args:
        criterion: what is measured, and what its average says.
        num_samples: independent samples behind each optimizer step's gradient, over ranks and micro-batches.
        window: number of recent steps that count, in optimizer steps.
        ranks: over which gradients are averaged, where what hooks read is to be averaged too.

    Raises:
        ValueError: if `num_samples` or `window` is not a positive integer.

    >>> import setpoint
    >>> from setpoint.sensor.criterion import gradient_norm
    >>> model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(16, 4)
    >>> optimizer, sensor = torch.optim.SGD(model.parameters(), lr=0.1), AveragingSensor(gradient_norm)
    >>> loop = setpoint.attach(model, optimizer, 0.5, total_steps=30, example=(x,), sensor=sensor)
    >>> model(x).square().mean().backward()
    >>> optimizer.step()
    >>> loop.reading().saliency["0"].shape
    (8,)
    >>> loop.detach()
    """

    def __init__(
        self, criterion: Criterion, num_samples: int = 1, window: int = 50, ranks: Ranks | None = None
    ) -> None:
        self.criterion, self.traits = criterion, criterion.traits
        self.num_samples, self.window = counts(num_samples=num_samples, window=window)
        self.ranks = Ranks() if ranks is None else ranks

    def over(self, ranks: Ranks) -> AveragingSensor:
        """The sensor where gradients are averaged over ranks."""
        other = copy.copy(self)
        other.ranks = ranks
        return other

    def hooked(self, state: Moments) -> bool:
        """Whether weights that were frozen at `init` are read by hooks."""
        return bool(state.tapped)

    def readable(self, groups: tuple[Group, ...], model: nn.Module) -> tuple[Group, ...]:
        """The groups of which every weight that is read is trained, or frozen where a tap can read the layer's input.

        What is measured of any other would be a part of the truth. Incoming ("produce") weights are no substitute for
        outgoing ones: before a normalisation their sum of w * dL/dw is zero, and through a curved activation it has the
        wrong size or sign.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        trained = {name for name, parameter in parameters.items() if parameter.requires_grad}

        def seen(group: Group) -> bool:
            read = {place.tensor for place in self.criterion.places(group)}
            return bool(read) and read <= trained | (tappable(group, model) if self.traits.hooks else frozenset())

        return tuple(group for group in groups if seen(group))

    def init(self, groups: tuple[Group, ...], model: nn.Module) -> Moments:
        """Empty moments on the device of the weights; GroupError for a group that is not `readable`."""
        unreadable = sorted({group.name for group in groups} - {group.name for group in self.readable(groups, model)})
        if unreadable:
            raise GroupError(
                f"groups {unreadable} have {_WORDS[self.criterion.role]} weights without gradients, so "
                f"{type(self).__name__} cannot read them: leave them out ({type(self).__name__}.readable picks the "
                "others) or use another sensor"
            )
        tapped = frozenset[str]().union(*(tappable(group, model) for group in groups if self.traits.hooks))
        scale = GradientScale(_smallest_writer(groups, model, tapped)) if tapped else None
        units = self._units(groups, model, tapped, scale)
        zeros, none = units.like.new_zeros(sum(units.num_units)), units.like
        names, seen = tuple(group.name for group in groups), (0,) * len(groups)
        moments = (zeros, zeros, zeros, zeros, none, none)
        return Moments(names, units.num_units, *moments, seen, (), units, tapped, scale, self.window)

    @torch.no_grad()
    def update(
        self, state: Moments, groups: tuple[Group, ...], model: nn.Module, grad_scale: Tensor | None = None
    ) -> Moments:
        """Take in the gradients of one optimizer step. No host sync."""
        units = state.units or self._units(groups, model, state.tapped, state.scale)
        # A rank cannot know what others have seen: where it is shared, what nobody has seen counts as zero, unless it
        # could not be seen, since what reads it has only just been put there.
        shared = self.ranks.count > 1 and state.units is not None
        taps = [shared and any(source.tap for source in of_group) for of_group in units.by_group]
        now = [tap or any(s.has_gradient() for s in of) for tap, of in zip(taps, units.by_group, strict=True)]
        steps_seen = tuple(steps + one for steps, one in zip(state.steps_seen, now, strict=True))
        # A weight without a gradient was not used by the loss, and is worth nothing in this step. But as long as
        # nothing was ever seen of a group it may as well be frozen, or behind a `detach`: then it is unknown.
        trains = [
            bool(steps) and all(source.seen() or (shared and source.tap) for source in of_group)
            for steps, of_group in zip(steps_seen, units.by_group, strict=True)
        ]
        measured = self.criterion.measure(units if grad_scale is None else replace(units, grad_scale=grad_scale))
        if not all(trains):
            seen = torch.from_numpy(np.repeat(trains, state.num_units)).to(measured.device)
            state = replace(state.folded(), recent=(measured,), units=units, steps_seen=steps_seen)
            return state.folded(seen)
        state = replace(state, recent=(*state.recent, measured), units=units, steps_seen=steps_seen)
        return state if len(state.recent) < _FOLD_AT else state.folded()

    def _units(
        self, groups: tuple[Group, ...], model: nn.Module, tapped: frozenset[str], scale: GradientScale | None
    ) -> Units:
        return find_units(groups, model, self.criterion.places, tapped, scale, self.ranks)

    def forget(self, state: Moments) -> None:
        """A step passes that is not taken in: what hooks have seen of it does not count."""
        for tap in _taps(state):
            tap.take()
        if state.scale is not None:
            state.scale.forget()

    def release(self, state: Moments) -> None:
        """Take the hooks off the model; nothing is read through them any more."""
        for tap in _taps(state):
            tap.stop()
        if state.scale is not None:
            state.scale.stop()

    def flops(self, groups: tuple[Group, ...], model: nn.Module) -> float:
        """FLOPs of one update on each rank: three for each entry that is read, one for every gradient only checked."""
        units = find_units(groups, model, self.criterion.places)
        read = sum(source.num_read for of_group in units.by_group for source in of_group)
        return (3.0 * read + sum(parameter.numel() for parameter in units.others)) / units.ranks.count

    def read(self, state: Moments, groups: tuple[Group, ...], step: int) -> Reading:
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
        is_slope = self.criterion.is_slope
        return Reading(
            step,
            state.by_group(self.criterion.saliency(mean, unbiased, self.num_samples)),
            self.num_samples,
            calibrated=self.traits.calibrated,
            in_loss=self.traits.in_loss,
            num_steps=round(num_steps),
            skipped_steps=round(skipped),
            steps_seen=dict(zip(state.names, state.steps_seen, strict=True)),
            slope=state.by_group(mean) if is_slope else {},
            norm=state.by_group(_norms(state.units)) if is_slope and state.units is not None else {},
        )


_WORDS = {"consume": "outgoing", "produce": "incoming"}


def _taps(state: Moments) -> list[Tap]:
    return [] if state.units is None else state.units.taps()


def _smallest_writer(groups: tuple[Group, ...], model: nn.Module, tapped: frozenset[str]) -> nn.Parameter:
    """The smallest trained weight that writes units of which a frozen weight is read: each such group has one."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    writers = [
        parameters[place.tensor]
        for group in groups
        if any(place.tensor in tapped for place in group.slices)
        for place in group.slices
        if place.role != "consume" and place.tensor in parameters and parameters[place.tensor].requires_grad
    ]
    return min(writers, key=lambda parameter: parameter.numel())


def _check_seen(state: Moments, num_steps: float, seen: Bool[np.ndarray, " all_units"]) -> None:
    """Check that hooks have seen something of each group that they are to read, once steps were taken in."""
    if not state.tapped or not num_steps or state.units is None:
        return
    for (name, of_units), of_group in zip(state.by_group(seen).items(), state.units.by_group, strict=True):
        if any(source.tap is not None for source in of_group) and len(of_units) and not of_units.any():
            raise LoopError(
                f"nothing was seen of group {name!r}, whose outgoing weights are frozen: no gradient comes through its "
                "layer, or the layer is not called as a module, or it runs as compiled code. Leave the group out "
                "(groups=...), or train the weights"
            )


@torch.no_grad()
def _norms(units: Units) -> Float[np.ndarray, " all_units"]:
    norms: np.ndarray = units.add_up_weights(torch.square).sqrt().double().cpu().numpy()
    return norms
