"""Lengths: which function of widths a number is, found from its values at several width vectors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from setpoint.controller.selection import lowest_width
from setpoint.errors import CostError
from setpoint.groups.group import Group, Size

_MAX_VECTORS = 16


def trial_widths(groups: Sequence[Group], seed: int = 0) -> list[dict[str, int]]:
    """Width vectors that tell all groups apart: as many random ones as that takes.

    Two groups are told apart if their widths do not change in proportion. Each group is cut that can be, in the first
    vector by one block: `nn.MultiheadAttention` takes another way through PyTorch once it is cut.

    >>> [len(trial_widths((Group("a", "unit", 8, ()), Group("b", "unit", 8, ()))))]
    [4]
    """
    generator = np.random.default_rng(seed)
    reach = {group.name: _reach(group) for group in groups}
    reach = {name: widths[1:] if len(widths) > 2 else widths for name, widths in reach.items()}
    vectors = [{name: widths[0] for name, widths in reach.items()}]
    while len(vectors) < 4 or (len(vectors) < _MAX_VECTORS and not _told_apart(reach, vectors)):
        vectors.append({name: int(generator.choice(widths)) for name, widths in reach.items()})
    return vectors


def falling_widths(groups: Sequence[Group]) -> list[dict[str, int]]:
    """Width vectors at which steps take very different times: dense, then ever narrower, down to the fewest units."""
    shares = (1.0, 0.75, 0.5, 0.25)
    vectors = [
        {group.name: min(_reach(group), key=lambda width: abs(width - share * group.num_units)) for group in groups}
        for share in shares
    ]
    return [*vectors, {group.name: lowest_width(group) for group in groups}]


def _reach(group: Group) -> list[int]:
    """Widths that whole blocks reach, at least 2 where that is possible, or as it is.

    At a width of 1 a dim passes by broadcasting, and modules take other ways, as one key/value head of two does. So a
    group of two units saves nothing by prediction, and meters see what it does save.
    """
    block, floor = group.multiple_of, max(group.min_units, 1)
    widths = [group.num_units, *range((group.num_units - 1) // block * block, floor - 1, -block)]
    return [width for width in widths if width > 1] or widths


def _told_apart(reach: Mapping[str, Sequence[int]], vectors: Sequence[Mapping[str, int]]) -> bool:
    """Whether each group that can change does so, and no two in proportion."""
    movable = [_direction([vector[name] for vector in vectors])[0] for name, found in reach.items() if len(found) > 1]
    return all(map(any, movable)) and len(set(movable)) == len(movable)


def _direction(values: Sequence[int]) -> tuple[tuple[int, ...], int]:
    """How the values change from the first one on: a primitive vector, and its factor."""
    changes = [value - values[0] for value in values[1:]]
    factor = math.gcd(*changes) or 1
    leading = next((change for change in changes if change), 1)
    factor = factor if leading > 0 else -factor
    return tuple(change // factor for change in changes), factor


class Lengths:
    """Finds the `Size` behind a number that was seen at several width vectors.

    A number that changes in proportion to the width of one group follows that group, `constant + per_unit * width`.
    Sums over several groups are learnt where they are made, by `learn`.

    >>> lengths = Lengths([{"a": 8, "b": 8}, {"a": 4, "b": 6}, {"a": 2, "b": 7}])
    >>> lengths.size((24, 12, 6)), lengths.size((5, 5, 5))
    (Size(constant=0, parts=(('a', 3),)), Size(constant=5, parts=()))
    """

    def __init__(self, vectors: Sequence[Mapping[str, int]]) -> None:
        self._vectors = vectors
        self._known: dict[tuple[int, ...], Size | None] = {}
        self._by_direction: dict[tuple[int, ...], tuple[str, int, int]] = {}
        for name, width in vectors[0].items():
            direction, factor = _direction([vector[name] for vector in vectors])
            self._by_direction.setdefault(direction, (name, factor, width))

    def size(self, values: tuple[int, ...]) -> Size | None:
        """The size with these values at the vectors, or None if it is of no known form."""
        if values not in self._known:
            self._known[values] = self._find(values)
        return self._known[values]

    def learn(self, pieces: Sequence[Size]) -> None:
        """A length that is the sum of these may occur from here on."""
        parts: dict[str, int] = {}
        for piece in pieces:
            for name, per_unit in piece.parts:
                parts[name] = parts.get(name, 0) + per_unit
        total = Size(sum(piece.constant for piece in pieces), tuple(sorted(parts.items())))
        values = tuple(total.at(vector) for vector in self._vectors)
        known = self.size(values)
        if known is None:
            self._known[values] = total
        elif known != total:
            raise CostError(f"the trial widths do not tell {total} from {known}")

    def _find(self, values: tuple[int, ...]) -> Size | None:
        if len(set(values)) == 1:
            return Size(values[0])
        direction, factor = _direction(values)
        if direction not in self._by_direction:
            return None
        name, of_group, width = self._by_direction[direction]
        if factor % of_group or factor // of_group <= 0:
            return None
        per_unit = factor // of_group
        return Size(values[0] - per_unit * width, ((name, per_unit),))
