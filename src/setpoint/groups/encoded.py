"""Encoded: groups in JSON's own kinds, and groups out of them, for the cache."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from setpoint.groups.group import Group, Size, SizeBinding, Slice
from setpoint.groups.place import is_call, read_size

_MOST_ENTRIES = 2**28


def encode_groups(groups: Sequence[Group]) -> list[Any]:
    """Groups as lists of numbers and texts.

    >>> from setpoint.groups.group import Slice
    >>> group = Group("a", "unit", 2, (Slice("weight", 0, "produce", np.arange(2)),))
    >>> (again,) = decode_groups(encode_groups([group]), nn.Linear(3, 2))
    >>> again.name, again.slices[0].tensor, again.slices[0].index
    ('a', 'weight', array([0, 1]))
    """
    return [
        [
            *(each.name, each.kind, *map(int, (each.num_units, each.min_units, each.multiple_of))),
            *(each.only_blocks, each.lossless, each.what, list(each.notes)),
            [[part.tensor, part.dim, part.role, part.masked, _encode(part.index)] for part in each.slices],
            [[size.module, size.place, _encode(size.index)] for size in each.sizes],
        ]
        for each in groups
    ]


def decode_groups(facts: list[Any], model: nn.Module) -> tuple[Group, ...]:
    """The groups that were encoded.

    Raises:
        ValueError: where these are no groups, or not of this model.
    """
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    groups = []
    for name, kind, num_units, least, block, only, lossless, what, notes, slices, sizes in facts:
        parts = tuple(Slice(at, dim, role, _decode(index), masked) for at, dim, role, masked, index in slices)
        places = tuple(SizeBinding(module, place, _decode(index)) for module, place, index in sizes)
        for part in parts:
            length = -1 if part.dim is None else tensors[part.tensor].shape[part.dim]
            if length != len(part.index) or part.index.max() >= num_units:
                raise ValueError(f"{part.tensor} is not as it was")
        for each in places:
            if not is_call(each.place) and read_size(model.get_submodule(each.module), each.place) != len(each.index):
                raise ValueError(f"{each.module}.{each.place} is not as it was")
        groups.append(
            Group(name, kind, num_units, parts, places, least, block, only, lossless, what, tuple(map(str, notes)))
        )
    return tuple(groups)


def encode_size(size: Size) -> list[Any]:
    """A size as a list.

    >>> decode_size(encode_size(Size(3, (("a", 2),))))
    Size(constant=3, parts=(('a', 2),))
    """
    return [size.constant, [list(part) for part in size.parts]]


def decode_size(facts: list[Any]) -> Size:
    """The size that was encoded."""
    constant, parts = facts
    return Size(int(constant), tuple((str(name), int(number)) for name, number in parts))


def _encode(index: np.ndarray) -> list[Any]:
    plain = np.ascontiguousarray(index, dtype=np.int64)
    return [len(plain), base64.b64encode(zlib.compress(plain.tobytes(), 1)).decode()]


def _decode(facts: list[Any]) -> np.ndarray:
    length, text = facts
    if not 0 <= length <= _MOST_ENTRIES:
        raise ValueError(f"{length} is no length")
    unpacked = zlib.decompressobj().decompress(base64.b64decode(text, validate=True), 8 * length + 1)
    if len(unpacked) != 8 * length:
        raise ValueError("an index has another length than it says")
    return np.frombuffer(unpacked, dtype=np.int64).copy()
