"""Ranking: how far each reading orders units as the last one did, also where units are balanced states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from torch import nn

from setpoint.controller.adaptive import rank_correlation
from setpoint.errors import StateSpaceError
from setpoint.groups.group import Group
from setpoint.groups.state import state_layer
from setpoint.sensor.reading import Reading
from setpoint.ssm import Basis, DiagonalSystem, check_system


class Ranking:
    """What the next reading of balanced states is compared with: the layers as the last decision left them.

    Balanced states have no names: every reading has coordinates of its own, in which the order is that of the
    Hankel values by definition. So the states of the last reading are followed: it is asked what Hankel value each of
    them has by now (`Basis.followed`). With the layer unchanged these are the old values, and the correlation is 1.
    """

    def __init__(self) -> None:
        self._systems: dict[str, DiagonalSystem] = {}

    def correlations(
        self, last: Reading | None, reading: Reading, groups: tuple[Group, ...], model: nn.Module
    ) -> dict[str, float]:
        """Spearman's rank correlation of two successive readings, by group, over the units that are in both.

        Groups of which fewer than two units are in both are left out.

        Args:
            last: the last reading, of the units that stayed; NaN for those that have come back. None before the first.
            reading: the present one, all of it finite.
            groups: as they are now.
            model: as it is now.
        """
        found = {}
        for group in groups:
            name, none = group.name, np.zeros(0)
            if name in reading.basis:
                before, now = self._followed(group, reading.basis[name], model)
            else:
                before, now = none if last is None else last.saliency.get(name, none), reading.saliency[name]
            if len(before) != len(now):
                continue
            both = np.isfinite(before)
            if both.sum() > 1:
                found[name] = rank_correlation(before[both], now[both])
        return found

    def _followed(
        self, group: Group, basis: Basis, model: nn.Module
    ) -> tuple[Float64[np.ndarray, " units"], Float64[np.ndarray, " units"]]:
        """Hankel values that the states of the last reading had then, and those that they have now."""
        system = self._systems.get(group.name)
        try:
            if system is not None and system.num_states == group.num_units:
                then = basis.again(system)
                return then.followed(system), then.followed(state_layer(model, group)[1].state_space())
        except StateSpaceError:  # a layer that training made unstable and sound again
            pass
        return np.zeros(0), np.zeros(0)

    def note(self, reading: Reading, groups: tuple[Group, ...], model: nn.Module) -> None:
        """Remember the layers whose states have coordinates.

        Args:
            reading: the present one.
            groups: after the decision.
            model: after the decision.
        """
        states = [group for group in groups if group.name in reading.basis]
        self._systems = {group.name: state_layer(model, group)[1].state_space() for group in states}

    def state_dict(self) -> dict[str, Any]:
        """Everything in plain tensors."""
        return {name: (each.eigenvalues, each.inputs, each.outputs) for name, each in self._systems.items()}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on where `state_dict` was taken; nothing is changed if it does not fit."""
        systems = {str(name): DiagonalSystem(*(part.to(device) for part in parts)) for name, parts in state.items()}
        for name, each in systems.items():
            check_system(each, f"layer {name!r}")
        self._systems = systems
