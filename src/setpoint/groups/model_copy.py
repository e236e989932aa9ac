"""Copies of a model, with or without the user's hooks, and the model as it was before a forward."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from setpoint.groups.example import is_dense


def copy_of(model: nn.Module, memo: Mapping[int, Any] | None = None, *, users_hooks: bool = True) -> nn.Module:
    """A deep copy of a model; torch's own hooks, which compute weights (weight norm), come along always.

    Args:
        memo: by id of an object of the model, what the copy has in its place; by default `computed(model)`.
    """
    # By the memo, not removed from the copy: a hook that holds a file or a socket cannot even be copied.
    hooks: dict[int, Any] = {}
    if not users_hooks:
        hooks = {
            id(table): OrderedDict((key, hook) for key, hook in table.items() if not _is_users(hook))
            for module in model.modules()
            for name, table in vars(module).items()
            if isinstance(table, OrderedDict) and "_hooks" in name
        }
    return copy.deepcopy(model, {**hooks, **(computed(model) if memo is None else memo)})


def computed(model: nn.Module) -> dict[int, Any]:
    """The memo with which `copy.deepcopy` takes what it refuses: what a forward left on modules, and sparse tensors."""
    leaves = pytree.tree_leaves([list(vars(module).values()) for module in model.modules()])
    refused = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not (leaf.is_leaf and is_dense(leaf))]
    copies = {id(tensor): tensor.detach().clone() for tensor in refused}
    weights = {id(tensor): tensor for tensor in refused if isinstance(tensor, nn.Parameter)}
    return copies | {key: nn.Parameter(copies[key], weight.requires_grad) for key, weight in weights.items()}


def _is_users(hook: Any) -> bool:
    return not type(hook).__module__.startswith("torch.nn.utils")


def _users_hooks(model: nn.Module) -> Iterator[tuple[dict[int, Any], list[int]]]:
    """The tables of hooks of all modules, each with the keys of those that are the user's own."""
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks):
            yield hooks, [key for key, hook in hooks.items() if _is_users(hook)]


def has_users_hooks(model: nn.Module) -> bool:
    return any(keys for _, keys in _users_hooks(model))


def strip(model: nn.Module) -> None:
    for hooks, keys in _users_hooks(model):
        for key in keys:
            del hooks[key]


@contextmanager
def without_users_hooks(model: nn.Module) -> Iterator[None]:
    """Inside, the model is without them; afterwards they run in the order in which they ran before."""
    before = [(hooks, dict(hooks)) for hooks, _ in _users_hooks(model)]
    strip(model)
    try:
        yield
    finally:
        for hooks, all_of_them in before:
            hooks.clear()
            hooks.update(all_of_them)


@contextmanager
def untouched_attributes(model: nn.Module) -> Iterator[None]:
    """Restore the attributes of modules, and of objects in them: a forward may keep an activation, or fill a config."""
    modules = tuple(model.modules())
    objects = {id(held): held for module in modules for held in vars(module).values() if _has_attributes(held)}
    before = [(owner, dict(vars(owner))) for owner in (*modules, *objects.values())]
    try:
        yield
    finally:
        for owner, attributes in before:
            now = vars(owner)
            if now.keys() != attributes.keys() or any(now[name] is not value for name, value in attributes.items()):
                now.clear()
                now.update(attributes)


def _has_attributes(held: Any) -> bool:
    """Whether this is an object with attributes of its own, and neither a part of the program nor of the model."""
    return type(getattr(held, "__dict__", None)) is dict and not isinstance(held, (nn.Module, Tensor, ModuleType, type))
