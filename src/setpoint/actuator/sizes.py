"""Sizes: the integers in live Python code that must equal the lengths of the tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import partial

from torch import nn

from setpoint.actuator.cut import SizePlace
from setpoint.errors import GroupError
from setpoint.groups.place import is_call, read_size, write_size
from setpoint.groups.shim import get_call_sizes, set_call_sizes

_RECORD = "_setpoint_sizes"
_BUFFERS = "_setpoint_buffers"
_DENSE = "_setpoint_dense"
_DENSE_SIZES = "_setpoint_dense_sizes"


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
        undo: takes the callbacks that put everything back.
    """
    # All are read before any is set, since modules share objects such as a config.
    dense = {at: read_size(model.get_submodule(at[0]), at[1]) for at in sizes if not is_call(at[1])}
    note_dense_sizes(model, dense, undo)
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
        present = read_size(module, place)
        write_size(module, place, size)
        undo.callback(partial(write_size, module, place, present))  # only now: what cannot be set cannot be put back
    # All calls of a module share one corrected forward, so they are set together.
    for name, places in calls.items():
        module = model.get_submodule(name)
        old = dict(get_call_sizes(module))
        undo.callback(partial(set_call_sizes, module, old))
        new: dict[str, int] = old
        for place, size in places.items():
            new = _with_size(new, place, size)
        set_call_sizes(module, new)


def note_dense_sizes(model: nn.Module, sizes: Mapping[SizePlace, int], undo: ExitStack) -> None:
    """Note on modules what stood at places before their first change, where they do not know it yet."""
    for (name, place), size in sizes.items():
        module = model.get_submodule(name)
        before: dict[str, int] | None = module.__dict__.get(_DENSE_SIZES)
        if place not in (before or {}):
            undo.callback(partial(_set_record, module, _DENSE_SIZES, before))
            _set_record(module, _DENSE_SIZES, {**(before or {}), place: size})


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


def dense_sizes(model: nn.Module) -> dict[SizePlace, int | None]:
    """Every place that cuts have set in `model`, as it was before the first; None for a call, which gave it itself."""
    return {
        (name, place): None if is_call(place) else module.__dict__.get(_DENSE_SIZES, {}).get(place, size)
        for (name, place), size in recorded_sizes(model).items()
        for module in (model.get_submodule(name),)
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
    """Note which non-persistent buffers were cut: no state dict holds them, yet loading the model needs them."""
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
