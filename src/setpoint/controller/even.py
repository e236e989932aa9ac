"""Even: another controller decides for whole kinds of groups, so that all layers of a kind have one width."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import numpy as np

from setpoint.controller.plan import Observation, Plan, Wrapper
from setpoint.cost.budget import Tolerance
from setpoint.cost.cost import Cost, ProductCost
from setpoint.errors import LoopError
from setpoint.groups.group import Group, Size, widths_of
from setpoint.sensor.reading import Reading

Kind = tuple[str, ...]  # names of the groups that share one width; the first one stands for all
Kinds = Mapping[str, tuple[Group, ...]]  # by name of the first, the groups of each kind; a group of no kind is alone
Orders = Mapping[str, np.ndarray]  # by group, its units, the least salient first


@final
@dataclass(frozen=True)
class EvenController(Wrapper):
    """Gives the inner controller one group of each kind, and carries out its decision in every group of that kind.

    The first group of a kind stands for it. Its unit of saliency rank k stands for the units of rank k in all of them:
    their saliencies are summed, and they are dropped together. So at every decision all groups of a kind lose equally
    many units, each its least salient ones, and the inner controller's budget, price or tolerance holds for the whole.

    Args:
        inner: decides.
        kinds: which groups share a width, by name; by default those that stand at the same place in repeated blocks
            (names that differ in numbers only) and have as many units of the same sort.

    Raises:
        LoopError: for an inner controller that learns, or brings single units back: it looks at every unit by itself.
    """

    kinds: tuple[Kind, ...] = ()

    def __post_init__(self) -> None:
        name, conduct = type(self.inner).__name__, self.inner.conduct
        # A gate of a single unit would say which unit goes, and ranks would no longer pair units.
        if conduct.learns:
            raise LoopError(f"{name} learns of every unit by itself, and keeps no layers even")
        if conduct.regrow and not isinstance(conduct.goal, Tolerance):
            raise LoopError(
                f"{name}(regrow=True) brings single units back, and keeps no layers even: leave regrow=True and "
                "actuator=Regrowing() out"
            )

    def init(self, groups: tuple[Group, ...]) -> Any:
        """The inner controller's state, with an entry for each unit of the first group of a kind."""
        return self.inner.init(_leaders(self._members(groups, widths_of(groups))))

    def decide(self, state: Any, observation: Observation, cost: Cost, groups: tuple[Group, ...]) -> tuple[Any, Plan]:
        """The inner controller's plan, carried out in every group of a kind.

        Raises:
            LoopError: for groups of one kind whose widths differ.
        """
        kinds = self._members(groups, observation.dense_widths)
        reading, orders = observation.reading, dict[str, np.ndarray]()
        if reading is not None:
            orders = {name: np.argsort(values, kind="stable") for name, values in reading.saliency.items()}
            reading = _summed(reading, kinds, orders)
        # Probes are of single units, of which a kind knows none.
        seen = replace(observation, reading=reading, probe=None)
        state, plan = self.inner.decide(state, seen, _cost_by_kind(cost, kinds), _leaders(kinds))
        reason = plan.reason
        if any(len(members) > 1 for members in kinds.values()):
            reason += " (a unit stands for one in each layer of its kind)"
        keep, worth = (_to_members(values, kinds, orders) for values in (plan.keep, plan.worth))
        return state, replace(plan, keep=keep, worth=worth, reason=reason)

    def _members(self, groups: tuple[Group, ...], dense: Mapping[str, int]) -> Kinds:
        own, members = {group.name: group for group in groups}, dict[str, tuple[Group, ...]]()
        named = {name for kind in self.kinds for name in kind}
        alone = tuple((group.name,) for group in groups if group.name not in named)
        for kind in self.kinds + alone if self.kinds else same_place(groups, dense):
            some = tuple(own[name] for name in kind if name in own)
            if len({group.num_units for group in some}) > 1:
                widths = ", ".join(f"{group.name}: {group.num_units}" for group in some[:4])
                raise LoopError(f"layers of one kind have different widths ({widths}): begin with an even model")
            if some:
                members[some[0].name] = some
        return members


