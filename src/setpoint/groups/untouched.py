"""A model, and all around it, left as it was by a look at it: deep copies, and contexts that put back what changes."""

import copy
import gc
import random
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import wraps
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

_P = ParamSpec("_P")
_R = TypeVar("_R")
_LOCK = threading.RLock()


def copy_of(model: nn.Module, memo: Mapping[int, Any] | None = None, *, users_hooks: bool = True) -> nn.Module:
    """A deep copy of a model; torch's own hooks, which compute weights (weight norm), come along always.

    `memo` says by id of an object of the model what the copy has in its place; by default it is `computed(model)`.
    """
    # By the memo, not removed from the copy: a hook that holds a file or a socket cannot even be copied.
    tables = [] if users_hooks else _hook_tables(model)
    hooks = {id(table): OrderedDict((key, h) for key, h in table.items() if not _is_users(h)) for table in tables}
    return copy.deepcopy(model, {**hooks, **(computed(model) if memo is None else memo)})


def computed(model: nn.Module) -> dict[int, Any]:
    """The memo with which `copy.deepcopy` takes what it refuses: what a forward left on modules, and sparse tensors."""
    leaves = pytree.tree_leaves([list(vars(module).values()) for module in model.modules()])
    memo: dict[int, Any] = {}
    for leaf in leaves:
        if isinstance(leaf, Tensor) and not (leaf.is_leaf and leaf.layout == torch.strided):
            copied = leaf.detach().clone()
            memo[id(leaf)] = nn.Parameter(copied, leaf.requires_grad) if isinstance(leaf, nn.Parameter) else copied
    return memo


def _hook_tables(model: nn.Module) -> list[OrderedDict[Any, Any]]:
    held = (item for module in model.modules() for item in vars(module).items())
    return [table for name, table in held if isinstance(table, OrderedDict) and "_hooks" in name]


def _is_users(hook: Any) -> bool:
    return not type(hook).__module__.startswith("torch.nn.utils")


def has_users_hooks(model: nn.Module) -> bool:
    return any(_is_users(hook) for table in _hook_tables(model) for hook in table.values())


def strip(model: nn.Module) -> None:
    """Take the user's hooks off."""
    for table in _hook_tables(model):
        for key in [key for key, hook in table.items() if _is_users(hook)]:
            del table[key]


@contextmanager
def without_users_hooks(model: nn.Module) -> Iterator[None]:
    """Inside, the model is without them; afterwards they run in the order in which they ran before."""
    before = [(table, table.copy()) for table in _hook_tables(model)]
    strip(model)
    try:
        yield
    finally:
        for table, hooks in before:
            table.clear()
            table.update(hooks)


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


@contextmanager
def preserved_rng_state(model: nn.Module) -> Iterator[None]:
    """Preserve the RNG state of PyTorch (host and the model's devices), NumPy and Python."""
    devices = {parameter.device for parameter in model.parameters()}
    python, numpy = random.getstate(), np.random.get_state(legacy=False)
    with torch.random.fork_rng([device for device in devices if device.type == "cuda"]):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Inside, all modules are in this mode; then each gets its own mode back, also a frozen norm."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = training  # not by `train`, which a model may override to fold weights together
        yield
    finally:
        for module, before in modes:
            module.training = before


@contextmanager
def gc_paused() -> Iterator[None]:
    """While inside, cyclic garbage is not collected. Afterwards collection is on if it was before."""
    # Discovery makes objects by the hundred thousand that stay; each collection would look at all of torch's, too.
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def one_at_a_time(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """The function, run by one thread at a time: threads share random generators and PyTorch's tracer."""

    @wraps(function)
    def alone(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        # Connected ranks run it together, and may be threads themselves.
        connected = torch.distributed.is_available() and torch.distributed.is_initialized()
        with nullcontext() if connected else _LOCK:
            return function(*args, **kwargs)

    return alone
