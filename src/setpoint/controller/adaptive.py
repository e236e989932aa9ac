"""The adaptive controller: stays dense until successive readings rank the units alike, then hands over."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import final

import numpy as np
from jaxtyping import Bool, Float64

from setpoint.controller.plan import Observation, Plan
from setpoint.controller.priced import PricedController, PricedState
from setpoint.controller.reason import problem_with
from setpoint.controller.reference import Reference
from setpoint.cost.cost import Cost
from setpoint.groups.group import Group, keep_all
from setpoint.sensor.reading import Reading

Saliency = Mapping[str, Float64[np.ndarray, " _units"]]


@dataclass(frozen=True, eq=False)
class AdaptiveState:
    """What the controller remembers between decisions.

    Args:
        inner: the state of the controller that it hands over to.
        before: saliency in the last reading, while the model is dense.
        left: share of the run at which the reference left dense, None before.
    """

    inner: PricedState
    before: Saliency | None = None
    left: float | None = None


@final
@dataclass(frozen=True)
class AdaptiveController:
    """Lets the reference leave dense once gradients have settled, at the latest at a deadline.

    Decisions are made at the steps of `inner.reference`. As long as the model is dense, each compares its reading with
    the one before: with ranks over the units of all groups together (within each group where a reading is not
    calibrated, and then the mean over groups), the rank correlation

        rho = corr(rank(saliency now), rank(saliency before)).

    Once `rho >= alike`, or at the first decision from `deadline` on, the ramp begins there, and `inner` decides, with
    the same steps of decisions and the same settle step: a late start means fewer and larger cuts. In a run so short
    that the first decision is to land, it lands. Where a budget of the whole run would be missed by staying dense until
    the next decision, `inner` decides at once.

    Args:
        inner: decides once the model may shrink; its reference's warm-up is the earliest start.
        alike: rank correlation that counts as settled, in [-1, 1].
        deadline: fraction of the run at which the ramp begins whatever the readings say.

    Raises:
        ValueError: for a setting out of range.
    """

    inner: PricedController = field(default_factory=PricedController)
    alike: float = 0.9
    deadline: float = 0.15

    def __post_init__(self) -> None:
        if not isinstance(self.inner, PricedController):
            raise ValueError(f"the adaptive controller hands over to a PricedController, got {self.inner!r}")
        if not -1 <= self.alike <= 1:
            raise ValueError(f"alike is a correlation in [-1, 1], got {self.alike!r}")
        if not self.inner.reference.warmup <= self.deadline < self.inner.reference.settle:
            raise ValueError(f"the deadline must lie between the reference's warm-up and settle, got {self.deadline!r}")

    @property
    def reference(self) -> Reference:
        """Times of decisions."""
        return self.inner.reference

    @property
    def regrow(self) -> bool:
        """Whether dropped units come back."""
        return self.inner.regrow

    def init(self, groups: tuple[Group, ...]) -> AdaptiveState:
        """State before the first decision."""
        return AdaptiveState(self.inner.init(groups))

    def due(self, step: int, total_steps: int) -> bool:
        """Whether a decision is to be made after this step."""
        return self.inner.due(step, total_steps)

    def probe_due(self, step: int, total_steps: int) -> bool:
        """Whether resting units should be present in the step after this one."""
        return self.inner.probe_due(step, total_steps)

    def cut(self, state: AdaptiveState, keep: Mapping[str, Bool[np.ndarray, " units"]]) -> AdaptiveState:
        """State of the kept units."""
        return replace(state, inner=self.inner.cut(state.inner, keep))

    def grow(self, state: AdaptiveState, regrown: Mapping[str, Bool[np.ndarray, " units"]]) -> AdaptiveState:
        """State with the units that have come back."""
        return replace(state, inner=self.inner.grow(state.inner, regrown))

    def after(self, state: AdaptiveState) -> PricedController:
        """The inner controller with the ramp where it began."""
        if state.left is None:
            return self.inner
        return replace(self.inner, reference=replace(self.inner.reference, warmup=state.left))

    def decide(
        self, state: AdaptiveState, observation: Observation, cost: Cost, groups: tuple[Group, ...]
    ) -> tuple[AdaptiveState, Plan]:
        """The next state and the plan. Pure: same arguments, same answer.

        Args:
            state: from `init` or the last decision, cut like the groups.
            observation: what is known at this step.
            cost: predicts spending; names the resource.
            groups: the groups that may be cut, as they are now.
        """
        if state.left is not None:
            inner, plan = self.after(state).decide(state.inner, observation, cost, groups)
            return replace(state, inner=inner), plan
        step, total_steps, reading = observation.step, observation.total_steps, observation.reading
        whole = keep_all(groups)
        reference = {cost.resource: cost.total(observation.widths)}
        dense = Plan(step, whole, price={cost.resource: 0.0}, reference=reference)
        problem = problem_with(reading, None, groups)
        if reading is None or problem:
            return state, replace(dense, reason=problem)
        rho = _stability(state.before, reading, observation.rank_correlation) if state.before else None
        settled = self.reference.settled(step, total_steps)
        metered = observation.metered.get(cost.resource, reference[cost.resource])
        pressed = metered > observation.most.get(cost.resource, math.inf)
        late = settled or pressed or step >= self.deadline * total_steps
        words = "this is the first reading" if rho is None else f"rank correlation with the last reading {rho:.2f}"
        if not late and (rho is None or rho < self.alike):
            state = replace(state, before=dict(reading.saliency))
            return state, replace(dense, reason=f"still dense: {words}, {self.alike:g} is needed")
        left = min(step / total_steps, self.reference.settle * (1 - 1e-9))
        why = "readings rank units alike" if rho is not None and rho >= self.alike else "the deadline is here"
        state = replace(state, before=None, left=left)
        if settled or pressed:
            return self.decide(state, observation, cost, groups)
        reason = f"the reference leaves dense: {why} ({words})"
        return state, replace(dense, reason=reason)


def _stability(before: Saliency, reading: Reading, followed: Mapping[str, float]) -> float:
    """Rank correlation with the last reading; of units and of balanced states, the lesser one."""
    own = {name: values for name, values in reading.saliency.items() if name not in reading.basis}
    found = [followed[name] for name in reading.basis if name in followed]
    return min([*found, *([agreement(before, own, across=reading.calibrated)] if own else [])], default=1.0)


def agreement(before: Saliency, now: Saliency, *, across: bool) -> float:
    """Rank correlation of two readings of the same units.

    Args:
        before: saliency by group.
        now: the same groups, as wide.
        across: rank the units of all groups together; else within each group, and take the mean over groups.

    >>> a = {"x": np.array([1.0, 2.0, 3.0]), "y": np.array([10.0, 20.0])}
    >>> b = {"x": np.array([1.0, 2.0, 3.0]), "y": np.array([20.0, 10.0])}
    >>> round(agreement(a, b, across=True), 3), round(agreement(a, b, across=False), 3)
    (0.9, 0.0)
    """
    names = sorted(now)
    if across:
        return rank_correlation(np.concatenate([before[n] for n in names]), np.concatenate([now[n] for n in names]))
    return float(np.mean([rank_correlation(before[n], now[n]) for n in names]))


def rank_correlation(one: Float64[np.ndarray, " units"], other: Float64[np.ndarray, " units"]) -> float:
    """Spearman's; units that are equal share their mean rank, and where all are equal it is 1.

    >>> round(rank_correlation(np.array([1.0, 2.0, 3.0]), np.array([1.0, 30.0, 20.0])), 3)
    0.5
    """
    ranks = [_ranks(one), _ranks(other)]
    x, y = (each - each.mean() for each in ranks)
    scale = float(np.sqrt((x**2).sum() * (y**2).sum()))
    return float((x * y).sum()) / scale if scale > 0 else 1.0


def _ranks(values: Float64[np.ndarray, " units"]) -> Float64[np.ndarray, " units"]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[inverse]
