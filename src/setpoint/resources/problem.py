"""A problem: one operation at any widths, as it is timed alone on the device."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_unflatten

from setpoint.groups.group import Group, Size
from setpoint.resources.lengths import block_widths
from setpoint.resources.tape import Operand, Operation

_CONTRACTIONS = ("conv", "mm", "addmv", "mv", "dot", "linear", "attention", "einsum", "lstm", "gru", "rnn")
_MAX_AXES = 3
_ENTRIES = "entries"
_COUNTS = tuple(4**power for power in range(4, 14))
"""Lengths at which an operation on one dim is timed."""
_SMALL = 4**9
"""Up to here it is timed at one length more than needed; beyond, time is in proportion to the length."""


@dataclass(frozen=True)
class Axis:
    """A length that several dims of a problem follow, and what it can become, the dense value first."""

    size: Size
    values: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Problem:
    """One operation, and the lengths that it follows.

    Args:
        key: the same for problems that take the same time.
        contraction: whether time follows the product of the lengths rather than the bytes moved.
        by_entries: whether it is an operation on one dim of any length, which stands for all shapes.
    """

    operation: Operation
    axes: tuple[Axis, ...]
    key: str
    contraction: bool
    by_entries: bool = False

    @property
    def dense(self) -> tuple[int, ...]:
        """The dense value of each axis."""
        return tuple(axis.values[0] for axis in self.axes)

    def num_entries(self, values: Sequence[int]) -> int:
        """Entries of the first output at these values of the axes."""
        return math.prod(self._kept(self.operation.outputs[0], values))

    def num_bytes(self, values: Sequence[int]) -> float:
        """Bytes read and written at these values of the axes."""
        operands = [leaf for leaf in self.operation.leaves if isinstance(leaf, Operand)]
        moved = (*operands, *self.operation.outputs)
        return float(sum(each.dtype.itemsize * math.prod(self._kept(each, values)) for each in moved))

    def _kept(self, operand: Operand, values: Sequence[int]) -> list[int]:
        """The lengths that take memory: 1 where one entry stands for all."""
        return [1 if d in operand.expanded else self._length(size, values) for d, size in enumerate(operand.shape)]

    def arguments(self, values: Sequence[int], device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of the call at these values; every entry is 1/2, and every index 0, which is always valid."""
        leaves = [self._argument(leaf, values, device) for leaf in self.operation.leaves]
        args, kwargs = tree_unflatten(leaves, self.operation.spec)
        return args, kwargs

    def _argument(self, leaf: Any, values: Sequence[int], device: torch.device) -> Any:
        if isinstance(leaf, Size):
            return self._length(leaf, values)
        if not isinstance(leaf, Operand):
            return leaf
        shape = self._kept(leaf, values)
        entry = 0.5 if leaf.dtype.is_floating_point or leaf.dtype.is_complex else leaf.dtype == torch.bool
        made = torch.full([shape[d] for d in leaf.order], entry, dtype=leaf.dtype, device=device)
        made = made.permute([leaf.order.index(d) for d in range(len(shape))])
        full = [self._length(size, values) for size in leaf.shape]
        expanded: Tensor = made.expand(full) if leaf.expanded else made
        return expanded

    def _length(self, size: Size, values: Sequence[int]) -> int:
        if not size.parts:
            return size.constant
        for axis, value in zip(self.axes, values, strict=True):
            if axis.size == size:
                return value
            if axis.size == _unit(size):
                return size.parts[0][1] * value
        raise AssertionError(f"{size} is on no axis")


def _unit(size: Size) -> Size:
    """The length behind a size: the width itself where it is in proportion to one width, else the size."""
    if size.constant == 0 and len(size.parts) == 1:
        return Size(0, ((size.parts[0][0], 1),))
    return size


def pose(operation: Operation, groups: Mapping[str, Group]) -> Problem:
    """The problem that an operation of a tape is."""
    leaves = (*operation.leaves, *operation.outputs)
    sizes = [
        s
        for leaf in leaves
        for s in (leaf.shape if isinstance(leaf, Operand) else (leaf,))
        if isinstance(s, Size) and s.parts
    ]
    axes = tuple(Axis(unit, _values(unit, groups)) for unit in dict.fromkeys(map(_unit, sizes)))
    contraction = len(axes) <= _MAX_AXES and any(part in operation.name for part in _CONTRACTIONS)
    words = [str(operation.target), *(_describe(leaf, axes) for leaf in leaves)]
    words += [repr(axis.values) for axis in axes]
    key = hashlib.sha256("|".join(words).encode()).hexdigest()[:32]
    return Problem(operation, axes, f"{operation.name}:{key}", contraction)


def on_one_dim(problem: Problem) -> Problem | None:
    """The same operation on tensors of one dim, if its time follows the number of entries alone; else None.

    This holds for pointwise operations whose operands have as many entries as the result, in the same order, or one.
    The steps of an optimizer are such operations, on as many shapes as there are weights.
    """
    operation, outputs = problem.operation, problem.operation.outputs
    if torch.Tag.pointwise not in operation.target.tags or len(outputs) != 1:
        return None
    result, entry = outputs[0], Size(0, ((_ENTRIES, 1),))
    leaves: list[Any] = []
    for leaf in operation.leaves:
        if isinstance(leaf, Operand):
            same = (leaf.shape, leaf.order) == (result.shape, result.order)
            if (not same and leaf.shape) or leaf.expanded:
                return None
            leaves.append(Operand((entry,) * bool(leaf.shape), (0,) * bool(leaf.shape), (), leaf.dtype))
        elif isinstance(leaf, Size):
            return None
        else:
            leaves.append(leaf)
    most = problem.num_entries(problem.dense)
    counts = [count for count in _COUNTS if count <= most or count < min(4 * most, _SMALL)] or _COUNTS[:1]
    axes = (Axis(entry, tuple(reversed(counts))),)
    out = Operand((entry,), (0,), (), result.dtype)
    words = [str(operation.target), *(_describe(leaf, axes) for leaf in (*leaves, out))]
    key = hashlib.sha256("|".join(words).encode()).hexdigest()[:32]
    flat = Operation(operation.target, tuple(leaves), operation.spec, (out,))
    return Problem(flat, axes, f"{operation.name}:entries:{key}", contraction=False, by_entries=True)


def _values(size: Size, groups: Mapping[str, Group]) -> tuple[int, ...]:
    """What a length can become when whole blocks of units go; for sums of widths, in steps of 16."""
    dense = size.at({name: group.num_units for name, group in groups.items()})
    if size.constant == 0 and len(size.parts) == 1:
        return tuple(block_widths(groups[size.parts[0][0]]))
    least = size.at({name: max(group.min_units, 1) for name, group in groups.items()})
    return tuple(dict.fromkeys([dense, *range((dense - 1) // 16 * 16, least, -16), least]))


def _describe(leaf: Any, axes: Sequence[Axis]) -> str:
    """The same text for arguments that take the same time, whatever the groups are called."""

    def length(size: Size) -> str:
        if not size.parts:
            return str(size.constant)
        unit = _unit(size)
        position = next(i for i, axis in enumerate(axes) if axis.size == unit)
        return f"{size.parts[0][1] if unit != size else 1}*axis{position}"

    if isinstance(leaf, Operand):
        return f"{[length(size) for size in leaf.shape]}{leaf.order}{leaf.expanded}{leaf.dtype}"
    if isinstance(leaf, Size):
        return length(leaf)
    return "float" if isinstance(leaf, float) else repr(leaf)
