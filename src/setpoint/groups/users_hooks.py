"""Hooks of the user on a model: those that are not torch's own, which compute weights (weight norm)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def is_users(hook: Any) -> bool:
    """Whether a hook is not torch's own."""
    return not type(hook).__module__.startswith("torch.nn.utils")


def users_hooks(module: nn.Module) -> Iterator[tuple[dict[int, Any], list[int]]]:
    """A module's tables of hooks, each with the keys of those that are the user's own."""
    for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks):
        yield hooks, [key for key, hook in hooks.items() if is_users(hook)]


def has_users_hooks(model: nn.Module) -> bool:
    """Whether any module has one."""
    return any(keys for module in model.modules() for _, keys in users_hooks(module))


def strip(model: nn.Module) -> None:
    """Take the user's hooks off."""
    for module in model.modules():
        for hooks, keys in users_hooks(module):
            for key in keys:
                del hooks[key]


@contextmanager
def without_users_hooks(model: nn.Module) -> Iterator[None]:
    """Inside, the model is without them; afterwards they run in the order in which they ran before."""
    before = [(hooks, dict(hooks)) for module in model.modules() for hooks, _ in users_hooks(module)]
    strip(model)
    try:
        yield
    finally:
        for hooks, all_of_them in before:
            hooks.clear()
            hooks.update(all_of_them)
