"""Even: another controller decides for whole kinds of groups, so that all layers of a kind have one width."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, final

import numpy as np
from jaxtyping import Bool, Float64

from setpoint.controller.plan import (
    Controller,
    Goal,
    Learning,
    Observation,
    Plan,
    Pursuing,
    RegrowingController,
    Transferring,
    regrows,
)
from setpoint.controller.schedule import Schedule
from setpoint.cost.cost import Cost, ProductCost
from setpoint.cost.joint import JointCost
from setpoint.cost.tolerance import Tolerance
from setpoint.errors import LoopError
from setpoint.groups.follow import Change, follow
from setpoint.groups.group import Group, Size
from setpoint.sensor.reading import Reading

Kind = tuple[str, ...]
"""Names of the groups that share one width."""


@dataclass(frozen=True, eq=False)
class EvenState:
    """The inner controller's state, in which a kind of several groups is one group, and what it is about."""

    inner: Any
    kinds: Mapping[str, Kind]  # by name, the groups that share a width
    widths: Mapping[str, int] = field(default_factory=dict)  # by name of each kind of several groups


@final
@dataclass(frozen=True)
class EvenController:
    """Gives the inner controller one group of each kind, and carries out its decision in every group of that kind.

    The k-th unit of a kind is the k-th least salient unit of each of its groups: its saliency is their sum, and what
    it saves is what they save together. So at every decision all groups of a kind lose equally many units, each its
    least salient ones, and the inner controller's budget, price or tolerance holds for the whole.

    Args:
        inner: decides.
        kinds: which groups share a width, by name; by default those that stand at the same place in repeated blocks
            (names alike but for numbers) and have as many units of the same sort.

    Raises:
        LoopError: for an inner controller that learns, or brings single units back: it looks at every unit by itself.
    """

    inner: Controller[Any]
    kinds: tuple[Kind, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.inner, Learning):
            raise LoopError(f"{type(self.inner).__name__} learns of every unit by itself, and keeps no layers even")
        if regrows(self.inner) and not isinstance(getattr(self.inner, "goal", None), Tolerance):
            raise LoopError(
                f"{type(self.inner).__name__}(regrow=True) brings single units back, and keeps no layers even: leave "
                "regrow=True and actuator=Regrowing() out"
            )

    @property
    def schedule(self) -> Schedule:
        """The inner controller's."""
        schedule = getattr(self.inner, "schedule", None)
        return schedule if isinstance(schedule, Schedule) else Schedule()

    @property
    def goal(self) -> Goal:
        """The inner controller's."""
        return self.inner.goal if isinstance(self.inner, Pursuing) else "budget"

    @property
    def regrow(self) -> bool:
        """Whether the inner controller takes back a whole cut, which was even."""
        return regrows(self.inner)

    def probe_due(self, step: int, total_steps: int) -> bool:
        """Whether the inner controller wants resting units to be read."""
        return isinstance(self.inner, RegrowingController) and self.inner.probe_due(step, total_steps)

    def init(self, groups: tuple[Group, ...]) -> EvenState:
        """State before the first decision."""
        found = self.kinds or alike(groups)
        named = _named([kind for kind in found if any(group.name in kind for group in groups)], groups)
        kinds = _members(named, groups)
        whole = tuple(_joined(name, members) for name, members in kinds.items())
        return EvenState(self.inner.init(whole), named, _widths(kinds))

    def due(self, step: int, total_steps: int) -> bool:
        """Whether the inner controller decides after this step."""
        return self.inner.due(step, total_steps)

    def transferred(self, state: EvenState, *, step: int, total_steps: int, present: float, limit: float) -> EvenState:
        """The inner controller's state for another budget."""
        if not isinstance(self.inner, Transferring):
            return state
        inner = self.inner.transferred(state.inner, step=step, total_steps=total_steps, present=present, limit=limit)
        return replace(state, inner=inner)

    def decide(
        self, state: EvenState, observation: Observation, cost: Cost, groups: tuple[Group, ...]
    ) -> tuple[EvenState, Plan]:
        """The inner controller's plan, carried out in every group of a kind.

        Raises:
            LoopError: for groups of one kind whose widths differ.
        """
        kinds = _members(state.kinds, groups)
        inner = _widened(state, _widths(kinds))
        whole = tuple(_joined(name, members) for name, members in kinds.items())
        orders = _orders(observation.reading, kinds)
        seen = replace(
            observation,
            widths=_by_kind(observation.widths, kinds),
            dense_widths=_by_kind(observation.dense_widths, kinds),
            reading=_summed(observation.reading, kinds, orders),
            probe=None,
        )
        inner, plan = self.inner.decide(inner, seen, _cost_by_kind(cost, kinds), whole)
        several = {name: plan.keep[name] for name, members in kinds.items() if len(members) > 1 and name in plan.keep}
        # The loop lets states follow by the names of groups, of which it knows no kind of several.
        inner = follow(inner, Change(keep=several))
        after = {name: int(kept.sum()) for name, kept in several.items()}
        return replace(state, inner=inner, widths={**_widths(kinds), **after}), replace(
            plan,
            keep=_to_members(plan.keep, kinds, orders),
            worth=_to_members(plan.worth, kinds, orders),
            reason=f"{plan.reason} (a unit stands for one in each layer of its kind)" if several else plan.reason,
        )


