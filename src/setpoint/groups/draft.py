"""A draft: the units found in a model's graph, whose cut its live forward has yet to survive."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from setpoint.groups.build import OwnDim, Units
from setpoint.groups.group import keep_all
from setpoint.groups.rehearsal import Rehearsal
from setpoint.groups.walk import Walk


@dataclass(frozen=True, eq=False)
class Draft:
    """What is known of a model before its forward is tried with fewer units."""

    rehearsal: Rehearsal  # runs the model's forward
    shapes: tuple[torch.Size, ...]  # of the model's outputs
    walk: Walk  # the record of the walk over its graph
    dims: Sequence[OwnDim]  # of all parameters and buffers
    units: Units  # what can be dropped according to the graph

    @property
    def model(self) -> nn.Module:
        """The user's model, not touched."""
        return self.rehearsal.model

    @property
    def lossless(self) -> frozenset[str]:
        """Names of the lossless groups."""
        return frozenset(group.name for group in self.units.groups if group.lossless)

    @property
    def whole(self) -> dict[str, np.ndarray]:
        """The choice that keeps every unit."""
        return keep_all(self.units.groups)

    def without(self, names: Iterable[str]) -> Draft:
        """The same draft with these groups frozen."""
        return replace(self, units=self.units.without(names))
