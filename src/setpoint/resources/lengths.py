"""Lengths: which function of widths a number is, found from its values at several width vectors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from setpoint.errors import CostError
from setpoint.groups.group import Group, Size

_MAX_VECTORS, _DRAWS = 16, 100
# The same where groups have few units: more widths are in these bands.
_CLOSE = ((0.75, 0.95), (0.5, 0.75), (0.3, 0.5), (0.15, 0.3))
# Densities of the groups where a step is recorded: it is quicker there than near the dense widths.
_LOW = ((0.4, 0.6), (0.28, 0.4), (0.18, 0.28), (0.1, 0.18))
# Where a step is timed: far apart, so that seconds differ.
_FROM_DENSE = ((1.0, 1.0), (0.6, 0.9), (0.35, 0.6), (0.15, 0.35))


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


def narrowing_widths(groups: Sequence[Group], *, dense: bool) -> tuple[list[dict[str, int]], bool]:
    """Four width vectors, each nowhere wider than those before; and whether they tell all groups apart.

    Each group has densities of its own, so that products of widths do not shrink in proportion. Groups of few units, as
    heads are, may be too many to be told apart. The dense widths come first with `dense`, or where narrower ones do not
    tell the groups apart.
    """
    reach = {group.name: _reach(group) for group in groups}
    for bands in (_FROM_DENSE,) if dense else (_LOW, _CLOSE, _FROM_DENSE):
        vectors = _vectors(reach, bands)
        if apart := _told_apart(reach, vectors):
            break
    return vectors, apart


def _vectors(reach: Mapping[str, Sequence[int]], bands: Sequence[tuple[float, float]]) -> list[dict[str, int]]:
    """A width vector for each band of densities."""
    generator, seen = np.random.default_rng(0), set[tuple[int, ...]]()
    columns = dict[str, list[int]]()
    for name, widths in reach.items():
        for _ in range(_DRAWS):
            wanted = widths[0] * np.array([generator.uniform(*band) for band in bands])
            columns[name] = [_nearest(widths, near) for near in wanted]
            direction = _direction(columns[name])[0]
            if len(widths) == 1 or (any(direction) and direction not in seen):  # else drawn again
                break
        seen.add(direction)
    return [{name: column[row] for name, column in columns.items()} for row in range(len(bands))]


def _nearest(widths: Sequence[int], wanted: float) -> int:
    return min(widths, key=lambda width: abs(width - wanted))


def _reach(group: Group) -> list[int]:
    """Widths that whole blocks reach, at least 2 where that is possible: at 1 a dim passes by broadcasting."""
    block, floor = group.multiple_of, max(group.min_units, 1)
    widths = [group.num_units, *range((group.num_units - 1) // block * block, floor - 1, -block)]
    above_one = [width for width in widths if width > 1]
    return above_one if len(above_one) > 1 else widths


def held_at_two(groups: Sequence[Group]) -> tuple[Group, ...]:
    """The groups, with those held as they are that can become narrower only to a width of 1.

    A tensor with one unit along a dim may need no copy where one with two does, as with one key/value head of two.
    """
    return tuple(replace(group, min_units=group.num_units) if _reach(group)[1:] == [1] else group for group in groups)


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
