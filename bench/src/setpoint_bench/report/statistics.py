"""Statistics over seeds: means with their deviation, and paired differences with confidence intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from setpoint_bench.report.results import Cell

CONFIDENCE = 0.95
FEWEST_FOR_AN_INTERVAL = 3


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and its sample standard deviation, None for a single seed."""

    mean: float
    deviation: float | None = None


@dataclass(frozen=True)
class Share:
    """A share that was measured in rounds: median, minimum and maximum over them.

    Minimum and maximum of five rounds hold the true median with a probability of 94 % if rounds are independent;
    a machine that changes its pace for minutes makes them less so.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """A metric minus a rival's, as a mean over the seeds that both have.

    The interval is `mean +- t s / sqrt(n)`, with s the sample standard deviation of the n differences and t
    the quantile of Student's distribution with n - 1 degrees of freedom.

    Args:
        mean: of the differences; between the means where no seed is common.
        num: number of paired seeds; 0 where none is common.
        deviation: sample standard deviation of the differences; None for fewer than two.
        low, high: ends of the 95 % interval; None for fewer than three.
    """

    mean: float
    num: int
    deviation: float | None = None
    low: float | None = None
    high: float | None = None

    @property
    def clear(self) -> bool:
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def share_of(parts: Sequence[float], wholes: Sequence[float]) -> Share | None:
    """Part / whole, round by round; of the medians where rounds do not pair up; None without rounds.

    >>> share_of([1.0, 2.0, 3.3], [2.0, 4.0, 6.0])
    Share(value=0.5, low=0.5, high=0.5499999999999999)
    """
    if parts and wholes and len(parts) != len(wholes):
        parts, wholes = [statistics.median(parts)], [statistics.median(wholes)]
    found = [part / whole for part, whole in zip(parts, wholes, strict=False) if whole]
    return Share(statistics.median(found), min(found), max(found)) if found else None


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are known, None if none is."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def estimate(values: Sequence[float]) -> Estimate | None:
    """Mean and sample standard deviation, None without values."""
    if not values:
        return None
    return Estimate(statistics.fmean(values), _deviation(values) if len(values) > 1 else None)


def _deviation(values: Sequence[float]) -> float:
    """Of at least two values; NaN where a run diverged, at which `statistics.stdev` raises an AttributeError."""
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


def difference(
    cells: Sequence[Cell], rivals: Sequence[Cell], of: Callable[[Cell], float | None] = lambda cell: cell.value
) -> Difference | None:
    """The paired difference of a number of each run, by default the metric, one run a seed; None without numbers."""
    ours, theirs = _by_seed(cells, of), _by_seed(rivals, of)
    if not ours or not theirs:
        return None
    pairs = [value - theirs[seed] for seed, value in ours.items() if seed in theirs]
    if not pairs:
        return Difference(statistics.fmean(ours.values()) - statistics.fmean(theirs.values()), 0)
    return paired(pairs)


def paired(pairs: Sequence[float]) -> Difference:
    """The mean of differences, one a seed and at least one, with its interval.

    >>> found = paired([0.1, 0.2, 0.3])
    >>> round(found.mean, 3), round(found.low, 3), round(found.high, 3)
    (0.2, -0.048, 0.448)
    """
    middle, num = statistics.fmean(pairs), len(pairs)
    if num == 1:
        return Difference(middle, 1)
    deviation = _deviation(pairs)
    if num < FEWEST_FOR_AN_INTERVAL:
        return Difference(middle, num, deviation)
    half = half_interval(deviation, num)
    return Difference(middle, num, deviation, middle - half, middle + half)


def half_interval(deviation: float, num: int) -> float:
    """Half of the 95 % interval of a mean of `num` values, by Student's t."""
    return t_quantile((1 + CONFIDENCE) / 2, num - 1) * deviation / math.sqrt(num)


def _by_seed(cells: Sequence[Cell], of: Callable[[Cell], float | None]) -> dict[int | None, float]:
    return {cell.seed: value for cell in cells if (value := of(cell)) is not None}


@cache
def t_quantile(share: float, freedom: int) -> float:
    """The value that Student's t stays below with this probability.

    `share` is the probability, in (0.5, 1), and f >= 1 the degrees of freedom. With `t = sqrt(f) tan(a)` the density is
    proportional to `cos(a)^(f - 1)`, which is integrated by the trapezoidal rule and inverted.

    >>> round(t_quantile(0.975, 4), 3), round(t_quantile(0.975, 9), 3)
    (2.776, 2.262)
    """
    angle = np.linspace(0.0, math.pi / 2, 20_001)
    density = np.cos(angle) ** (freedom - 1)
    area = np.concatenate(([0.0], np.cumsum(density[1:] + density[:-1])))
    return math.sqrt(freedom) * math.tan(float(np.interp(2 * share - 1, area / area[-1], angle)))
