"""Unfollowed: how large a share of the FLOPs has no units only since Setpoint cannot follow an op, in words."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from setpoint.groups.atoms import Atoms
from setpoint.groups.build import Units, build, device_type_of
from setpoint.groups.graph import walk_graph
from setpoint.groups.product import solve
from setpoint.groups.walk import UNFOLLOWED, Value, Walk
from setpoint.messages import listed

_MANY = 0.25  # share of the FLOPs above which it is warned of


def _like_an_input(out: Any, inputs: Sequence[Value]) -> Any:
    """Labels of an op's result, as if the op worked on each entry of its first input of that shape alone."""
    if isinstance(out, tuple):
        return tuple(_like_an_input(part, inputs) for part in out)
    return next((value.labels for value in inputs if out and value.shape == out.shape), None)


def share_of_unfollowed(model: nn.Module, program: Any, opaque: Mapping[str, str], walk: Walk, units: Units) -> str:
    """What is said where a large share of the FLOPs has no units only since Setpoint cannot follow an op; or "".

    A product's FLOPs are shared equally by its dims with units.

    Args:
        walk, units: what was found in the graph; it is walked again, as if nothing unknown were in the way.
    """
    other, own = walk_graph(model, program, opaque, atoms=Atoms(UNFOLLOWED), guess=_like_an_input)
    if other.products:
        solve(other.atoms, other.products)
    products = [labels for _, _, dims_of, _ in other.contracts for _, labels in dims_of if labels is not None]
    free = build(other.atoms, own, products, device_type_of(model))
    free = free.without(group.name for group in free.groups if not group.lossless)  # these stay for another reason
    blocked = total = 0.0
    for (_, coefficient, now, gradients), (_, _, then, _) in zip(walk.contracts, other.contracts, strict=False):
        flops = coefficient * (1 + gradients) * math.prod(length for length, _ in now)
        dims = [a for (_, a), (_, b) in zip(now, then, strict=False) if b is not None and free.among(b)]
        lost = [a for a in dims if a is None or not units.among(a)]
        total, blocked = total + flops, blocked + flops * len(lost) / max(len(dims), 1)
    if blocked <= _MANY * total:
        return ""
    places: dict[str, list[str]] = {}
    for labels, place, reason in other.atoms.frozen:
        if reason.startswith(UNFOLLOWED) and free.among(labels):
            places.setdefault(reason, []).append(place)
    reasons = "; ".join(f"{why} ({listed(list(dict.fromkeys(where)), 3)})" for why, where in places.items())
    return (
        f"units with {100 * blocked / total:.0f} % of the FLOPs cannot be followed, so they stay, and a budget cuts "
        f"the others: {reasons}. docs/own-ops.md says how to make an operation known"
    )
