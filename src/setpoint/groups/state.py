"""States: the groups that are the states of a layer which can be balanced."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from setpoint.errors import GroupError
from setpoint.groups.group import Group
from setpoint.ssm import StateSpaceLayer


def mark_states(model: nn.Module, groups: tuple[Group, ...]) -> tuple[Group, ...]:
    """The groups, those of kind "state" where they are the states of one `StateSpaceLayer` and of nothing else.

    States that two layers share, or that something outside their layer reads too, cannot be turned into
    other coordinates: they stay units, to be dropped as they are, and a note says so.

    Args:
        model: the model.
        groups: its groups, as tracing found them.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, StateSpaceLayer)}
    places = {name: _places(name, layer) for name, layer in layers.items()}
    return tuple(_marked(group, layers, places) for group in groups)


def _marked(group: Group, layers: dict[str, StateSpaceLayer], places: dict[str, set[tuple[str, int]]]) -> Group:
    held = {(piece.tensor, piece.dim) for piece in group.slices}
    touched = [name for name in layers if places[name] & held]
    if not touched:
        return group
    (name, *others) = touched
    inside = all(piece.tensor.startswith(f"{name}." if name else "") for piece in group.slices)
    whole = places[name] <= held and layers[name].state_space().num_states == group.num_units
    if others or not inside or not whole:
        why = f"shared by {' and '.join(touched)}" if others else f"not those of {name or 'the model'} alone"
        return replace(group, notes=(*group.notes, f"its states are {why}: they are dropped without balancing"))
    return replace(group, kind="state", what="state", min_units=1, multiple_of=1)


def _places(name: str, layer: StateSpaceLayer) -> set[tuple[str, int]]:
    """Dims of B and C that the states lie along."""
    weights, batch = layer.state_weights(), layer.state_space().eigenvalues.dim() - 1
    prefix = f"{name}." if name else ""
    return {
        *((prefix + tensor, batch) for tensor in weights.inputs),
        *((prefix + tensor, batch + 1) for tensor in weights.outputs),
    }


def state_layer(model: nn.Module, group: Group) -> tuple[str, StateSpaceLayer]:
    """The layer whose states a group holds, and its name.

    Raises:
        GroupError: for a group of another kind, or of another model.
    """
    if group.kind != "state":
        raise GroupError(
            f"group {group.name!r} is of kind {group.kind!r}, so it has no balanced coordinates: balancing takes the "
            "states of linear time-invariant layers that have the methods of StateSpaceLayer"
        )
    tensors = {piece.tensor for piece in group.slices}
    for name, module in model.named_modules():
        if isinstance(module, StateSpaceLayer) and {tensor for tensor, _ in _places(name, module)} <= tensors:
            return name, module
    raise GroupError(f"the model has no StateSpaceLayer that holds the states of {group.name!r}: use its own groups")
