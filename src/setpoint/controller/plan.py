"""A plan: all decisions of one step, as data; and the protocol of whatever makes plans."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float64, Int

from setpoint.controller.horizon import Remaining
from setpoint.controller.trend import Excess
from setpoint.cost.budget import Price, Tolerance
from setpoint.cost.cost import Cost
from setpoint.groups.group import Group
from setpoint.sensor.reading import Reading


@dataclass(frozen=True, eq=False)
class Probe:
    """First-order gain of bringing each resting unit back, as read in a few ordinary steps.

    With its outgoing weights at zero a unit changes nothing, and the loss falls along the way to the weights
    `w` that it had when it was dropped by, to first order,

        gain = -sum over its outgoing weights of w * dL/dw, at zero.

    A few steps tell this only roughly, and whoever picks the largest of many rough numbers picks luck. So decisions go
    by `gain - error`.

    Once back, a unit stays or goes by what the sensor reads of it, which is its curvature. The steps tell that too:
    with B samples behind a step, gate gradients -gain of mean m and deviation s foretell the saliency
    (B s^2 + m^2) / 2.

    By group there is an entry for each of `origins`, the units that were probed. Error and deviation are NaN where a
    unit was present in one step only; without a deviation nothing is foretold of the saliency.
    """

    step: int  # optimizer steps done when it was taken
    origins: Mapping[str, Int[np.ndarray, " _resting"]]
    gain: Mapping[str, Float64[np.ndarray, " _resting"]]  # in the unit of the loss, mean over the probed steps
    error: Mapping[str, Float64[np.ndarray, " _resting"]]  # standard error of that mean
    rested: Mapping[str, Int[np.ndarray, " _resting"]]  # decisions since the unit was dropped
    drops: Mapping[str, Int[np.ndarray, " _resting"]]  # how often the unit has been dropped so far
    num_steps: int = 1  # how many were probed
    deviation: Mapping[str, Float64[np.ndarray, " _resting"]] = field(default_factory=dict)  # of the gain in one step

    def foretold(self, name: str, num_samples: int) -> Float64[np.ndarray, " _resting"]:
        """Saliency that the sensor will read of the units of a group once they are back; infinite where not known."""
        gain = self.gain[name]
        deviation = self.deviation.get(name)
        return np.full(len(gain), np.inf) if deviation is None else 0.5 * (num_samples * deviation**2 + gain**2)


@dataclass(frozen=True, eq=False)
class Observation:
    """What the controller sees at one decision.

    Args:
        step: optimizer steps done so far.
        planned_steps: as in a run of how many steps decisions fall: the run's length, unless a budget decides that.
        widths: active units by group.
        dense_widths: units by group of the dense model.
        reading: saliency of every active unit, or None if there is none yet.
        dense: dense cost by resource, in the resource's own unit.
        limit: the budget by resource, in the resource's own unit.
        spent: predicted cost per step at the present widths, by resource.
        metered: measured cost per step, by resource; empty where there is no meter.
        loss: last observed loss, or None.
        val: last observed validation loss, or None.
        probe: gain of every resting unit, or None if none was taken since the last decision.
        excess: how far the loss lies above the trend that it had before the last cut, or None if that is not known.
        last_dropped: by group, origins of the last cut's units, while they can come back.
        ceiling: by resource of a budget for the whole run, the highest cost of a step until the next decision: above
            it, not even the narrowest model would meet the budget from there on.
        remaining: by resource of a budget for the whole run, what is left of it, and what else it is spent on.
        learning_flops: what a controller that learns may spend on it at this decision, in FLOPs.
    """

    step: int
    planned_steps: int
    widths: Mapping[str, int]
    dense_widths: Mapping[str, int]
    reading: Reading | None
    dense: Mapping[str, float]
    limit: Mapping[str, float]
    spent: Mapping[str, float]
    metered: Mapping[str, float] = field(default_factory=dict)
    loss: float | None = None
    val: float | None = None
    probe: Probe | None = None
    excess: Excess | None = None
    last_dropped: Mapping[str, Int[np.ndarray, " _units"]] = field(default_factory=dict)
    ceiling: Mapping[str, float] = field(default_factory=dict)
    remaining: Mapping[str, Remaining] = field(default_factory=dict)
    learning_flops: float = math.inf


@dataclass(frozen=True, eq=False)
class Plan:
    """All decisions of one step.

    Args:
        step: step of the observation it answers.
        keep: by group name, boolean per active unit, True = stays. Groups that lose nothing may be absent.
        worth: by group name, per active unit: saliency of its block / saving of the block when the decision was made;
            NaN where it was not evaluated.
        price: the budget's Lagrange multiplier, loss per unit of resource, by resource.
        reference: cost per step that the reference trajectory allows now, by resource.
        budget_met: True on the last decision: within budget, and no single block can be added back.
        reason: why, for people.
        grow: by group name, origins of the units that come back from the reserve, ascending.
        grow_worth: by group name, in that order: probed gain of the unit's block / what the block costs.
        flops: that the controller has spent on learning for this decision.
        undoes: whether `grow` takes the whole last cut back, since the loss did not stand it.
        drop_and_grow: where units are single weights, share of each group's active ones that makes room for others.
        again: a step at which to decide besides those of the controller; 0 for none.
        gave_way: which goal lost, where budget and loss cannot both be met; "" otherwise.
    """

    step: int
    keep: Mapping[str, Bool[np.ndarray, " units"]]
    worth: Mapping[str, Float64[np.ndarray, " units"]] = field(default_factory=dict)
    price: Mapping[str, float] = field(default_factory=dict)
    reference: Mapping[str, float] = field(default_factory=dict)
    budget_met: bool = False
    reason: str = ""
    grow: Mapping[str, Int[np.ndarray, " _units"]] = field(default_factory=dict)
    grow_worth: Mapping[str, Float64[np.ndarray, " _units"]] = field(default_factory=dict)
    drop_and_grow: float = 0.0
    flops: float = 0.0
    undoes: bool = False
    again: int = 0
    gave_way: str = ""

    def drops(self) -> bool:
        """True when any unit is dropped."""
        return not all(bool(keep.all()) for keep in self.keep.values())

    def grows(self) -> bool:
        """True when any unit comes back."""
        return any(len(origins) for origins in self.grow.values())

    def empty(self) -> bool:
        """True when no unit is dropped and none comes back."""
        return not self.drops() and not self.grows() and not self.drop_and_grow


State = TypeVar("State")


@runtime_checkable
class Controller(Protocol[State]):
    """Turns an observation and its own state into a plan. Closed loop and baselines alike."""

    def init(self, groups: tuple[Group, ...]) -> State:
        """State before the first decision; what has an entry for each active unit is annotated `ByUnit[...]`."""

    def due(self, step: int, total_steps: int) -> bool:
        """Whether a decision is to be made after this step (no reading is taken otherwise)."""

    def decide(
        self, state: State, observation: Observation, cost: Cost, groups: tuple[Group, ...]
    ) -> tuple[State, Plan]:
        """The next state and the plan. Pure: same arguments, same answer."""


@runtime_checkable
class RegrowingController(Protocol):
    """What a controller has in addition that brings dropped units back."""

    @property
    def regrow(self) -> bool:
        """Whether it does; if so, dropped units rest in a reserve."""

    def probe_due(self, step: int, total_steps: int) -> bool:
        """Whether resting units should be present in the step after this one, to be read."""


@runtime_checkable
class Learning(Protocol):
    """What a controller has in addition that learns by itself."""

    def flops(self, groups: tuple[Group, ...], allowance: float = math.inf) -> float:
        """FLOPs, within the allowance, that one decision spends on learning at most; `Plan.flops` is what it has."""


@runtime_checkable
class Transferring(Protocol[State]):
    """What a controller has in addition whose memory belongs to one budget and one length of the run."""

    def transferred(self, state: State, *, step: int, total_steps: int, present: float, limit: float) -> State:
        """The state with which it goes on without a bump when either changes in the middle of the run.

        Args:
            total_steps: of the run, as it is now.
            present: predicted cost of a step now.
            limit: the new one.
        """


Goal = Price | Tolerance | Literal["budget"]
"""What a controller pursues."""


@runtime_checkable
class Pursuing(Protocol):
    """What a controller has in addition that pursues one goal, and cannot be given another by `attach`."""

    @property
    def goal(self) -> Goal:
        """The price or tolerance that it was made with, or "budget" for whatever budgets it is given."""


def regrows(controller: object) -> bool:
    """Whether a controller brings dropped units back."""
    return isinstance(controller, RegrowingController) and controller.regrow
