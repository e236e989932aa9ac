"""A curve: seconds of one operation as a function of the lengths that it follows, between measured points."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, product

import numpy as np

from setpoint.resources.problem import Axis, Problem

Point = tuple[int, ...]
"""A value for each axis."""

_FRACTIONS = (1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125)
_COARSE = (1.0, 0.5, 0.2)
_CROSSINGS = (0.5, 0.2)
_LIKED = 16
"""Lengths that hardware likes are multiples of this; one between two of them lies on a stair."""


def points(problem: Problem, *, coarse: bool) -> list[Point]:
    """Where a problem is to be measured.

    A contraction is measured along each axis with the others dense, at multiples of 16 and at some values
    between them, and at a few places where two axes are small together. Anything else is measured on the
    diagonal only, because its time follows the bytes.
    """
    if problem.by_entries:
        return [(count,) for count in problem.axes[0].values]
    dense = problem.dense
    fractions = _COARSE if coarse else _FRACTIONS
    found = [dense]
    if not problem.contraction:
        steps = (1.0, 0.5, 0.25, 0.1) if not coarse else (1.0, 0.3)
        found += [tuple(_nearest(axis, f * axis.values[0]) for axis in problem.axes) for f in steps]
        found.append(tuple(min(axis.values) for axis in problem.axes))
    else:
        for place, axis in enumerate(problem.axes):
            found += [(*dense[:place], value, *dense[place + 1 :]) for value in _profile(axis, fractions)]
        for (i, one), (j, other) in combinations(enumerate(problem.axes), 2):
            for f, g in product(_CROSSINGS, _CROSSINGS):
                values = {i: _nearest(one, f * one.values[0]), j: _nearest(other, g * other.values[0])}
                found.append(tuple(values.get(k, value) for k, value in enumerate(dense)))
    return list(dict.fromkeys(found))


def _profile(axis: Axis, fractions: Sequence[float]) -> list[int]:
    """Values along one axis: all if they are few, else liked ones at these fractions, and neighbours of some."""
    if len(axis.values) <= len(fractions) + 2:
        return list(axis.values)
    dense = axis.values[0]
    aligned = Axis(axis.size, tuple(value for value in axis.values if value % _LIKED == 0) or axis.values)
    found = [_nearest(aligned, fraction * dense) for fraction in fractions] + [axis.values[-1]]
    beside = [value for value in axis.values if value % _LIKED]
    if beside:
        odd = Axis(axis.size, tuple(beside))
        found += [_nearest(odd, fraction * dense) for fraction in (0.9, 0.5, 0.25)]
    return found


def _nearest(axis: Axis, value: float) -> int:
    return min(axis.values, key=lambda each: (abs(each - value), each))


@dataclass(frozen=True, eq=False)
class Curve:
    """Seconds between measured points.

    For a contraction of axes `a, b, ...`, with `T_a` the profile along `a` while the others are dense,

        T(a, b) = T_a(a) T_b(b) / T(dense) * C(a, b)

    where C is 1 where an axis is dense, and what was measured over the product of profiles where both are
    small. Profiles are linear between multiples of 16. A value between those lies above the line by a share of
    the way to the next multiple: 0 where time follows the length, 1 on a full stair, as the measured ones say.
    Anything else is linear in the bytes moved.

    Args:
        flat: the curve of the same operation on one dim, which stands for this one; then `seconds` is empty.
    """

    problem: Problem
    seconds: Mapping[Point, float]
    flat: Curve | None = None

    def at(self, values: Point) -> float:
        """Seconds at these values of the axes."""
        if self.flat is not None:
            return self.flat.at((self.problem.num_entries(values),))
        exact = self.seconds.get(values)
        if exact is not None:
            return exact
        if not self.problem.contraction:
            moved, times = self._seconds_by_bytes
            here = self.problem.num_bytes(values)
            return float(times[-1] * here / moved[-1] if here > moved[-1] else np.interp(here, moved, times))
        dense = self.problem.dense
        base = self.seconds[dense]
        relative = [self._along(place, value) / base for place, value in enumerate(values)]
        crossing = 1.0
        for (i, j), (x, y, grid) in self._crossings.items():  # bilinear between its measured places
            rows = [np.interp(values[j] / dense[j], y, row) for row in grid]
            crossing *= float(np.interp(values[i] / dense[i], x, rows))
        return base * float(np.prod(relative)) * crossing

    @cached_property
    def _seconds_by_bytes(self) -> tuple[np.ndarray, np.ndarray]:
        known = sorted((self.problem.num_bytes(point), seconds) for point, seconds in self.seconds.items())
        x, y = np.array(known).T
        return x, y

    def _along(self, place: int, value: int) -> float:
        known, line, stair = self._profiles[place]
        if value in known:
            return known[value]
        low = _linear(line, value)
        return low + stair * (_linear(line, _upper(value, max(line))) - low)

    @cached_property
    def _profiles(self) -> list[tuple[dict[int, float], dict[int, float], float]]:
        """Along each axis: what was measured, the aligned part of it, and how high its stairs are."""
        dense, found = self.problem.dense, []
        for place, full in enumerate(dense):
            known = {p[place]: s for p, s in self.seconds.items() if _without(p, place) == _without(dense, place)}
            line = {v: s for v, s in known.items() if v % _LIKED == 0 or v == full}
            line = line if len(line) > 1 else known
            beside = {v: _linear(line, v) for v in known if v not in line and v > min(line)}
            steps = [(known[v] - low, _linear(line, _upper(v, full)) - low) for v, low in beside.items()]
            stairs = [rise / whole for rise, whole in steps if whole > 0]
            found.append((known, line, min(max(statistics.median(stairs), 0.0), 3.0) if stairs else 0.0))
        return found

    @cached_property
    def _crossings(self) -> dict[tuple[int, int], tuple[list[float], list[float], np.ndarray]]:
        """By pair of axes: fractions along the first, along the second, and C there."""
        dense, found = self.problem.dense, {}
        for i, j in combinations(range(len(dense)), 2):
            places: dict[tuple[float, float], float] = {}
            for point, seconds in self.seconds.items():
                if all((k in (i, j)) == (v != d) for k, (v, d) in enumerate(zip(point, dense, strict=True))):
                    expected = self._along(i, point[i]) * self._along(j, point[j]) / self.seconds[dense]
                    places[point[i] / dense[i], point[j] / dense[j]] = seconds / expected
            if len(places) == len(_CROSSINGS) ** 2:
                x, y = (sorted({place[k] for place in places} | {1.0}) for k in (0, 1))
                found[i, j] = x, y, np.array([[places.get((a, b), 1.0) for b in y] for a in x])
        return found


def _upper(value: int, most: int) -> int:
    """The value that hardware pads this one to."""
    return min(-(-value // _LIKED) * _LIKED, most) if value < most else value


def _without(point: Point, place: int) -> Point:
    return (*point[:place], *point[place + 1 :])


def _linear(known: Mapping[int, float], value: int) -> float:
    """Linear between known values; beyond the ends, the line of the last two, never below half of the end."""
    x = sorted(known)
    y = [known[each] for each in x]
    if x[0] <= value <= x[-1] or len(x) == 1:
        return float(np.interp(value, x, y))
    (a, b), (s, t) = ((x[0], x[1]), (y[0], y[1])) if value < x[0] else ((x[-2], x[-1]), (y[-2], y[-1]))
    return max(s + (t - s) * (value - a) / (b - a), min(s, t) / 2)