def same_place(groups: Sequence[Group], dense: Mapping[str, int]) -> tuple[Kind, ...]:
    """The groups at the same place in repeated blocks that have as many units of the same sort in the dense model."""
    kinds: dict[Any, list[str]] = {}
    for group in groups:
        # A number that stands alone is that of a block: `layers.10.mlp` and `layers.11.mlp`, but not `conv1`, `conv2`.
        place = re.sub(r"(?<![^.])\d+(?![^.:])", "*", group.name)
        # Not the present width: layers of two widths may meet when one has been cut, and are of two kinds still.
        kinds.setdefault((place, group.kind, group.what, dense[group.name]), []).append(group.name)
    return tuple(map(tuple, kinds.values()))


def _leaders(kinds: Kinds) -> tuple[Group, ...]:
    return tuple(
        replace(
            members[0],
            min_units=max(group.min_units for group in members),
            multiple_of=int(np.lcm.reduce([group.multiple_of for group in members])),
            lossless=all(group.lossless for group in members),
        )
        for members in kinds.values()
    )


def _summed(reading: Reading, kinds: Kinds, orders: Orders) -> Reading:
    """The reading with the saliencies of a kind summed by rank, at the units of its first group."""
    saliency = {}
    for leader, members in kinds.items():
        if all(group.name in orders for group in members):
            # Noise may make a saliency negative; it must not pay for the unit of another layer.
            by_rank = [np.maximum(reading.saliency[group.name][orders[group.name]], 0.0) for group in members]
            saliency[leader] = np.empty_like(by_rank[0])
            saliency[leader][orders[leader]] = np.sum(by_rank, axis=0)
    # Slopes and norms are of single groups: what adds up over a kind is the saliency alone.
    return replace(reading, saliency=saliency, slope={}, norm={})


def _to_members(by_leader: Mapping[str, np.ndarray], kinds: Kinds, orders: Orders) -> dict[str, Any]:
    """By group, what is decided on the units of the first group of its kind."""
    values: dict[str, np.ndarray] = {}
    for leader, by_unit in by_leader.items():
        for group in kinds[leader]:
            values[group.name] = by_unit
            if group.name in orders and leader in orders:  # else nothing was decided
                values[group.name] = np.empty_like(by_unit)
                values[group.name][orders[group.name]] = by_unit[orders[leader]]
    return values


def _cost_by_kind(cost: Cost, kinds: Kinds) -> Cost:
    if not isinstance(cost, ProductCost):
        return _ByKind(cost, kinds)
    # A sum of products stays one: controllers search its widths without looking for stairs.
    leaders = {group.name: leader for leader, members in kinds.items() for group in members}

    def renamed(size: Size) -> Size:
        parts: dict[str, int] = {}
        for name, per_unit in size.parts:
            leader = leaders.get(name, name)
            parts[leader] = parts.get(leader, 0) + per_unit
        return Size(size.constant, tuple(parts.items()))

    terms = (replace(term, sizes=tuple(map(renamed, term.sizes))) for term in cost.terms)
    return ProductCost(cost.resource, tuple(terms))


@final
class _ByKind:
    """A cost that is no sum of products, as a function of the widths of the first groups."""

    def __init__(self, cost: Cost, kinds: Kinds) -> None:
        self._cost, self._kinds, self.resource = cost, kinds, cost.resource

    def total(self, widths: Mapping[str, int]) -> float:
        members = {group.name: widths[leader] for leader, groups in self._kinds.items() for group in groups}
        return self._cost.total({**widths, **members})

    def saving(self, widths: Mapping[str, int], group: str, num_units: int) -> float:
        return self.total(widths) - self.total({**widths, group: widths[group] - num_units})
