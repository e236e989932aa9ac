"""Sizing: the widths at which a model built from scratch meets a FLOPs budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache, partial

import torch

from setpoint_bench.counter import step_flops
from setpoint_bench.simple_task import SimpleTask, dense_widths
from setpoint_bench.task import BenchError, Dimension


@cache
def small_widths(task: SimpleTask, budget: float) -> dict[str, int]:
    """Widths of the task's model scaled by one factor to at most `budget` of the dense FLOPs per step.

    Raises:
        BenchError: even the narrowest model costs more; the message says what share of the dense one.
    """
    example = task.example()

    def cost(widths: Mapping[str, int]) -> float:
        return float(step_flops(task.build(widths, torch.device("meta")), example))

    dense, least = cost(dense_widths(task)), cost(scaled_widths(task.dimensions, 0.0))
    if least > budget * dense:
        raise BenchError(
            f"no model of {task.name} meets a budget of {budget:g}: the narrowest costs "
            f"{math.ceil(1e4 * least / dense) / 1e4:g} of the dense one; ask for at least that budget"
        )
    return fit_widths(task.dimensions, cost, budget * dense)


def scaled_widths(dimensions: Mapping[str, Dimension], factor: float) -> dict[str, int]:
    """Every width scaled by a factor, rounded down to whole blocks, of which one at least is left."""
    return {
        name: min(d.dense, max(1, int(d.dense * factor / d.multiple_of)) * d.multiple_of)
        for name, d in dimensions.items()
    }


def fit_widths(
    dimensions: Mapping[str, Dimension], cost: Callable[[Mapping[str, int]], float], limit: float
) -> dict[str, int]:
    """The widest uniformly scaled model within the limit, filled up block by block.

    Bisection finds the largest common factor that fits, widths rounded down to whole blocks; then the
    width furthest below its dense share grows by one block, as long as any still fits.

    Raises:
        BenchError: even one block of each costs more than the limit.

    >>> fit_widths({"a": Dimension(100), "b": Dimension(10)}, lambda w: w["a"] * w["b"], 500)
    {'a': 71, 'b': 7}
    """
    scaled = partial(scaled_widths, dimensions)
    if cost(scaled(0.0)) > limit:
        raise BenchError(f"the narrowest model costs {cost(scaled(0.0)):.4g}, over the limit of {limit:.4g}")
    low, high = 0.0, 1.0
    if cost(scaled(high)) <= limit:
        return scaled(high)
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(scaled(middle)) <= limit else (low, middle)
    return _filled(scaled(low), dimensions, cost, limit)


def _filled(
    widths: dict[str, int],
    dimensions: Mapping[str, Dimension],
    cost: Callable[[Mapping[str, int]], float],
    limit: float,
) -> dict[str, int]:
    """Widths grown by single blocks, narrowest share first, until none fits."""
    open_names = set(dimensions)
    while open_names:
        name = min(sorted(open_names), key=lambda n: widths[n] / dimensions[n].dense)
        dimension = dimensions[name]
        wider = {**widths, name: widths[name] + dimension.multiple_of}
        if wider[name] <= dimension.dense and cost(wider) <= limit:
            widths = wider
        else:
            open_names.remove(name)
    return widths
