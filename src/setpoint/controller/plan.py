"""A plan: all decisions of one step, as data; and the protocol of whatever makes plans."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float64, Int

from setpoint.controller.schedule import Schedule
from setpoint.cost.budget import UNIT, Price, Tolerance
from setpoint.cost.cost import Cost
from setpoint.groups.group import Group
from setpoint.sensor.reading import Reading

if TYPE_CHECKING:  # runs without them never load these files
    from setpoint.controller.horizon import Remaining
    from setpoint.controller.offer import Probe
    from setpoint.controller.trend import Excess


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
        drop_and_grow: where units are single weights, share of each group's active ones that makes room for others.
        flops: that the controller has spent on learning for this decision.
        undoes: whether `grow` takes the whole last cut back, since the loss did not stand it.
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


Goal = Price | Tolerance | Literal["budget"]
"""What a controller pursues: the price or tolerance that it was made with, or whatever budgets it is given."""

State = TypeVar("State")


@dataclass(frozen=True)
class Conduct:
    """What `attach` has to know of a controller.

    Args:
        schedule: when it decides.
        goal: `attach` can give it no other.
        regrow: whether it brings dropped units back, so that they rest in a reserve.
        yields: whether, where the loss does not stand a cut, the last one is taken back once in a run.
        learns: whether it looks at each unit by itself, and spends FLOPs on learning.
    """

    schedule: Schedule = Schedule()
    goal: Goal = "budget"
    regrow: bool = False
    yields: bool = True
    learns: bool = False


@runtime_checkable
class Controller(Protocol[State]):
    """Turns an observation and its own state into a plan. Setpoint's controllers and baselines derive from it.

    A controller of your own derives from this class, and defines `init` and `decide`.
    """

    @property
    def conduct(self) -> Conduct:
        """What `attach` has to know of it."""
        return Conduct()

    def init(self, groups: tuple[Group, ...]) -> State:
        """State before the first decision; what has an entry for each active unit is annotated `ByUnit[...]`."""
        ...

    def due(self, step: int, total_steps: int) -> bool:
        """Whether a decision is to be made after this step (no reading is taken otherwise)."""
        return self.conduct.schedule.due(step, total_steps)

    def decide(
        self, state: State, observation: Observation, cost: Cost, groups: tuple[Group, ...]
    ) -> tuple[State, Plan]:
        """The next state and the plan. Pure: same arguments, same answer."""
        ...

    def probe_due(self, step: int, total_steps: int) -> bool:
        """Whether resting units should be present in the step after this one, to be read."""
        return False

    def transferred(self, state: State, *, step: int, total_steps: int, present: float, limit: float) -> State:
        """The state with which it continues without a bump when the limit or the length of the run changes.

        `present` is the predicted cost of a step now.
        """
        return state

    def flops(self, groups: tuple[Group, ...], allowance: float = math.inf) -> float:
        """FLOPs, within the allowance, that one decision spends on learning at most."""
        return 0.0


@dataclass(frozen=True)
class Wrapper(Controller[Any]):
    """A controller around another one, which answers for it and has the state; what differs is overridden."""

    inner: Controller[Any]

    @property
    def conduct(self) -> Conduct:
        return self.inner.conduct

    def init(self, groups: tuple[Group, ...]) -> Any:
        return self.inner.init(groups)

    def due(self, step: int, total_steps: int) -> bool:
        return self.inner.due(step, total_steps)

    def decide(self, state: Any, observation: Observation, cost: Cost, groups: tuple[Group, ...]) -> tuple[Any, Plan]:
        return self.inner.decide(state, observation, cost, groups)

    def probe_due(self, step: int, total_steps: int) -> bool:
        return self.inner.probe_due(step, total_steps)

    def transferred(self, state: Any, *, step: int, total_steps: int, present: float, limit: float) -> Any:
        return self.inner.transferred(state, step=step, total_steps=total_steps, present=present, limit=limit)

    def flops(self, groups: tuple[Group, ...], allowance: float = math.inf) -> float:
        return self.inner.flops(groups, allowance)


def problem_with(reading: Reading | None, groups: tuple[Group, ...]) -> str:
    """What forbids a decision: no reading, or one that is incomplete or not finite; "" if nothing does."""
    if reading is None:
        return "no decision: there is no reading yet"
    if missing := [group.name for group in groups if group.name not in reading.saliency]:
        return f"no decision: the reading lacks {', '.join(missing)}"
    for group in groups:
        if reading.saliency[group.name].shape != (group.num_units,):
            return f"no decision: {group.name} has {group.num_units} units, its reading another number"
    return "" if reading.finite() else "no decision: the reading holds values that are not finite"


def these(units: int, groups: int) -> str:
    """So many units of so many groups."""
    return f"{units} unit{'s' * (units != 1)} of {groups} group{'s' * (groups != 1)}"


def per(resource: str) -> str:
    """What a price of a resource is for, such as "for each FLOP"."""
    return "for all of the leading budget" if resource == "joint" else f"for each {UNIT.get(resource, resource)}"
