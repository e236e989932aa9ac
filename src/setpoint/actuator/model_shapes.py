"""The shapes of a cut model: one record at its root of all tensors and sizes in code that cuts have changed.

The record is plain data, so that a pickle of the model loads where Setpoint is not installed. Every module holds it
with its own name in it: a submodule that is saved by itself finds its entries, also under another name (PEFT moves
layers when it merges adapters), and a new module in the place of a cut one finds those of its predecessor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from setpoint.actuator.cut import SizePlace
from setpoint.actuator.tensors import named_tensors, shapes_by_name
from setpoint.errors import GroupError
from setpoint.groups.sizes_in_code.place import is_call, read_size, write_size
from setpoint.groups.sizes_in_code.shim import get_call_sizes, set_call_sizes

RECORD = "_setpoint_shapes"  # attribute of every module of a cut model: the record, and the module's name in it

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
# `tensors`: by name (dense shape, shape after the last cut); `sizes`: by module and place the same of a size.
_Record = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class ModelShapes:
    """What a model remembers of its cuts, as it is now; empty for one that was never cut."""

    dense: Shapes  # by every name of each tensor that cuts have changed, its shape before the first cut
    sizes: Mapping[SizePlace, int]  # the integer that stands at a place now, of all that cuts have set
    dense_sizes: Mapping[SizePlace, int | None]  # before the first cut; None for a call, which computes its size itself
    buffers: tuple[str, ...]  # non-persistent ones that cuts have changed: no state dict holds them

    @classmethod
    def of(cls, model: nn.Module) -> ModelShapes:
        """Of a model, a part of one, or what has cut models as parts."""
        dense: dict[str, Shape] = {}
        sizes: dict[SizePlace, int] = {}
        dense_sizes: dict[SizePlace, int | None] = {}
        buffers: list[str] = []
        for name, module, record, name_then in _modules(model):
            for key, tensor in (*module._parameters.items(), *module._buffers.items()):
                then = _joined(name_then, key)
                if tensor is None or then not in record["tensors"]:
                    continue
                before, after = record["tensors"][then]
                if tensor.dim() == len(before):
                    # A new module in a cut one's place counts as cut where it is as long; a new head is as it is.
                    lengths = zip(tensor.shape, before, after, strict=True)
                    dense[_joined(name, key)] = tuple(old if now == new else now for now, old, new in lengths)
                if key in module._non_persistent_buffers_set:
                    buffers.append(_joined(name, key))
            for place, (first, last) in record["sizes"].get(name_then, {}).items():
                if is_call(place):
                    sizes[name, place], dense_sizes[name, place] = get_call_sizes(module).get(place, last), None
                    continue
                with suppress(GroupError):  # a module that took another's place may have no such size
                    size = sizes[name, place] = read_size(module, place)
                    dense_sizes[name, place] = first if size == last else size
        return cls(by_every_name(dense, named_tensors(model)), sizes, dense_sizes, tuple(buffers))

    def full(self, model: nn.Module) -> dict[str, Shape]:
        """The shape of every parameter and buffer before the first cut, by name."""
        return shapes_by_name(model) | dict(self.dense)


def was_cut(model: nn.Module) -> bool:
    """Whether any tensor of a model is narrower than when its code built it, by what the model itself remembers."""
    tensors = named_tensors(model)
    return any(tuple(tensors[name].shape) != shape for name, shape in ModelShapes.of(model).dense.items())


def note_cut(
    model: nn.Module,
    shapes: Shapes,
    sizes: Mapping[SizePlace, int | None],
    undo: ExitStack,
    dense: Shapes | None = None,
) -> None:
    """Note on a model what a change is about to make of it; call this before the change.

    `shapes` and `sizes` are those after it, a size None for a call that needs no correction any more; `undo` takes the
    callbacks that put the old record back; `dense` holds shapes before the first cut, where the model is not dense now.
    """
    # What submodules remember of cuts of their own is taken into the root's record here.
    known, tensors = ModelShapes.of(model), named_tensors(model)
    now = shapes_by_name(model)
    changed = by_every_name(shapes, tensors)
    after, before = {**now, **changed}, {name: now[name] for name in changed if name in now}
    before |= {**known.dense, **by_every_name(dense or {}, tensors)}
    # A module that two others hold has two names; `_modules` will ask for the first.
    first_name = {module: name for name, module in model.named_modules()}
    sizes_in: dict[str, dict[str, tuple[int | None, int]]] = {}
    for (name, place), size in {**known.sizes, **sizes}.items():
        module = model.get_submodule(name)
        own = first_name[module]
        if size is None:
            sizes_in.get(own, {}).pop(place, None)
        else:
            present = None if is_call(place) else read_size(module, place)
            sizes_in.setdefault(own, {})[place] = known.dense_sizes.get((own, place), present), size
    record: _Record = {
        "tensors": {name: (shape, after.get(name, shape)) for name, shape in before.items()},
        "sizes": sizes_in,
    }
    # A new record, not a changed one: what submodules and copies hold of an old record stays true.
    for name, module in model.named_modules():
        if RECORD in module.__dict__:
            undo.callback(module.__dict__.__setitem__, RECORD, module.__dict__[RECORD])
        else:
            undo.callback(module.__dict__.pop, RECORD, None)
        module.__dict__[RECORD] = record, name


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, _Record, str]]:
    """Each module by its name here, with the record that knows it and the name that it has there."""
    known: dict[str, tuple[_Record, str]] = {}
    for name, module in model.named_modules():
        parent, _, child = name.rpartition(".")
        own = module.__dict__.get(RECORD)
        if own is None and name and parent in known:  # a module that took the place of another, or was added
            record, name_of_parent = known[parent]
            own = record, _joined(name_of_parent, child)
        if own is not None:
            known[name] = own
            yield name, module, *own


def _joined(*names: str) -> str:
    return ".".join(name for name in names if name)


def by_module(sizes: Mapping[SizePlace, int]) -> dict[str, dict[str, int]]:
    """Sizes by name of the module, then by place, as files hold them."""
    nested: dict[str, dict[str, int]] = {}
    for (module, place), size in sizes.items():
        nested.setdefault(module, {})[place] = size
    return nested


def by_every_name(shapes: Shapes, tensors: Mapping[str, Tensor]) -> dict[str, Shape]:
    """The same, where a tensor has several names: tied, or of a module that two others hold."""
    known = {id(tensors[name]): shape for name, shape in shapes.items() if name in tensors}
    return {**{name: known[id(tensor)] for name, tensor in tensors.items() if id(tensor) in known}, **shapes}


def check_sizes(model: nn.Module, sizes: Iterable[SizePlace]) -> None:
    """Check that every place exists, before anything is changed, or raise a GroupError that names it."""
    for name, place in sizes:
        try:
            module = model.get_submodule(name)
        except AttributeError as error:
            raise GroupError(f"the model has no module {name!r}, which should hold a size: {error}") from None
        if not is_call(place):
            read_size(module, place)


def apply_sizes(model: nn.Module, sizes: Mapping[SizePlace, int | None], undo: ExitStack) -> None:
    """Set sizes in the modules of `model`; None for a call that needs no correction any more."""
    calls: dict[nn.Module, dict[str, int | None]] = {}
    for (name, place), size in sizes.items():
        module = model.get_submodule(name)
        if is_call(place):
            calls.setdefault(module, {})[place] = size
            continue
        assert size is not None, "an attribute always holds a size"
        present = read_size(module, place)
        write_size(module, place, size)
        undo.callback(write_size, module, place, present)  # only now: what cannot be set cannot be put back
    # All calls of a module share one corrected forward, so they are set together.
    for module, places in calls.items():
        present_calls = dict(get_call_sizes(module))
        undo.callback(set_call_sizes, module, present_calls)
        merged = {**present_calls, **places}
        set_call_sizes(module, {place: size for place, size in merged.items() if size is not None})
