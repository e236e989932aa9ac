"""Lineage: what a model remembers of its cuts, also where a module that was cut has given way to another."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import Tensor, nn

from setpoint.actuator.cut import SizePlace
from setpoint.actuator.sizes import dense_sizes, note_dense_sizes, record_dense, recorded_dense, recorded_sizes
from setpoint.errors import GroupError
from setpoint.groups.place import is_call, read_size

_KEY = "_setpoint_lineage"

Shapes = Mapping[str, tuple[int, ...]]


def note_cut(
    model: nn.Module, before: Shapes, after: Shapes, sizes: Mapping[SizePlace, int | None], undo: ExitStack
) -> None:
    """Note on the model itself the shapes of tensors before and after a cut, and the sizes that it is about to set.

    A module that takes another's place knows nothing of its cuts; the model as a whole does.
    """
    old: dict[str, dict[Any, Any]] | None = model.__dict__.get(_KEY)
    known = old or {"dense": {}, "now": {}, "sizes": {}, "dense_sizes": {}}
    places = [at for at in sizes if not is_call(at[1])]
    first = {at: read_size(model.get_submodule(at[0]), at[1]) for at in places}
    undo.callback(partial(_put, model, old))
    _put(
        model,
        {
            "dense": {**before, **known["dense"]},
            "now": {**known["now"], **after},
            "sizes": {**known["sizes"], **sizes},
            "dense_sizes": {**first, **known.get("dense_sizes", {})},
        },
    )


def _put(model: nn.Module, record: dict[str, dict[Any, Any]] | None) -> None:
    if record is None:
        model.__dict__.pop(_KEY, None)
    else:
        model.__dict__[_KEY] = record


def adopt(model: nn.Module, undo: ExitStack) -> None:
    """Let modules that stand where others were cut know of it themselves, before a cut of their own."""
    known = recorded_dense(model)
    record_dense(model, {name: shape for name, shape in shapes_before(model).items() if name not in known}, undo)
    sizes = {at: size for at, size in sizes_before(model).items() if size is not None}
    note_dense_sizes(model, sizes, undo)


def shapes_before(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """By every name, the shape before the first cut of a tensor that cuts have changed, or that stands where one has.

    Of a dim that is as long as that of the one which was cut it is the dense length, of any other its own.
    """
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors |= dict(model.named_buffers(remove_duplicate=False))
    found: dict[str, tuple[int, ...]] = {}
    for prefix, record in _records(model):
        for name, dense in record["dense"].items():
            live = tensors.get(f"{prefix}{name}")
            now = record["now"].get(name, ())
            if live is not None and live.dim() == len(now) == len(dense):
                found[f"{prefix}{name}"] = tuple(
                    old if length == new else length for length, new, old in zip(live.shape, now, dense, strict=True)
                )
    return by_every_name({**found, **recorded_dense(model)}, tensors)


def by_every_name(shapes: Shapes, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The same, where a tensor has several names: tied, or of a module that two others hold."""
    known = {id(tensors[name]): shape for name, shape in shapes.items() if name in tensors}
    return {**{name: known[id(each)] for name, each in tensors.items() if id(each) in known}, **shapes}


def sizes_now(model: nn.Module) -> dict[SizePlace, int]:
    """Every place that cuts have set, as it is now, in modules that stand where others were cut, too."""
    return {**{at: live for at, (live, _) in _inherited_sizes(model).items()}, **recorded_sizes(model)}


def sizes_before(model: nn.Module) -> dict[SizePlace, int | None]:
    """The same places as they were before the first cut; None for a call, which gave its size itself."""
    return {**{at: first for at, (_, first) in _inherited_sizes(model).items()}, **dense_sizes(model)}


def _inherited_sizes(model: nn.Module) -> dict[SizePlace, tuple[int, int | None]]:
    """Of places that the model remembers, what stands there and what stood there before the first cut."""
    found: dict[SizePlace, tuple[int, int | None]] = {}
    for prefix, record in _records(model):
        for (name, place), size in record["sizes"].items():
            owner = ".".join(part for part in (prefix.removesuffix("."), name) if part)
            try:
                module = model.get_submodule(owner)
                live = size if is_call(place) else read_size(module, place)
            except (AttributeError, GroupError):  # it has no such size any more
                continue
            if live is not None:
                dense = record.get("dense_sizes", {}).get((name, place), live)
                found[owner, place] = live, None if is_call(place) else dense if live == size else live
    return found


def _records(model: nn.Module) -> list[tuple[str, dict[str, dict[Any, Any]]]]:
    """Of the model and of submodules that were cut by themselves, the innermost last."""
    return [
        (f"{prefix}." if prefix else "", root.__dict__[_KEY])
        for prefix, root in model.named_modules()
        if _KEY in root.__dict__
    ]
