"""Names: those that differ in their numbers only, written as one."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

ROLES = {"produce": "writes", "carry": "passes on", "consume": "reads"}
"""What a tensor does with its units, in words."""
_NUMBER = re.compile(r"\d+")


def skeleton(name: str) -> str:
    """A name without its numbers.

    >>> skeleton("layer1.0.conv2")
    'layer#.#.conv#'
    """
    return _NUMBER.sub("#", name)


def fold(names: Iterable[str]) -> tuple[str, ...]:
    """The same names in fewer words: exactly these and no other.

    >>> fold(["h.0.mlp", "h.1.mlp", "h.2.mlp", "head"])
    ('h.{0..2}.mlp', 'head')
    >>> fold(["a.0.0", "a.0.1", "a.1.0"])
    ('a.0.{0,1}', 'a.1.0')
    """
    alike: dict[str, list[tuple[str, ...]]] = {}
    for name in dict.fromkeys(names):
        alike.setdefault(skeleton(name), []).append(tuple(_NUMBER.findall(name)))
    return tuple(each for form, rows in alike.items() for each in _folded(form, rows))


def some(names: Iterable[str], most: int = 2) -> str:
    """The first of them, folded, and how many more there are.

    >>> some(["no weight", "no dim", "tied"])
    'no weight; no dim; and 1 more'
    """
    folded = fold(names)
    return "; ".join(folded[:most]) + (f"; and {len(folded) - most} more" if len(folded) > most else "")


def along(tensor: str, dim: int | None, role: str) -> str:
    """A place of a group in words."""
    return f"{tensor}, {'every element' if dim is None else f'dim {dim}'}, {ROLES.get(role, role)}"


def _folded(form: str, rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Names of one form: one word if their numbers are a full grid, else one for each first number that differs."""
    columns = [sorted(set(column), key=lambda number: (int(number), number)) for column in zip(*rows, strict=True)]
    if math.prod(map(len, columns)) == len(rows):
        written = iter(columns)
        return [re.sub("#", lambda _: _span(next(written)), form)]
    first = next(place for place, column in enumerate(columns) if len(column) > 1)
    return [
        word
        for number in columns[first]
        for word in _folded(form, [numbers for numbers in rows if numbers[first] == number])
    ]


def _span(numbers: Sequence[str]) -> str:
    if len(numbers) == 1:
        return numbers[0]
    if len(numbers) > 2 and [str(int(numbers[0]) + step) for step in range(len(numbers))] == list(numbers):
        return f"{{{numbers[0]}..{numbers[-1]}}}"
    return f"{{{','.join(numbers)}}}"
