"""A cost: what the model spends, as a pure function of its groups' widths; FLOPs, parameters, several at once."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, runtime_checkable

from torch import nn

from setpoint.groups.group import Group, Size
from setpoint.groups.trace import Trace


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
        return self.coefficient * math.prod([size.at(widths) for size in self.sizes])


class ProductCost:
    """A cost that is a sum of products of widths: FLOPs and parameters are of this form."""

    def __init__(self, resource: str, terms: tuple[Term, ...]) -> None:
        self.resource = resource
        # Like terms are merged, so that evaluation takes microseconds.
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
                per_unit = [(size, sum(length for part, length in size.parts if part == name)) for size in term.sizes]
                self._terms_of.setdefault(name, []).append((term.coefficient, per_unit))

    def total(self, widths: Mapping[str, int]) -> float:
        return sum(term.at(widths) for term in self.terms)

    def saving(self, widths: Mapping[str, int], group: str, num_units: int) -> float:
        saved = 0.0
        for coefficient, per_unit in self._terms_of.get(group, ()):
            now = fewer = 1
            for size, of_unit in per_unit:  # a plain loop: this is called for every block of every decision
                length = size.at(widths)
                now, fewer = now * length, fewer * (length - num_units * of_unit)
            saved += coefficient * now - coefficient * fewer
        return saved


def flops_cost(trace: Trace) -> ProductCost:
    """FLOPs of one optimizer step, forward and backward, of the traced model at the example's batch shape.

    Matrix products and convolutions only, 2 FLOPs a multiply-add: the convention of `torch.utils.flop_counter`. The
    backward pass costs one more such product for each operand that needs a gradient, and for each time that activation
    checkpoints compute it again. Attention is counted as its two products (a kernel that recomputes the scores does
    more); the weight gradient of a grouped convolution is counted as what it does (the counter of PyTorch 2.13 charges
    it `groups` times).
    """
    terms = tuple(Term(product.coefficient * product.times, product.sizes) for product in trace.contractions)
    return ProductCost("flops", terms)


def params_cost(model: nn.Module, groups: tuple[Group, ...]) -> ProductCost:
    """Number of parameters, each shared one counted once; the model has the groups' present widths."""
    parts: dict[tuple[str, int], list[tuple[str, int]]] = {}
    constant: dict[tuple[str, int], int] = {}
    for group in groups:
        for piece in group.slices:
            if piece.dim is not None:
                place = (piece.tensor, piece.dim)
                entries = int((piece.index >= 0).sum())
                # Divides without rest: units of one group have equally many entries in every dim (see `build`).
                parts.setdefault(place, []).append((group.name, entries // group.num_units))
                constant[place] = constant.get(place, len(piece.index)) - entries
    terms = []
    for name, parameter in model.named_parameters():
        sizes = tuple(
            Size(constant[name, dim], tuple(parts[name, dim])) if (name, dim) in parts else Size(length)
            for dim, length in enumerate(parameter.shape)
        )
        terms.append(Term(1.0, sizes))
    return ProductCost("params", tuple(terms))


@dataclass(frozen=True, eq=False)
class Share:
    """One of several budgets; `factor` is metered cost / predicted cost, as last seen, and 1 without a meter."""

    cost: Cost
    limit: float
    factor: float = 1.0

    def total(self, widths: Mapping[str, int]) -> float:
        return self.factor * self.cost.total(widths) / self.limit


class JointCost:
    """`total(widths) = max over budgets of factor * cost(widths) / limit`: at 1 all budgets are met.

    A block saves what it takes off the largest share. So the binding budget decides what is worth dropping, until
    another one binds.
    """

    resource: Final = "joint"

    def __init__(self, shares: Sequence[Share]) -> None:
        self.shares = tuple(shares)

    def total(self, widths: Mapping[str, int]) -> float:
        return max(share.total(widths) for share in self.shares)

    def saving(self, widths: Mapping[str, int], group: str, num_units: int) -> float:
        return self.total(widths) - self.total({**widths, group: widths[group] - num_units})

    def binding(self, widths: Mapping[str, int]) -> Share:
        return max(self.shares, key=lambda share: share.total(widths))

    def prices(self, price: float, widths: Mapping[str, int]) -> dict[str, float]:
        """By resource, a price per share at these widths: one per unit of the budget that binds, 0 of one with room."""
        binding = self.binding(widths)
        per_unit = price * binding.factor / binding.limit
        return {share.cost.resource: per_unit if share is binding else 0.0 for share in self.shares}
