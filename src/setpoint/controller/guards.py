"""Guards: what a decision must leave in each group, whatever the price says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int64

from setpoint.controller.ladder import Ladder, build_ladder
from setpoint.groups.group import Group
from setpoint.sensor.reading import Reading


@dataclass(frozen=True, eq=False)
class Guards:
    """What keeps one noisy reading from costing a whole layer."""

    slew: float  # largest fraction of a group's units to go at one decision; one block always may
    floor: Mapping[str, int]  # by group, the width that must remain; `min_units` where there is none
    dwell: int  # decisions that a unit stays after it was brought back

    def without_slew(self) -> Guards:
        """These guards with the slew limit lifted."""
        return replace(self, slew=1.0)

    def ladders(
        self,
        groups: tuple[Group, ...],
        reading: Reading,
        dense: Mapping[str, int],
        age: Mapping[str, Int64[np.ndarray, " _units"]],
    ) -> dict[str, Ladder]:
        """Ladders of all groups, by name; units that each reading makes anew have no age.

        Args:
            age: by group and active unit, decisions since the unit came back.
        """
        return {
            group.name: build_ladder(
                group,
                reading.saliency[group.name],
                dense=dense[group.name],
                floor=self.floor.get(group.name, 0),
                max_dropped=math.floor(self.slew * group.num_units),
                free=(age[group.name] >= self.dwell) | (group.name in reading.basis),
            )
            for group in groups
        }


NO_GUARDS = Guards(slew=1.0, floor={}, dwell=0)
"""What is left where even the floor and the dwell would make a landing miss: `min_units`."""
