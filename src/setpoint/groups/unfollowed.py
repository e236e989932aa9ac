"""Unfollowed: how large a share of the FLOPs has no units only since Setpoint cannot follow an op, in words."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import nn

from setpoint.groups.atoms import Atoms
from setpoint.groups.build import Units, build, device_type_of
from setpoint.groups.graph import walk_graph
from setpoint.groups.product import solve
from setpoint.groups.walk import UNFOLLOWED, Walk
from setpoint.messages import listed

_MANY = 0.25  # share of the FLOPs above which it is warned of


class _AsIfFollowed(Atoms):
    """Atoms that nothing freezes which is not followed."""

    def freeze(self, labels: np.ndarray | None, place: str, reason: str) -> None:
        if not reason.startswith(UNFOLLOWED):
            super().freeze(labels, place, reason)


def share_of_unfollowed(model: nn.Module, program: Any, opaque: Mapping[str, str], walk: Walk, units: Units) -> str:
    """What is said where a large share of the FLOPs has no units only since Setpoint cannot follow an op; or "".

    Args:
        walk, units: what was found in the graph; it is walked again, as if nothing unknown were in the way.
    """
    other, own = walk_graph(model, program, opaque, _AsIfFollowed())
    if other.products:
        solve(other.atoms, other.products)
    products = [labels for _, _, dims_of, _ in other.contracts for _, labels in dims_of if labels is not None]
    free = build(other.atoms, own, products, device_type_of(model))
    blocked = total = 0.0
    for (_, coefficient, now, gradients), (_, _, then, _) in zip(walk.contracts, other.contracts, strict=False):
        flops = coefficient * (1 + gradients) * math.prod(length for length, _ in now)
        dims = [(a, b) for (_, a), (_, b) in zip(now, then, strict=False) if a is not None and b is not None]
        total, blocked = total + flops, blocked + flops * any(free.among(b) and not units.among(a) for a, b in dims)
    if blocked <= _MANY * total:
        return ""
    same = len(other.atoms.roots) == len(walk.atoms.roots)  # else an atom of one walk is not that of the other
    places: dict[str, list[str]] = {}
    for labels, place, reason in walk.atoms.frozen:
        if reason.startswith(UNFOLLOWED) and (not same or free.among(labels)):
            places.setdefault(reason, []).append(place)
    reasons = "; ".join(f"{why} ({listed(list(dict.fromkeys(where)), 3)})" for why, where in places.items())
    return (
        f"units in layers with {100 * blocked / total:.0f} % of the FLOPs cannot be followed, so they stay, and a "
        f"budget cuts the others: {reasons}. docs/own-ops.md says how to make an operation known"
    )
