"""A cost: what the model spends, as a pure function of its groups' widths."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from setpoint.groups.group import Size


@runtime_checkable
class Cost(Protocol):
    """Predicts spending at any widths, so that a controller can ask "what if"."""

    @property
    def resource(self) -> str:
        """Name of the resource: "flops", "params", ..."""

    def total(self, widths: Mapping[str, int]) -> float:
        """Spending at these widths, in the resource's own unit."""

    def saving(self, widths: Mapping[str, int], group: str, num_units: int) -> float:
        """`total(widths) - total(widths with num_units fewer units in group)`."""


@dataclass(frozen=True)
class Term:
    """One product of a cost: `coefficient * prod(size.at(widths) for size in sizes)`."""

    coefficient: float
    sizes: tuple[Size, ...]

    def at(self, widths: Mapping[str, int]) -> float:
        """Value of the term at these widths."""
        return self.coefficient * math.prod([size.at(widths) for size in self.sizes])


class ProductCost:
    """A cost that is a sum of products of widths: FLOPs and parameters are of this form.

    Args:
        terms: the products; like terms are merged, so evaluation takes microseconds.
    """

    def __init__(self, resource: str, terms: tuple[Term, ...]) -> None:
        self.resource = resource
        merged: dict[tuple[Size, ...], float] = {}
        for term in terms:
            constant = math.prod(size.constant for size in term.sizes if not size.parts)
            # One canonical order, so that like terms get the same key.
            variable = tuple(sorted((size for size in term.sizes if size.parts), key=repr))
            merged[variable] = merged.get(variable, 0.0) + term.coefficient * constant
        self.terms = tuple(Term(coefficient, sizes) for sizes, coefficient in merged.items())
        self._terms_of: dict[str, list[tuple[float, list[tuple[Size, int]]]]] = {}
        for term in self.terms:
            for name in {name for size in term.sizes for name, _ in size.parts}:
                per_unit = [(size, sum(each for part, each in size.parts if part == name)) for size in term.sizes]
                self._terms_of.setdefault(name, []).append((term.coefficient, per_unit))

    def total(self, widths: Mapping[str, int]) -> float:
        """Spending at these widths, in the resource's own unit."""
        return sum(term.at(widths) for term in self.terms)

    def saving(self, widths: Mapping[str, int], group: str, num_units: int) -> float:
        """`total(widths) - total(widths with num_units fewer units in group)`; O(terms of the group)."""
        saved = 0.0
        for coefficient, per_unit in self._terms_of.get(group, ()):
            now = fewer = 1
            for size, each in per_unit:  # a plain loop, as in `Size.at`
                length = size.at(widths)
                now, fewer = now * length, fewer * (length - num_units * each)
            saved += coefficient * now - coefficient * fewer
        return saved
