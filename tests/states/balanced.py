"""A model cut with its states turned on the way, as the loop cuts it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from setpoint.actuator.cut import Keep
from setpoint.actuator.optimizer_state import Optimizers
from setpoint.actuator.shrink import shrink
from setpoint.groups.group import Group
from setpoint.sensor.reading import Basis
from setpoint.states.turn import Moments, turned


def balance_and_shrink(
    model: nn.Module,
    optimizer: Optimizers,
    groups: tuple[Group, ...],
    keep: Keep,
    basis: Mapping[str, Basis],
    copies: Sequence[nn.Module] = (),
    *,
    moments: Moments = "carry",
) -> tuple[Group, ...]:
    """Shrink a model; state groups that lose units are balanced, truncated and diagonalised on the way."""
    with turned(model, optimizer, groups, keep, basis, copies, moments=moments):
        return shrink(model, optimizer, groups, keep, copies)
