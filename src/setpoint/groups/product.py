"""A product: the cells of a dim that merges two or more dims, of which only one factor can be pruned.

When `(heads, head size)` is viewed as one dim, dropping a head drops a row of cells and dropping a position within the
head drops a column: `drop(cell_ij) = drop(factor1_i) or drop(factor2_j)`. To keep every tensor rectangular under any
choice of units, one factor stays prunable and the others are frozen. Preferred is a factor that is not made of copies
(query heads of one key head), then one that no norm runs over, then one that no activation product contracts, then one
that is already the only prunable factor elsewhere, then the one with more units.
"""

from collections.abc import Sequence

import numpy as np

from setpoint.groups.atoms import Atoms
from setpoint.groups.walk import Product

Ratings = list[dict[int, tuple[bool, ...]]]  # by product, what speaks for each of its free factors, best reason first


def solve(atoms: Atoms, products: Sequence[Product]) -> None:
    """Choose a factor for every product, and unite or freeze accordingly; what is clear is settled first."""
    pending = _settle_forced(atoms, list(products))
    while pending:
        ratings = _ratings(atoms, products, pending)
        chosen = _clear_choices(ratings)
        if not chosen:
            sole = _sole_factors(atoms, products, pending)
            for product, rated in zip(pending, ratings, strict=True):
                for axis in rated:
                    rated[axis] = (*rated[axis], bool(sole[atoms.find(product.factors[axis])].any()))
            chosen = _clear_choices(ratings)
        if not chosen:
            every = ((i, axis) for i, rated in enumerate(ratings) for axis in rated)
            chosen = [max(every, key=lambda at: (ratings[at[0]][at[1]], len(pending[at[0]].factors[at[1]])))]
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
        if len(factor) > 1 and (roots == np.take(roots, [0], axis=axis)).all():
            atoms.freeze(factor, product.where, "entries of this dim are already tied together")


def _free_axes(atoms: Atoms, product: Product) -> list[int]:
    roots = [np.unique(atoms.find(factor)) for factor in product.factors]
    return [axis for axis, found in enumerate(roots) if len(found) > 1]


def _ratings(atoms: Atoms, products: Sequence[Product], pending: list[Product]) -> Ratings:
    roots = atoms.roots
    # Copies united with other entries count as those.
    copies = ~np.isin(roots, roots[~atoms.marked("alike")])
    normed, contracted = _normed(atoms, roots, products), atoms.marked_class("contract")
    ratings: Ratings = []
    for product in pending:
        rated: dict[int, tuple[bool, ...]] = {}
        for axis in _free_axes(atoms, product):
            factor = product.factors[axis]
            live = roots[factor][roots[factor] != 0]
            rated[axis] = (not copies[factor].all(), not normed[live].any(), not contracted[live].any())
        ratings.append(rated)
    return ratings


def _normed(atoms: Atoms, roots: np.ndarray, products: Sequence[Product]) -> np.ndarray:
    """Boolean per atom: whether a norm runs over its class, or over cells that it is a factor of."""
    result = np.zeros(len(roots), dtype=bool)
    for labels, _ in atoms.lossy:
        result[roots[labels]] = True
    for product in products:
        if result[roots[product.cells]].any():
            for factor in product.factors:
                result[roots[factor]] = True
    of_class: np.ndarray = result[roots] & (roots != 0)
    return of_class


def _sole_factors(atoms: Atoms, products: Sequence[Product], pending: list[Product]) -> np.ndarray:
    """Boolean per atom: whether its class is the chosen factor of a product that is settled."""
    result = np.zeros(len(atoms.roots), dtype=bool)
    open_ids = {id(product) for product in pending}
    for product in products:
        if id(product) not in open_ids:
            for axis in _free_axes(atoms, product):
                result[atoms.find(product.factors[axis])] = True
    return result


def _clear_choices(ratings: Ratings) -> list[tuple[int, int]]:
    """(product, axis) wherever one axis has strictly better reasons, for the best reasons only."""
    clear = []
    for i, rated in enumerate(ratings):
        ranked = sorted(rated, key=lambda axis: rated[axis], reverse=True)
        if len(ranked) > 1 and rated[ranked[0]] > rated[ranked[1]]:
            clear.append((rated[ranked[0]], i, ranked[0]))
    best = max((key for key, _, _ in clear), default=())
    return [(i, axis) for key, i, axis in clear if key == best]


def _choose(atoms: Atoms, product: Product, axis: int) -> None:
    for other, factor in enumerate(product.factors):
        if other != axis:
            atoms.freeze(factor, product.where, "a reshape joins this dim with one that is pruned, such as heads")
    shape = [1] * product.cells.ndim
    shape[axis] = -1
    atoms.unite(product.cells, product.factors[axis].reshape(shape))