def pattern(name: str) -> str:
    """A name with a star for each number that stands alone: the same for the same place in repeated blocks.

    >>> pattern("model.layers.10.mlp.gate_proj")
    'model.layers.*.mlp.gate_proj'
    """
    return re.sub(r"(?<![^.])\d+(?![^.:])", "*", name)


def alike(groups: tuple[Group, ...]) -> tuple[Kind, ...]:
    """The groups at the same place in repeated blocks that have as many units of the same sort."""
    found: dict[Any, list[str]] = {}
    for group in groups:
        found.setdefault((pattern(group.name), group.kind, group.what, group.num_units), []).append(group.name)
    return tuple(map(tuple, found.values()))


def _named(kinds: list[Kind], groups: tuple[Group, ...]) -> dict[str, Kind]:
    """The kinds by name; a group of none is alone under its own."""
    in_one = {name for kind in kinds for name in kind}
    named: dict[str, Kind] = {}
    for kind in [*kinds, *((group.name,) for group in groups if group.name not in in_one)]:
        base = kind[0] if len(kind) == 1 else f"{pattern(kind[0])} (of {len(kind)})"
        count = sum(name == base or name.startswith(f"{base}, ") for name in named)
        named[base if not count else f"{base}, {count + 1}"] = kind
    return named


Kinds = Mapping[str, tuple[Group, ...]]
Orders = Mapping[str, tuple[np.ndarray, ...]]
"""By kind of several groups, for each of them its units, the least salient first."""


def _members(named: Mapping[str, Kind], groups: tuple[Group, ...]) -> dict[str, tuple[Group, ...]]:
    """By name, the groups of each kind.

    Raises:
        LoopError: where widths differ.
    """
    own = {group.name: group for group in groups}
    kinds = {name: tuple(own[each] for each in kind if each in own) for name, kind in named.items()}
    for members in kinds.values():
        if len({group.num_units for group in members}) > 1:
            widths = ", ".join(f"{group.name}: {group.num_units}" for group in members[:4])
            raise LoopError(f"layers of one kind have different widths ({widths}): begin with an even model")
    return {name: members for name, members in kinds.items() if members}


def _widths(kinds: Kinds) -> dict[str, int]:
    return {name: members[0].num_units for name, members in kinds.items() if len(members) > 1}


def _joined(name: str, members: tuple[Group, ...]) -> Group:
    """The group that stands for a kind."""
    first = members[0]
    if len(members) == 1:
        return first
    return Group(
        name,
        first.kind,
        first.num_units,
        slices=(),
        min_units=max(group.min_units for group in members),
        multiple_of=int(np.lcm.reduce([group.multiple_of for group in members])),
        lossless=all(group.lossless for group in members),
        what=first.what,
    )


