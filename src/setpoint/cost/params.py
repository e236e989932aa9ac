"""Parameters of the model, as a pure function of widths."""

from __future__ import annotations

from torch import nn

from setpoint.cost.cost import ProductCost, Term
from setpoint.groups.group import Group, Size


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
