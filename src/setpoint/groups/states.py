"""States: which groups are the states of a layer that can be balanced, and what such a layer must tell.

The maths of balancing is in the leaf `states`; groups are found without it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Complex
from torch import Tensor, nn

from setpoint.errors import GroupError, StateSpaceError
from setpoint.groups.group import Group, Slice


@dataclass(frozen=True, eq=False)
class DiagonalSystem:
    """A complex diagonal system with real inputs and outputs, as LRU, S5 and S4D layers hold it.

        x[t] = eigenvalues * x[t-1] + inputs @ u[t],    y[t] = Re(outputs @ x[t])

    Leading dims are a batch of independent systems. A layer whose output is `2 Re(C x)` has
    `outputs = 2 C`; a direct term `D u` changes nothing here and is left out.

    Args:
        eigenvalues: shape (..., states).
        inputs: B, shape (..., states, in).
        outputs: C, shape (..., out, states).
    """

    eigenvalues: Complex[Tensor, "*batch states"]
    inputs: Complex[Tensor, "*batch states in_channels"]
    outputs: Complex[Tensor, "*batch out_channels states"]

    @property
    def num_states(self) -> int:
        """Number of complex states (modes)."""
        return self.eigenvalues.shape[-1]


@dataclass(frozen=True, eq=False)
class StateWeights:
    """Under which names, relative to the layer, it keeps B and C, so that optimizer moments can follow them.

    Args:
        inputs: a real and an imaginary tensor of shape (..., states, in), or a complex one, or one that keeps
            both parts along a last dim of 2.
        outputs: the same for C, shape (..., out, states); `C` is a multiple of it.
        input_scale: `B = input_scale[..., None] * inputs` (a normalisation, a step size), shape (..., states).
        carried: all further tensors with an entry for each state, such as what eigenvalues are made of; shape (...,
            states, ...) with the same leading dims. Needed only where the layer's forward cannot be traced.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    input_scale: Complex[Tensor, "*batch states"]
    carried: tuple[str, ...] = ()


@runtime_checkable
class StateSpaceLayer(Protocol):
    """A module with a linear time-invariant state: `x[t] = a * x[t-1] + B u[t]`, `y[t] = Re(C x[t]) + ...`.

    Any `nn.Module` with these three methods takes part; nothing is to be inherited.
    """

    def state_space(self) -> DiagonalSystem:
        """The system as it is now, in discrete time."""

    def set_state_space(self, system: DiagonalSystem) -> None:
        """Take over this system, which has as many states as the layer; parameters change in place."""

    def state_weights(self) -> StateWeights:
        """Where B and C are kept."""


