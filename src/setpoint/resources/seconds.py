"""Seconds and joules of one training step, or of one forward pass, as a pure function of widths.

    seconds(widths) = a + b * FLOPs(widths) + c * bytes(widths),        a, b, c >= 0,

with the bytes of all storages of the step (`Tape.moved_bytes`). The coefficients are fitted to a few whole steps of
copies on this device by least squares of relative errors. a holds what no width changes: the calls themselves, and
whatever else the step does. Joules are

    joules(widths) = watts * seconds(widths) + constant,

fitted to metered steps, or watts that the user states. Both are sums of products of widths, and what they do not tell,
such as the stairs of a kernel, meters correct in training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from jaxtyping import Float64

from setpoint.cost.cost import ProductCost, Term
from setpoint.errors import CostError

Reading = tuple[Mapping[str, int], float]
"""Widths, and what a step took there."""


@dataclass(frozen=True)
class Fit:
    """A cost fitted to measured steps, and its median relative error on a step left out; NaN where they are too few."""

    cost: ProductCost
    error: float


def fit_seconds(resource: str, flops: ProductCost, moved: ProductCost, steps: Sequence[Reading]) -> Fit:
    """Seconds of a step from measured ones, its FLOPs and the bytes that it moves."""
    # One row for each step: what a, b and c are multiplied by.
    rows = np.array([[1.0, flops.total(widths), moved.total(widths)] for widths, _ in steps])
    seconds = np.array([measured for _, measured in steps])
    constant_s, per_flop, per_byte = (float(value) for value in _non_negative(rows, seconds))
    cost = combined(resource, ((per_flop, flops), (per_byte, moved)), constant_s)
    return Fit(cost, _left_out(rows, seconds))


def fit_joules(seconds: ProductCost, steps: Sequence[Reading], source: str) -> Fit:
    """Joules of a step from metered ones."""
    joules = np.array([energy_j for _, energy_j in steps])
    if not len(joules) or not (np.isfinite(joules) & (joules > 0)).all():
        raise CostError(f"metered steps need joules above 0, got {joules.tolist()} from {source}: meter longer steps")
    rows = np.array([[1.0, seconds.total(widths)] for widths, _ in steps])
    if len(joules) < 3:  # a line through two of them says nothing of a constant
        rows[:, 0] = 0.0
    constant_j, watts = (float(value) for value in _non_negative(rows, joules))
    return Fit(combined("energy", ((watts, seconds),), constant_j), _left_out(rows, joules))


def combined(resource: str, parts: Sequence[tuple[float, ProductCost]], constant: float = 0.0) -> ProductCost:
    """A weighted sum of costs.

    >>> step = ProductCost("flops", (Term(2.0, ()),))
    >>> combined("latency", [(0.5, step)], constant=3.0).total({})
    4.0
    """
    terms = [Term(factor * term.coefficient, term.sizes) for factor, part in parts for term in part.terms]
    return ProductCost(resource, (*terms, Term(constant, ())))


def _left_out(rows: Float64[np.ndarray, "n k"], values: Float64[np.ndarray, " n"]) -> float:
    """Median relative error of each value by the fit to the others."""
    if len(values) <= rows.shape[1]:
        return float("nan")
    errors = []
    for number in range(len(values)):
        others = np.arange(len(values)) != number
        predicted = rows[number] @ _non_negative(rows[others], values[others])
        errors.append(abs(float(predicted) / values[number] - 1.0))
    return float(np.median(errors))


def _non_negative(rows: Float64[np.ndarray, "n k"], values: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " k"]:
    """Least squares of relative errors with no negative coefficient, by trying which ones are zero."""
    scaled, ones = rows / values[:, None], np.ones(len(values))
    best, lowest = np.zeros(rows.shape[1]), np.inf
    for size in range(1, rows.shape[1] + 1):
        for used in combinations(range(rows.shape[1]), size):
            # Columns are scaled, since FLOPs and bytes are many powers of ten away from a constant.
            part = scaled[:, used]
            scale = np.abs(part).max(axis=0)
            if not (scale > 0).all():  # nothing of it in any step, such as FLOPs of a model without products
                continue
            found = np.linalg.lstsq(part / scale, ones, rcond=None)[0] / scale
            error = float(((part @ found - 1.0) ** 2).sum())
            if (found >= 0).all() and error < lowest:
                best, lowest = np.zeros(rows.shape[1]), error
                best[list(used)] = found
    return best
