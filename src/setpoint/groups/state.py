"""States: the groups that are the states of a layer which can be balanced."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from operator import attrgetter

import numpy as np
from torch import Tensor, nn

from setpoint.errors import GroupError, StateSpaceError
from setpoint.groups.group import Group, Slice
from setpoint.groups.selective import mark_selective, selective_layer
from setpoint.groups.state_space import StateSpaceLayer


def find_states(model: nn.Module, groups: tuple[Group, ...]) -> tuple[tuple[Group, ...], dict[str, str]]:
    """The groups, with those of kind "state" among them; and the layers whose states are not pruned, with the reason.

    A group that tracing found is one of states if it is the states of one `StateSpaceLayer` and of nothing else. States
    that are shared stay units, to be dropped as they are, and a note says so. Where tracing found nothing, since it
    does not know the ops of the forward, the group is made from what the layer tells; its FLOPs are then constants to
    the cost.

    Raises:
        StateSpaceError: for a layer whose weights are not where it says, or do not fit its system.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, StateSpaceLayer)}
    for name, layer in layers.items():
        _check_weights(name, layer)
    places = {name: _places(name, layer) for name, layer in layers.items()}
    marked = tuple(_marked(group, layers, places) for group in groups)
    held = {(piece.tensor, piece.dim) for group in marked for piece in group.slices}
    declared: list[Group] = []
    refused: dict[str, str] = {}
    for name, layer in layers.items():
        if places[name] & held:
            continue
        sharing = _sharing(model, name, layers)
        if sharing:
            refused[name] = f"its parameters are those of {sharing} too, so its states cannot be balanced"
        elif layer.state_weights().carried:
            declared.append(_declared(name, layer, {group.name for group in (*marked, *declared)}))
        else:
            refused[name] = (
                "tracing does not find its states; name all its tensors with an entry for each state in "
                "StateWeights.carried, and they can be dropped all the same"
            )
    return mark_selective(model, (*marked, *declared)), refused


def _marked(group: Group, layers: Mapping[str, StateSpaceLayer], places: Mapping[str, set[tuple[str, int]]]) -> Group:
    held = {(piece.tensor, piece.dim) for piece in group.slices}
    touched = [name for name in layers if places[name] & held]
    if not touched:
        return group
    (name, *others) = touched
    inside = all(piece.tensor.startswith(f"{name}." if name else "") for piece in group.slices)
    whole = places[name] <= held and layers[name].state_space().num_states == group.num_units
    if others or not inside or not whole:
        why = f"shared by {' and '.join(touched)}" if others else f"not those of {name or 'the model'} alone"
        return replace(group, notes=(*group.notes, f"the states are {why}: states are dropped without balancing"))
    return replace(group, kind="state", what="state", min_units=1, multiple_of=1)


def _check_weights(name: str, layer: StateSpaceLayer) -> None:
    """Check that B and C are where the layer says, with an entry for each state along the right dim."""
    weights, system = layer.state_weights(), layer.state_space()
    batch = system.eigenvalues.dim() - 1
    matrices = [("inputs", batch, 2, weights.inputs), ("outputs", batch + 1, 2, weights.outputs)]
    for what, dim, dims, names in (*matrices, ("carried", batch, 1, weights.carried)):
        for tensor in names:
            try:
                found = attrgetter(tensor)(layer)
            except AttributeError:
                found = None
            if not isinstance(found, Tensor) or found.dim() < batch + dims or found.shape[dim] != system.num_states:
                there = f"of shape {tuple(found.shape)}" if isinstance(found, Tensor) else "not there"
                raise StateSpaceError(
                    f"layer {name!r} names {tensor!r} among the {what} of state_weights(), and it is {there}: it must "
                    f"be a tensor with the {system.num_states} states of state_space() along dim {dim}"
                )


def _places(name: str, layer: StateSpaceLayer) -> set[tuple[str, int]]:
    weights, batch = layer.state_weights(), layer.state_space().eigenvalues.dim() - 1
    prefix = f"{name}." if name else ""
    return {
        *((prefix + tensor, batch) for tensor in weights.inputs),
        *((prefix + tensor, batch + 1) for tensor in weights.outputs),
    }


def _sharing(model: nn.Module, name: str, layers: Mapping[str, StateSpaceLayer]) -> str:
    """Another layer that holds one of this layer's own tensors; "" if there is none."""
    tensors = {each: set(map(id, model.get_submodule(each).parameters())) for each in layers}
    return next((n for n in layers if layers[n] is not layers[name] and tensors[n] & tensors[name]), "")


def _declared(name: str, layer: StateSpaceLayer, taken: set[str]) -> Group:
    weights, system = layer.state_weights(), layer.state_space()
    batch, states, prefix = system.eigenvalues.dim() - 1, np.arange(system.num_states), f"{name}." if name else ""
    slices = (
        *(Slice(prefix + tensor, batch, "produce", states) for tensor in weights.inputs),
        # A state is silenced where it is read; an eigenvalue of zero may be no number.
        *(Slice(prefix + tensor, batch, "carry", states, masked=False) for tensor in weights.carried),
        *(Slice(prefix + tensor, batch + 1, "consume", states) for tensor in weights.outputs),
    )
    unique = next(each for each in (name or "states", f"{prefix}states") if each not in taken)
    return Group(unique, "state", system.num_states, slices, what="state")


def state_layer(model: nn.Module, group: Group) -> tuple[str, StateSpaceLayer]:
    """The layer whose states a group holds, and its name; GroupError for a group of another kind or model."""
    if group.kind != "state":
        raise GroupError(
            f"group {group.name!r} is of kind {group.kind!r}, so it has no balanced coordinates: balancing takes the "
            "states of linear time-invariant layers that have the methods of StateSpaceLayer"
        )
    held = {(piece.tensor, piece.dim) for piece in group.slices}
    for name, module in model.named_modules():
        if isinstance(module, StateSpaceLayer) and _places(name, module) <= held:
            return name, module
    selective = selective_layer(model, group)
    if selective is not None:
        raise GroupError(
            f"the states of {selective[0]!r} are selective: their dynamics depend on the input, so they have no Hankel "
            "values and no balanced coordinates: rank them by SelectiveSensor, and drop them as they are"
        )
    raise GroupError(f"the model has no StateSpaceLayer that holds the states of {group.name!r}: use its own groups")
