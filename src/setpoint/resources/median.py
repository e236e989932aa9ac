"""A median of repeated measurements, and how sure it is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Measured:
    """A median of repeated measurements, and how sure it is.

    Args:
        least: the smallest of them: of seconds, what it takes with nothing else on the machine.
    """

    value: float
    low: float
    high: float
    count: int
    least: float


def median_of(values: Sequence[float]) -> Measured:
    """The median with its 95 % interval, which holds for any distribution.

    The number of n values that lie below the true median is binomial with probability 1/2, so the
    order statistics `n/2 -+ 1.96 sqrt(n)/2` enclose it. Below six values they are the extremes.

    >>> median_of([1.0, 2.0, 3.0, 4.0, 100.0])
    Measured(value=3.0, low=1.0, high=100.0, count=5, least=1.0)
    """
    ordered = sorted(values)
    count = len(ordered)
    reach = 1.96 * math.sqrt(count) / 2
    low = max(0, math.floor(count / 2 - reach))
    return Measured(statistics.median(ordered), ordered[low], ordered[count - 1 - low], count, ordered[0])
