"""A fit: seconds as a function of widths, from those of some widths, by kind of work."""

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
from jaxtyping import Float64
from torch import nn

from setpoint.cost.cost import ProductCost, Term
from setpoint.groups.trace import Trace


def by_kind(model: nn.Module, found: Trace, *, forward: bool = False) -> tuple[ProductCost, ProductCost]:
    """FLOPs of a step, or of its forward alone, but for grouped convolutions; and those of these."""
    terms: tuple[list[Term], list[Term]] = [], []
    for product in found.contractions:
        grouped = product.module and getattr(model.get_submodule(product.module), "groups", 1) != 1
        times = 1.0 if forward else product.times
        terms[bool(grouped)].append(Term(product.coefficient * times, product.sizes))
    return ProductCost("flops", tuple(terms[0])), ProductCost("flops", tuple(terms[1]))


def fit_seconds(
    resource: str, parts: Sequence[ProductCost], seconds: Sequence[tuple[Mapping[str, int], float]]
) -> ProductCost:
    """A constant and a factor for each part, from the seconds at several widths."""
    # One row for each step: what the constant and the factors are multiplied by.
    rows = np.array([[1.0, *(part.total(widths) for part in parts)] for widths, _ in seconds])
    constant_s, *factors = (
        float(value) for value in _non_negative(rows, np.array([taken_s for _, taken_s in seconds]))
    )
    return combined(resource, tuple(zip(factors, parts, strict=True)), constant_s)


def combined(resource: str, parts: Sequence[tuple[float, ProductCost]], constant: float = 0.0) -> ProductCost:
    terms = [Term(factor * term.coefficient, term.sizes) for factor, part in parts for term in part.terms]
    return ProductCost(resource, (*terms, Term(constant, ())))


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
