"""A product: the cells of a dim that merges two or more dims, of which only one factor can be pruned.

When `(heads, head size)` is viewed as one dim, dropping a head drops a row of cells and dropping a position within the
head drops a column: `drop(cell_ij) = drop(factor1_i) or drop(factor2_j)`. To keep every tensor rectangular under any
choice of units, one factor stays prunable and the others are frozen. Preferred is a factor that is not made of copies
(query heads of one key head), then one that no norm runs over, then one that no activation product contracts, then one
that is already the only prunable factor elsewhere, then the one with more units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from setpoint.groups.atoms import Atoms


@dataclass(frozen=True, eq=False)
class Product:
    """Cells and their factors."""

    cells: np.ndarray  # atoms of the merged dim, shape (n1, n2, ...)
    factors: tuple[np.ndarray, ...]  # atoms of each factor, of n1, n2, ... entries
    where: str  # module and op, for messages


def solve(atoms: Atoms, products: Sequence[Product]) -> None:
    """Choose a factor for every product, and unite or freeze accordingly; what is clear is settled first."""
    pending = _settle_forced(atoms, list(products))
    while pending:
        copies, normed, contracted = _copies(atoms), _normed(atoms, products), atoms.marked_class("contract")
        reasons = [_reasons(atoms, product, copies, normed, contracted) for product in pending]
        chosen = _clear_choices(reasons)
        if not chosen:
            sole = _sole_factors(atoms, products, pending)
            reasons = [
                {axis: (*key, bool(sole[atoms.find(product.factors[axis])].any())) for axis, key in reason.items()}
                for product, reason in zip(pending, reasons, strict=True)
            ]
            chosen = _clear_choices(reasons)
        if not chosen:
            every = ((i, axis) for i, reason in enumerate(reasons) for axis in reason)
            chosen = [max(every, key=lambda at: (reasons[at[0]][at[1]], len(pending[at[0]].factors[at[1]])))]
        for i, axis in chosen:
            _spread(atoms, pending[i])
            if axis in _free_axes(atoms, pending[i]):
                _choose(atoms, pending[i], axis)
        pending = _settle_forced(atoms, pending)


def _settle_forced(atoms: Atoms, pending: list[Product]) -> list[Product]:
    """Settle products with at most one free factor, until none is left."""
    while True:
        open_products = []
        for product in pending:
            _spread(atoms, product)
            free = _free_axes(atoms, product)
            if len(free) > 1:
                open_products.append(product)
            elif free:
                _choose(atoms, product, free[0])
            else:
                atoms.freeze(product.cells.ravel(), product.where, "both of its factors are frozen")
        if len(open_products) == len(pending):
            return open_products
        pending = open_products


def _spread(atoms: Atoms, product: Product) -> None:
    """Freeze a factor entry that holds a frozen cell, and a factor whose cells are already tied along it."""
    roots = atoms.find(product.cells)
    for axis, factor in enumerate(product.factors):
        others = tuple(i for i in range(roots.ndim) if i != axis)
        atoms.freeze(factor[(roots == 0).any(axis=others)], product.where, "an entry of the merged dim is frozen")
        first = np.take(roots, [0], axis=axis)
        if len(factor) > 1 and (roots == first).all():
            atoms.freeze(factor, product.where, "entries of this dim are already tied together")


def _free_axes(atoms: Atoms, product: Product) -> list[int]:
    return [
        axis
        for axis, factor in enumerate(product.factors)
        if len(np.unique(roots := atoms.find(factor))) > 1 and (roots != 0).any()
    ]


def _copies(atoms: Atoms) -> np.ndarray:
    """Boolean per atom: whether its class holds copies only; copies united with other entries count as those."""
    everyone = atoms.find(np.arange(len(atoms)))
    of_class: np.ndarray = ~np.isin(everyone, everyone[~atoms.marked("alike")])
    return of_class


def _normed(atoms: Atoms, products: Sequence[Product]) -> np.ndarray:
    """Boolean per atom: whether a norm runs over its class, or over cells that it is a factor of."""
    everyone = atoms.find(np.arange(len(atoms)))
    result = np.zeros(len(atoms), dtype=bool)
    for labels, _ in atoms.lossy:
        result[everyone[labels]] = True
    for product in products:
        if result[everyone[product.cells]].any():
            for factor in product.factors:
                result[everyone[factor]] = True
    of_class: np.ndarray = result[everyone]
    of_class[everyone == 0] = False
    return of_class


def _sole_factors(atoms: Atoms, products: Sequence[Product], pending: list[Product]) -> np.ndarray:
    """Boolean per atom: whether its class is the chosen factor of a product that is settled."""
    result = np.zeros(len(atoms), dtype=bool)
    open_ids = {id(product) for product in pending}
    for product in products:
        if id(product) not in open_ids:
            for axis in _free_axes(atoms, product):
                result[atoms.find(product.factors[axis])] = True
    return result


def _reasons(
    atoms: Atoms, product: Product, copies: np.ndarray, normed: np.ndarray, contracted: np.ndarray
) -> dict[int, tuple[bool, ...]]:
    result: dict[int, tuple[bool, ...]] = {}
    for axis in _free_axes(atoms, product):
        roots = atoms.find(product.factors[axis])
        live = roots[roots != 0]
        own = not copies[product.factors[axis]].all()
        result[axis] = (own, not normed[live].any(), not contracted[live].any())
    return result


def _clear_choices(reasons: list[dict[int, tuple[bool, ...]]]) -> list[tuple[int, int]]:
    """(product, axis) wherever one axis has strictly better reasons, for the best reasons only."""
    clear = []
    for i, reason in enumerate(reasons):
        ranked = sorted(reason, key=lambda axis: reason[axis], reverse=True)
        if len(ranked) > 1 and reason[ranked[0]] > reason[ranked[1]]:
            clear.append((reason[ranked[0]], i, ranked[0]))
    best = max((key for key, _, _ in clear), default=())
    return [(i, axis) for key, i, axis in clear if key == best]


def _choose(atoms: Atoms, product: Product, axis: int) -> None:
    for other, factor in enumerate(product.factors):
        if other != axis:
            atoms.freeze(factor, product.where, "a reshape joins this dim with one that is pruned, such as heads")
    shape = [1] * product.cells.ndim
    shape[axis] = -1
    atoms.unite(product.cells, product.factors[axis].reshape(shape))
