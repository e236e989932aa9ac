"""What is kept: a random choice of units, and which atoms survive a choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from setpoint.groups.build import Units
from setpoint.groups.group import Group

Labels = np.ndarray
"""Atoms along a dim."""


def random_keep(groups: Sequence[Group], seed: int = 0) -> dict[str, np.ndarray]:
    """A random choice of every group's units, the same for the same seed; of unequal widths where possible."""
    generator = np.random.default_rng(seed)
    used: set[int] = set()
    keep = {}
    for group in groups:
        low = max(group.min_units, min(2, group.num_units - 1), 0)
        fitting = range(low, group.num_units)
        if group.only_blocks:
            fitting = range(-(-low // group.multiple_of) * group.multiple_of, group.num_units, group.multiple_of)
        widths = [width for width in fitting if width not in used]
        width = int(generator.choice(widths or fitting)) if fitting else group.num_units
        used.add(width)
        kept = np.zeros(group.num_units, dtype=bool)
        kept[generator.permutation(group.num_units)[:width]] = True
        keep[group.name] = kept
    return keep


class Kept:
    """Which atoms survive a choice of units."""

    def __init__(self, units: Units, keep: Mapping[str, np.ndarray]) -> None:
        first = np.cumsum([0, *(group.num_units for group in units.groups)])
        # The last entry answers for atoms of no group, which always stay.
        flat = np.concatenate([*(keep[group.name] for group in units.groups), [True]])
        unit = first[np.maximum(units.group_of, 0)] + units.unit_of
        self.alive: np.ndarray = flat[np.where(units.group_of >= 0, unit, len(flat) - 1)]

    def count(self, labels: Labels) -> int:
        """Number of surviving entries."""
        return int(self.alive[labels].sum())
