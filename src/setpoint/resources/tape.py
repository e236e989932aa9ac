"""A tape: every operation of one training step and every storage it makes, with sizes as functions of widths."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves

from setpoint.errors import CostError
from setpoint.groups.group import Size
from setpoint.groups.rng import gc_paused
from setpoint.groups.walk import op_name
from setpoint.resources.lengths import Lengths
from setpoint.resources.live_bytes import LiveBytes, Noted


class Trainee(Protocol):
    """A model in training that can make one more step."""

    def step(self) -> None:
        """Forward, backward and optimizer step."""

    def held(self) -> Sequence[Tensor]:
        """Tensors that live between steps: weights, buffers, optimizer state, inputs."""


@dataclass(frozen=True)
class Operand:
    """A tensor that an operation reads.

    Args:
        order: dims from the one with the largest stride to the one with the smallest.
        expanded: dims along which one entry stands for all.
    """

    shape: tuple[Size, ...]
    order: tuple[int, ...]
    expanded: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class Operation:
    """One call of an ATen operation; its leaves are operands, sizes where a number follows widths, and constants."""

    target: Any
    leaves: tuple[Any, ...]
    spec: TreeSpec
    outputs: tuple[Operand, ...]

    @property
    def name(self) -> str:
        """Short name of the operation."""
        return op_name(self.target)


@dataclass(frozen=True, eq=False)
class Storage:
    """A piece of memory: its bytes are `itemsize * prod(sizes)`."""

    itemsize: int
    sizes: tuple[Size, ...]


@dataclass(frozen=True, eq=False)
class Tape:
    """One training step.

    Args:
        operations: in order; views, which cost nothing, are left out.
        events: (storage, True if made and False if gone), in order.
    """

    operations: tuple[Operation, ...]
    storages: tuple[Storage, ...]
    events: tuple[tuple[int, bool], ...]


@dataclass(frozen=True)
class _Shape:
    shape: tuple[int, ...]
    order: tuple[int, ...]
    expanded: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> _Shape:
        shape, strides = tuple(map(int, tensor.shape)), tensor.stride() if tensor.layout == torch.strided else ()
        order = tuple(sorted(range(len(strides)), key=lambda dim: (-strides[dim], dim)))
        expanded = tuple(d for d, stride in enumerate(strides) if stride == 0 and shape[d] > 1)
        return cls(shape, order, expanded, tensor.dtype)


_Call = tuple[Any, tuple[Any, ...], TreeSpec, tuple[_Shape, ...]]
"""An operation, its flattened arguments, how they were nested, and what it returned."""


_Take = tuple[list[_Call], list[tuple[int, _Shape]], list[tuple[int, bool]]]
"""Calls, storages and events at one width vector."""

_CONTAINERS = (list, tuple, dict)
"""What the arguments of an operation may be nested in."""
_COSTLESS = ("_unsafe_view", "_reshape_alias", "lift_fresh", "_local_scalar_dense", "device", "is_pinned")


class _Calls(LiveBytes):  # type: ignore[no-untyped-call]
    """Notes calls and storages: one mode for both, since a mode costs more than what it notes."""

    def __init__(self, held: Iterable[Tensor], noted: Noted, calls: list[_Call]) -> None:
        super().__init__(held, noted)
        self._calls = calls
        self._specs: dict[Any, TreeSpec] = {}
        self._shapes: dict[Any, _Shape] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace in ("prim", "profiler"):
            return super().__torch_dispatch__(func, types, args, kwargs)
        leaves, spec = self._flat(args, kwargs)
        seen = tuple(self.shape(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        result = func(*args, **kwargs)
        made = [result] if isinstance(result, Tensor) else [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        for each in made:
            self.see(each, leaves)
        self._calls.append((func, seen, spec, tuple(map(self.shape, made))))
        return result

    def shape(self, tensor: Tensor) -> _Shape:
        """The shape of a tensor; a step has few different ones."""
        key = tensor.shape, tensor.stride() if tensor.layout == torch.strided else (), tensor.dtype
        found = self._shapes.get(key)
        if found is None:
            found = self._shapes[key] = _Shape.of(tensor)
        return found

    def _flat(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], TreeSpec]:
        """`tree_flatten((args, kwargs))`; for arguments that are leaves or lists of leaves the nesting is kept."""
        leaves, nesting = list[Any](), list[Any]()
        for value in (*args, *kwargs.values()):
            kind = type(value)
            if not isinstance(value, _CONTAINERS):
                leaves.append(value)
                nesting.append(None)
            elif kind in (list, tuple) and not any(isinstance(each, _CONTAINERS) for each in value):
                leaves += value
                nesting.append((kind, len(value)))
            else:
                return tree_flatten((args, kwargs))
        key = len(args), tuple(kwargs), tuple(nesting)
        if key not in self._specs:
            self._specs[key] = tree_flatten((args, kwargs))[1]
        return leaves, self._specs[key]


def _take(made: Trainee) -> _Take:
    taken: _Take = ([], [], [])
    calls, storages, events = taken

    def noted(what: str, number: int, tensor: Tensor | None) -> None:
        events.append((number - 1, what == "made"))
        if tensor is not None:
            storages.append((tensor.untyped_storage().nbytes(), _Shape.of(tensor)))

    held = made.held()
    torch.clear_autocast_cache()  # a step casts each weight once
    with gc_paused(), _Calls(held, noted, calls):
        made.step()
    return taken


def record(
    make: Callable[[Mapping[str, int]], AbstractContextManager[Trainee]], vectors: Sequence[Mapping[str, int]]
) -> Tape:
    """Record one training step at several widths (`trial_widths`), and find how each size follows them.

    Raises:
        CostError: if the step is not the same at all widths, or a size follows widths in no known way.
    """
    takes = []
    for vector in vectors:
        with make(vector) as trainee:
            takes.append(_take(trainee))
    return _solved(takes, vectors)


def record_each(trainees: Iterable[Trainee], vectors: Sequence[Mapping[str, int]]) -> Tape:
    """The same of trainees that are at these widths when their turn comes, such as one that becomes narrower."""
    return _solved([_take(trainee) for trainee, _ in zip(trainees, vectors, strict=True)], vectors)


def _solved(takes: Sequence[_Take], vectors: Sequence[Mapping[str, int]]) -> Tape:
    targets, events = [call[0] for call in takes[0][0]], takes[0][2]
    for vector, (calls, _, others) in zip(vectors[1:], takes[1:], strict=True):
        if [call[0] for call in calls] != targets or others != events:
            single = [name for name, width in vector.items() if width == 1 < vectors[0][name]]
            out = f", or leave out by `groups=` what becomes a single unit ({', '.join(single)})" if single else ""
            raise CostError(
                f"the training step makes other operations at widths {dict(vector)} than at wider ones, so its cost is "
                f"no function of widths: hold it to a budget of 'flops' or 'params'{out}"
            )
    lengths = Lengths(vectors)
    operations = [_operation(lengths, seen) for seen in zip(*(calls for calls, _, _ in takes), strict=True)]
    storages = tuple(_storage(lengths, seen) for seen in zip(*(made for _, made, _ in takes), strict=True))
    costly = tuple(each for each in operations if not each.target.is_view and each.name not in _COSTLESS)
    return Tape(costly, storages, tuple(events))


def _operation(lengths: Lengths, seen: Sequence[_Call]) -> Operation:
    target, leaves, spec, outputs = seen[0]
    name = op_name(target)
    made = tuple(_leaf(lengths, [call[1][i] for call in seen], name) for i in range(len(leaves)))
    if name == "cat":
        pieces = [leaf for leaf in made if isinstance(leaf, Operand) and leaf.shape]
        dim = next((leaf for leaf in made if isinstance(leaf, int)), 0)
        lengths.learn([piece.shape[dim] for piece in pieces])
    given = tuple(_operand(lengths, [call[3][i] for call in seen], name) for i in range(len(outputs)))
    return Operation(target, made, spec, given)


def _leaf(lengths: Lengths, values: Sequence[Any], name: str) -> Any:
    if isinstance(values[0], _Shape):
        return _operand(lengths, values, name)
    if type(values[0]) is int and len(set(values)) > 1:
        return _size(lengths, values, name)
    return values[0]


def _operand(lengths: Lengths, values: Sequence[_Shape], name: str) -> Operand:
    first = values[0]
    shape = tuple(_size(lengths, sizes, name) for sizes in zip(*(value.shape for value in values), strict=True))
    return Operand(shape, first.order, first.expanded, first.dtype)


def _size(lengths: Lengths, values: Sequence[int], name: str) -> Size:
    found = lengths.size(tuple(values))
    if found is None:
        raise CostError(
            f"a size in {name!r} follows the widths of several groups in a way that is not known ({list(values)}): "
            "hold the model to a budget of 'flops' or 'params'"
        )
    return found


def _storage(lengths: Lengths, seen: Sequence[tuple[int, _Shape]]) -> Storage:
    """A storage made for a whole tensor follows that tensor's shape; any other follows widths by its length."""
    whole = all(math.prod(shape.shape) * shape.dtype.itemsize == num_bytes for num_bytes, shape in seen)
    if whole:
        operand = _operand(lengths, [shape for _, shape in seen], "a tensor")
        return Storage(operand.dtype.itemsize, operand.shape)
    return Storage(1, (_size(lengths, [num_bytes for num_bytes, _ in seen], "a storage"),))
