"""Sizes: the integers in live Python code that must count what the tensors really hold."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import nn

from setpoint.actuator.cut import SizePlace
from setpoint.errors import GroupError
from setpoint.groups.shim import get_call_sizes, set_call_sizes
from setpoint.groups.vanish import fit_forward

_RECORD = "_setpoint_sizes"
_BUFFERS = "_setpoint_buffers"
_DENSE = "_setpoint_dense"
_STEP = re.compile(r"\.?([^.\[\]]+)|\[(\d+)\]")


def is_call(place: str) -> bool:
    """Whether a place is a call in a module's forward (`"view#2[1]"`), not an attribute."""
    return "#" in place


def read_size(module: nn.Module, place: str) -> int:
    """The integer at an attribute place: `"out_channels"`, `"normalized_shape[0]"`, `"config.hidden_size"`.

    Raises:
        GroupError: when there is no such attribute or it is not an integer.

    >>> read_size(nn.LayerNorm(7), "normalized_shape[0]")
    7
    """
    value: Any = module
    for step in _path(place):
        try:
            value = value[step] if isinstance(step, int) else getattr(value, step)
        except (AttributeError, IndexError, TypeError) as error:
            raise GroupError(f"{type(module).__name__} has no {place!r}: {error}") from error
    if not isinstance(value, int) or isinstance(value, bool):
        raise GroupError(f"{type(module).__name__}.{place} is not an integer but {value!r}")
    return value


def write_size(module: nn.Module, place: str, size: int) -> None:
    """Set the integer at an attribute place; sequences are replaced by a copy, never changed in place.

    >>> norm = nn.LayerNorm(7)
    >>> write_size(norm, "normalized_shape[0]", 5)
    >>> norm.normalized_shape
    (5,)
    """
    _write(module, _path(place), size)


def _path(place: str) -> list[str | int]:
    steps = [int(match[2]) if match[2] else match[1] for match in _STEP.finditer(place)]
    if "".join(match[0] for match in _STEP.finditer(place)) != place or not steps or isinstance(steps[0], int):
        raise GroupError(f"{place!r} is not a place: write an attribute such as 'config.sizes[0]'")
    return steps


def _write(owner: Any, path: list[str | int], size: int) -> Any:
    """Write along the path and return `owner`, or its changed copy where it is a sequence."""
    step, rest = path[0], path[1:]
    if isinstance(step, int):
        items = list(owner)
        items[step] = _write(items[step], rest, size) if rest else size
        return items if isinstance(owner, list) else type(owner)(items)
    old = getattr(owner, step)
    new = _write(old, rest, size) if rest else size
    if new is not old:
        setattr(owner, step, new)
    return owner


def check_sizes(model: nn.Module, sizes: Iterable[SizePlace]) -> None:
    """Check that every place exists, before anything is changed.

    Raises:
        GroupError: naming the first module or place that does not exist.
    """
    for name, place in sizes:
        try:
            module = model.get_submodule(name)
        except AttributeError as error:
            raise GroupError(f"the model has no module {name!r}, which should hold a size: {error}") from error
        if not is_call(place):
            read_size(module, place)


def apply_sizes(model: nn.Module, sizes: Mapping[SizePlace, int | None], undo: ExitStack) -> None:
    """Set sizes in the modules of `model`, and record them on it so that `save` finds them.

    Args:
        model: the root; names are relative to it.
        sizes: by (module name, place), the new size; None for a call that needs no correction any more.
        undo: where to note how to put everything back; `undo.close()` does it.
    """
    calls: dict[str, dict[str, int | None]] = {}
    for (name, place), size in sizes.items():
        module = model.get_submodule(name)
        before: dict[str, int] | None = module.__dict__.get(_RECORD)
        undo.callback(partial(_set_record, module, _RECORD, before))
        _set_record(module, _RECORD, _with_size(before, place, size) or None)
        if is_call(place):
            calls.setdefault(name, {})[place] = size
            continue
        assert size is not None, "an attribute always holds a size"
        undo.callback(fit_forward, module)
        undo.callback(partial(write_size, module, place, read_size(module, place)))
        write_size(module, place, size)
        fit_forward(module)
    for name, places in calls.items():
        module = model.get_submodule(name)
        old = dict(get_call_sizes(module))
        undo.callback(partial(set_call_sizes, module, old))
        new: dict[str, int] = old
        for place, size in places.items():
            new = _with_size(new, place, size)
        set_call_sizes(module, new)


def _with_size(sizes: Mapping[str, int] | None, place: str, size: int | None) -> dict[str, int]:
    kept = {each: value for each, value in (sizes or {}).items() if each != place}
    return kept if size is None else {**kept, place: size}


def _set_record(model: nn.Module, key: str, record: object) -> None:
    if record is None:
        model.__dict__.pop(key, None)
    else:
        model.__dict__[key] = record


def recorded_sizes(model: nn.Module) -> dict[SizePlace, int]:
    """Every place that cuts have set in `model`, as it is now.

    The record is a plain dict on each module that was cut, so it survives `copy.deepcopy` and pickle, and a
    part of a model keeps what belongs to it.
    """
    return {
        (name, place): get_call_sizes(module)[place] if is_call(place) else read_size(module, place)
        for name, module in model.named_modules()
        for place in module.__dict__.get(_RECORD, ())
    }


def record_dense(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], undo: ExitStack) -> None:
    """Note the shapes that tensors had before their first cut, by name, each on the module that owns it."""
    for name, shape in shapes.items():
        owner, _, key = name.rpartition(".")
        module = model.get_submodule(owner)
        before: dict[str, tuple[int, ...]] | None = module.__dict__.get(_DENSE)
        if key not in (before or {}):
            undo.callback(partial(_set_record, module, _DENSE, before))
            _set_record(module, _DENSE, {**(before or {}), key: shape})


def recorded_dense(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes before the first cut of every tensor that cuts have changed, by name."""
    return {
        f"{name}.{key}" if name else key: tuple(shape)
        for name, module in model.named_modules()
        for key, shape in module.__dict__.get(_DENSE, {}).items()
    }


def record_buffers(model: nn.Module, names: Iterable[str], undo: ExitStack) -> None:
    """Note which non-persistent buffers were cut: no state dict holds them, yet they are needed to load the model."""
    before: tuple[str, ...] = model.__dict__.get(_BUFFERS, ())
    after = tuple(dict.fromkeys((*before, *names)))
    if after != before:
        undo.callback(partial(_set_record, model, _BUFFERS, before or None))
        _set_record(model, _BUFFERS, after)


def recorded_buffers(model: nn.Module) -> tuple[str, ...]:
    """Names of the non-persistent buffers that cuts have changed, in `model` or in a submodule cut by itself."""
    return tuple(
        ".".join(part for part in (prefix, name) if part)
        for prefix, root in model.named_modules()
        for name in root.__dict__.get(_BUFFERS, ())
    )
