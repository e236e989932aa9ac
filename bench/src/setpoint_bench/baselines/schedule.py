"""Schedules: how a density comes down, and how a share of dropped and grown weights fades, over a run."""

from __future__ import annotations

import math


def cubic_density(progress: float, *, final: float, start: float = 1.0) -> float:
    """Density on the way down: fast at first, when there is much to spare, and slower and slower.

    `density = final + (start - final) * (1 - progress)^3`; in terms of sparsity this is equation 1 of the paper.

    Args:
        progress: share of the ramp that is done; values outside [0, 1] count as the nearer end.
        final: density at the end.
        start: density at the beginning.

    References:
        Zhu, Gupta: "To prune, or not to prune: exploring the efficacy of pruning for model compression",
        ICLR workshop 2018.

    >>> [round(cubic_density(p, final=0.2), 4) for p in (0.0, 0.5, 1.0)]
    [1.0, 0.3, 0.2]
    """
    left = 1.0 - min(max(progress, 0.0), 1.0)
    return final + (start - final) * left**3


def cosine_fraction(step: int, end: int, initial: float) -> float:
    """Share of the active weights that one update drops and grows: `initial / 2 * (1 + cos(pi * step / end))`, then 0.

    Args:
        step: optimizer steps done.
        end: step from which nothing is dropped and grown any more.
        initial: share at step 0.

    References:
        Evci, Gale, Menick, Castro, Elsen: "Rigging the Lottery: Making All Tickets Winners", ICML 2020, section 3.

    >>> [round(cosine_fraction(step, 100, 0.3), 4) for step in (0, 50, 100, 200)]
    [0.3, 0.15, 0.0, 0.0]
    """
    if step >= end:
        return 0.0
    return initial / 2 * (1 + math.cos(math.pi * step / end))