def _widened(state: EvenState, widths: Mapping[str, int]) -> Any:
    """The inner state once a cut was taken back."""
    back = {name: np.arange(width) >= state.widths.get(name, width) for name, width in widths.items()}
    return follow(state.inner, Change(regrown={name: units for name, units in back.items() if units.any()}))


def _by_kind(widths: Mapping[str, int], kinds: Kinds) -> dict[str, int]:
    several = {group.name for members in kinds.values() if len(members) > 1 for group in members}
    own = {name: width for name, width in widths.items() if name not in several}
    return own | {name: widths[members[0].name] for name, members in kinds.items()}


def _orders(reading: Reading | None, kinds: Kinds) -> dict[str, tuple[np.ndarray, ...]]:
    if reading is None:
        return {}
    return {
        name: tuple(np.argsort(reading.saliency[group.name], kind="stable") for group in members)
        for name, members in kinds.items()
        if len(members) > 1 and all(group.name in reading.saliency for group in members)
    }


def _summed(reading: Reading | None, kinds: Kinds, orders: Orders) -> Reading | None:
    """The reading of the kinds: the k-th least saliencies of their groups, summed."""
    if reading is None:
        return None
    saliency = dict(reading.saliency)
    for name, order in orders.items():
        values = [reading.saliency[group.name] for group in kinds[name]]
        saliency[name] = np.sum([np.maximum(v[by], 0.0) for v, by in zip(values, order, strict=True)], axis=0)
    basis = dict(reading.basis)
    for name, members in kinds.items():
        if members[0].name in basis:
            basis[name] = basis[members[0].name]
    return replace(reading, saliency=saliency, slope={}, norm={}, basis=basis)


def _to_members(values: Mapping[str, Any], kinds: Kinds, orders: Orders) -> dict[str, Any]:
    """By group, what is said of the units of the kinds."""
    found: dict[str, Bool[np.ndarray, " _units"] | Float64[np.ndarray, " _units"]] = {}
    for name, by_unit in values.items():
        members = kinds[name]
        if len(members) == 1:
            found[name] = by_unit
            continue
        for number, group in enumerate(members):
            own = np.empty_like(by_unit)
            own[orders[name][number] if name in orders else np.arange(len(by_unit))] = by_unit
            found[group.name] = own
    return found


def _cost_by_kind(cost: Cost, kinds: Kinds) -> Cost:
    """The cost as a function of the widths of the kinds."""
    if isinstance(cost, JointCost):
        return JointCost([replace(share, cost=_cost_by_kind(share.cost, kinds)) for share in cost.shares])
    if not isinstance(cost, ProductCost):
        return _ByKind(cost, kinds)
    of = {group.name: name for name, members in kinds.items() for group in members}

    def renamed(size: Size) -> Size:
        parts: dict[str, int] = {}
        for name, per_unit in size.parts:
            key = of.get(name, name)
            parts[key] = parts.get(key, 0) + per_unit
        return Size(size.constant, tuple(parts.items()))

    terms = (replace(term, sizes=tuple(map(renamed, term.sizes))) for term in cost.terms)
    return ProductCost(cost.resource, tuple(terms))


class _ByKind:
    """A cost that is no sum of products, as a function of the widths of the kinds."""

    def __init__(self, cost: Cost, kinds: Kinds) -> None:
        self._cost, self._kinds, self.resource = cost, kinds, cost.resource

    def total(self, widths: Mapping[str, int]) -> float:
        """Spending at these widths, in the resource's own unit."""
        members = {group.name: widths[name] for name, groups in self._kinds.items() for group in groups}
        return self._cost.total({**widths, **members})

    def saving(self, widths: Mapping[str, int], group: str, num_units: int) -> float:
        """`total(widths) - total(widths with num_units fewer units in group)`."""
        return self.total(widths) - self.total({**widths, group: widths[group] - num_units})
