"""Selective layers: the mixers of Mamba and Mamba-2, whose dynamics depend on their input."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from torch import nn

from setpoint.groups.group import Group

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


def mark_selective(model: nn.Module, groups: tuple[Group, ...]) -> tuple[Group, ...]:
    """The groups, those that are the states of a selective layer of kind "state"."""
    kinds = {name: kind for name, module in model.named_modules() if (kind := selective_kind(module)) is not None}

    def marked(group: Group) -> Group:
        if not any(_holds_states(group, name, kind) for name, kind in kinds.items()):
            return group
        return replace(group, kind="state", what="state", min_units=max(group.min_units, 1))

    return tuple(map(marked, groups))


def selective_layer(model: nn.Module, group: Group) -> tuple[str, Selective] | None:
    """Name and kind of the selective layer whose states a group holds, or None."""
    if group.kind != "state":
        return None
    for name, module in model.named_modules():
        if (kind := selective_kind(module)) is not None and _holds_states(group, name, kind):
            return name, kind
    return None


def _holds_states(group: Group, name: str, kind: Selective) -> bool:
    """Whether the units lie along B and C of this layer, and along nothing else but its eigenvalues."""
    places = {(piece.tensor.removeprefix(f"{name}."), piece.dim) for piece in group.slices}
    if kind == "mamba":
        return places == {("A_log", 1), ("x_proj.weight", 0)}
    return (
        places <= {("conv1d.weight", 0), ("conv1d.bias", 0), ("in_proj.weight", 0), ("in_proj.bias", 0)}
        and ("in_proj.weight", 0) in places
    )