def find_states(model: nn.Module, groups: tuple[Group, ...]) -> tuple[tuple[Group, ...], dict[str, str]]:
    """The groups, with those of kind "state" among them; and the layers whose states are not pruned, with the reason.

    A group that tracing found is one of states if it is the states of one `StateSpaceLayer` and of nothing else. States
    that are shared stay units, to be dropped as they are. Where tracing does not know the ops of the forward, the group
    is made from what the layer tells; its FLOPs are then constants to the cost. A StateSpaceError names a layer whose
    weights are not where it says, or do not fit its system.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, StateSpaceLayer)}
    for name, layer in layers.items():
        _check_weights(name, layer)
    found = [_marked(group, layers) for group in groups]
    held = {(piece.tensor, piece.dim) for group in found for piece in group.slices}
    tensors = {name: set(map(id, model.get_submodule(name).parameters())) for name in layers}
    refused: dict[str, str] = {}
    for name, layer in layers.items():
        if _places(name, layer) & held:
            continue
        sharing = next((n for n in layers if layers[n] is not layer and tensors[n] & tensors[name]), "")
        if sharing:
            refused[name] = f"its parameters are those of {sharing} too, so its states cannot be balanced"
        elif layer.state_weights().carried:
            found.append(_declared(name, layer, {group.name for group in found}))
        else:
            refused[name] = (
                "tracing does not find its states; name all its tensors with an entry for each state in "
                "StateWeights.carried, and they can be dropped all the same"
            )
    kinds = _selective_kinds(model)
    marked = (
        replace(group, kind="state", what="state", min_units=max(group.min_units, 1)) if _held(group, kinds) else group
        for group in found
    )
    return tuple(marked), refused


def _marked(group: Group, layers: Mapping[str, StateSpaceLayer]) -> Group:
    """The group, of kind "state" if it is all states of one layer and nothing else."""
    held = {(piece.tensor, piece.dim) for piece in group.slices}
    touched = [name for name in layers if _places(name, layers[name]) & held]
    if not touched:
        return group
    name = touched[0]
    inside = all(piece.tensor.startswith(f"{name}." if name else "") for piece in group.slices)
    whole = _places(name, layers[name]) <= held and layers[name].state_space().num_states == group.num_units
    if len(touched) == 1 and inside and whole:
        return replace(group, kind="state", what="state", min_units=1, multiple_of=1)
    why = f"shared by {' and '.join(touched)}" if touched[1:] else f"not those of {name or 'the model'} alone"
    return replace(group, notes=(*group.notes, f"the states are {why}: states are dropped without balancing"))


def _check_weights(name: str, layer: StateSpaceLayer) -> None:
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
    inputs = {(prefix + tensor, batch) for tensor in weights.inputs}
    return inputs | {(prefix + tensor, batch + 1) for tensor in weights.outputs}


def _declared(name: str, layer: StateSpaceLayer, taken: set[str]) -> Group:
    weights, system = layer.state_weights(), layer.state_space()
    batch, states, prefix = system.eigenvalues.dim() - 1, np.arange(system.num_states), f"{name}." if name else ""
    slices = (
        *(Slice(prefix + tensor, batch, "produce", states) for tensor in weights.inputs),
        # A state is silenced where it is read; an eigenvalue of zero may be no number.
        *(Slice(prefix + tensor, batch, "carry", states, masked=False) for tensor in weights.carried),
        *(Slice(prefix + tensor, batch + 1, "consume", states) for tensor in weights.outputs),
    )
    unique = next(free for free in (name or "states", f"{prefix}states") if free not in taken)
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
    if (selective := selective_layer(model, group)) is not None:
        raise GroupError(
            f"the states of {selective[0]!r} are selective: their dynamics depend on the input, so they have no Hankel "
            "values and no balanced coordinates: rank them by SelectiveSensor, and drop them as they are"
        )
    raise GroupError(f"the model has no StateSpaceLayer that holds the states of {group.name!r}: use its own groups")


Selective = Literal["mamba", "mamba2"]


def selective_kind(module: nn.Module) -> Selective | None:
    """Which of the two a module is, by what it holds; the class does not matter.

    >>> selective_kind(nn.Linear(2, 2)) is None
    True
    """
    held = {name for name, _ in module.named_parameters()}
    if {"A_log", "D", "x_proj.weight", "dt_proj.weight", "conv1d.weight", "in_proj.weight"} <= held:
        return "mamba"
    if {"A_log", "D", "dt_bias", "conv1d.weight", "in_proj.weight", "out_proj.weight"} <= held:
        return "mamba2"
    return None


def selective_layer(model: nn.Module, group: Group) -> tuple[str, Selective] | None:
    """Name and kind of the selective layer whose states a group holds, or None."""
    return _held(group, _selective_kinds(model)) if group.kind == "state" else None


def _selective_kinds(model: nn.Module) -> dict[str, Selective]:
    return {name: kind for name, module in model.named_modules() if (kind := selective_kind(module)) is not None}


def _held(group: Group, kinds: Mapping[str, Selective]) -> tuple[str, Selective] | None:
    """The selective layer of which units lie along B and C, and along nothing else but its eigenvalues."""
    for name, kind in kinds.items():
        places = {(piece.tensor.removeprefix(f"{name}."), piece.dim) for piece in group.slices}
        inside = {("conv1d.weight", 0), ("conv1d.bias", 0), ("in_proj.weight", 0), ("in_proj.bias", 0)}
        if kind == "mamba" and places == {("A_log", 1), ("x_proj.weight", 0)}:
            return name, kind
        if kind == "mamba2" and places <= inside and ("in_proj.weight", 0) in places:
            return name, kind
    return None
