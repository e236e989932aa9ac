"""Seconds of one training step, or of one forward pass, on this device, as a pure function of widths.

Every operation of the step is timed alone, once, at the lengths that can occur (`Table`), and whole
steps at a few widths tie the sum to what a step really takes:

    total(widths) = a * (seconds of matrix products and convolutions)
                  + b * (seconds of everything else) + c,

with a, b, c >= 0 fitted to the whole steps by least squares of relative errors. c holds what no width
changes: the calls themselves, and whatever else the step does.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np

from setpoint.groups.group import Group, Size
from setpoint.resources.curve import Curve
from setpoint.resources.problem import Problem, pose
from setpoint.resources.table import Table, seconds_per_byte
from setpoint.resources.tape import Tape


@dataclass(frozen=True)
class Fit:
    """How whole steps follow from operations timed alone.

    Args:
        contractions: factor a of matrix products and convolutions.
        others: factor b of everything else.
        constant_s: c, in seconds.
        error: median relative error over steps that the fit did not see; NaN if there were none.
    """

    contractions: float = 1.0
    others: float = 1.0
    constant_s: float = 0.0
    error: float = float("nan")


@dataclass(frozen=True, eq=False)
class _Bundle:
    sizes: tuple[Size, ...]
    groups: frozenset[str]
    curves: list[tuple[Curve, int]]


class LatencyCost:
    """Seconds of one training step ("latency"), or of one forward pass ("inference")."""

    def __init__(
        self,
        tape: Tape,
        groups: Sequence[Group],
        table: Table,
        fit: Fit | None = None,
        resource: Literal["latency", "inference"] = "latency",
    ) -> None:
        self.resource: str = resource
        by_name = {group.name: group for group in groups}
        problems = [pose(operation, by_name) for operation in tape.operations]
        curves = table.time(problems)
        timed = [curve for curve in curves.values() if curve is not None]
        self.untimed = tuple(sorted({p.operation.name for p in problems if curves[p.key] is None}))
        rate = seconds_per_byte(timed)
        chosen: dict[str, Curve] = {}
        bundles: dict[tuple[Size, ...], Counter[str]] = {}
        for problem in problems:
            chosen.setdefault(problem.key, curves[problem.key] or _by_rate(problem, rate))
            bundles.setdefault(tuple(axis.size for axis in problem.axes), Counter())[problem.key] += 1
        self._bundles = []
        for sizes, counts in bundles.items():
            names = frozenset(name for size in sizes for name, _ in size.parts)
            self._bundles.append(_Bundle(sizes, names, [(chosen[key], count) for key, count in counts.items()]))
        self._memo: dict[tuple[int, tuple[int, ...]], tuple[float, float]] = {}
        self.fit = fit or Fit()
        self.key = hashlib.sha256(repr(sorted(p.key for p in problems)).encode()).hexdigest()[:32]

    def fitted(self, fit: Fit) -> LatencyCost:
        """The same operations under another fit."""
        other: LatencyCost = object.__new__(LatencyCost)
        other.__dict__.update(self.__dict__, fit=fit)
        return other

    def parts(self, widths: Mapping[str, int]) -> tuple[float, float]:
        """Seconds of the operations timed alone: contractions, and everything else."""
        found = [self._seconds(number, widths) for number in range(len(self._bundles))]
        return sum(part[0] for part in found), sum(part[1] for part in found)

    def total(self, widths: Mapping[str, int]) -> float:
        """Seconds of a step at these widths."""
        contractions, others = self.parts(widths)
        return self.fit.contractions * contractions + self.fit.others * others + self.fit.constant_s

    def saving(self, widths: Mapping[str, int], group: str, num_units: int) -> float:
        """`total(widths) - total(widths with num_units fewer units in group)`."""
        fewer = {**widths, group: widths[group] - num_units}
        saved = 0.0
        for number, bundle in enumerate(self._bundles):
            if group in bundle.groups:
                before, after = self._seconds(number, widths), self._seconds(number, fewer)
                saved += self.fit.contractions * (before[0] - after[0]) + self.fit.others * (before[1] - after[1])
        return saved

    def _seconds(self, number: int, widths: Mapping[str, int]) -> tuple[float, float]:
        bundle = self._bundles[number]
        values = tuple(size.at(widths) for size in bundle.sizes)
        if (number, values) not in self._memo:
            sums = [0.0, 0.0]
            for curve, count in bundle.curves:
                # A group of no units leaves nothing to compute.
                sums[not curve.problem.contraction] += 0.0 if 0 in values else count * curve.at(values)
            self._memo[number, values] = (sums[0], sums[1])
        return self._memo[number, values]


def _by_rate(problem: Problem, rate: float) -> Curve:
    """A curve for an operation that could not be timed: its bytes at the usual rate."""
    plain = Problem(problem.operation, problem.axes, problem.key, contraction=False)
    return Curve(plain, {problem.dense: max(rate * problem.num_bytes(problem.dense), 1e-9)})


def fit_steps(cost: LatencyCost, steps: Sequence[tuple[Mapping[str, int], float]]) -> Fit:
    """The fit to measured whole steps, with its error on steps left out one by one."""
    rows = np.array([[*cost.parts(widths), 1.0] for widths, _ in steps])
    seconds = np.array([measured for _, measured in steps])
    errors = []
    for left_out in range(len(steps) if len(steps) > 3 else 0):
        rest = np.arange(len(steps)) != left_out
        predicted = rows[left_out] @ _non_negative(rows[rest], seconds[rest])
        errors.append(abs(float(predicted) / seconds[left_out] - 1.0))
    a, b, c = (float(value) for value in _non_negative(rows, seconds))
    return Fit(a, b, c, float(np.median(errors)) if errors else float("nan"))


def _non_negative(rows: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Least squares of relative errors with no negative coefficient, by trying which ones are zero."""
    scaled, ones = rows / seconds[:, None], np.ones(len(seconds))
    best, least = np.zeros(rows.shape[1]), np.inf
    for size in range(1, rows.shape[1] + 1):
        for used in combinations(range(rows.shape[1]), size):
            part = np.linalg.lstsq(scaled[:, used], ones, rcond=None)[0]
            error = float(((scaled[:, used] @ part - 1.0) ** 2).sum())
            if (part >= 0).all() and error < least:
                best, least = np.zeros(rows.shape[1]), error
                best[list(used)] = part
    return best
