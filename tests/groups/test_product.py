"""Of a dim made of several factors, exactly one stays prunable, for the stated reasons."""

from __future__ import annotations

import numpy as np

from setpoint.groups.atoms import Atoms
from setpoint.groups.product import solve
from setpoint.groups.walk import Product


def make(num1: int = 3, num2: int = 4) -> tuple[Atoms, np.ndarray, np.ndarray, Product]:
    atoms = Atoms()
    first, second = atoms.fresh(num1), atoms.fresh(num2)
    return atoms, first, second, Product(atoms.fresh(num1 * num2).reshape(num1, num2), (first, second), "here")


def test_larger_factor_wins_without_other_reasons() -> None:
    """With nothing else to choose by, the factor with more units stays; cells follow it."""
    atoms, first, second, product = make()
    solve(atoms, [product])
    assert (atoms.find(first) == 0).all()
    assert np.array_equal(atoms.find(product.cells[1]), atoms.find(second))


def test_a_norm_over_a_factor_freezes_it() -> None:
    """A factor that a norm runs over loses to a smaller one that is free of norms."""
    atoms, first, second, product = make()
    atoms.lossy.append((second, "normalised"))
    solve(atoms, [product])
    assert (atoms.find(second) == 0).all()
    assert np.array_equal(atoms.find(product.cells[:, 2]), atoms.find(first))


def test_a_contracted_factor_loses() -> None:
    """A factor that an activation product sums over loses to one that it does not."""
    atoms, first, second, product = make()
    atoms.mark("contract", second)
    solve(atoms, [product])
    assert (atoms.find(second) == 0).all() and (atoms.find(first) != 0).all()


def test_copies_lose_unless_they_have_met_entries_of_their_own() -> None:
    """A larger factor that is made of copies loses; one whose copies met a parameter's entries one by one is those."""
    atoms, copies, second, product = make(5, 3)
    atoms.mark("alike", copies)
    solve(atoms, [product])
    assert (atoms.find(copies) == 0).all() and (atoms.find(second) != 0).all()
    atoms, copies, second, product = make(5, 3)
    atoms.mark("alike", copies)
    atoms.unite(copies, atoms.fresh(5))
    solve(atoms, [product])
    assert (atoms.find(second) == 0).all() and (atoms.find(copies) != 0).all()


def test_a_settled_product_decides_the_next() -> None:
    """Heads chosen for q (its head size is frozen) are chosen for v as well, though its head size is larger."""
    atoms, heads, size, q = make()
    atoms.freeze(size, "attention", "scale")
    other = atoms.fresh(9)
    v = Product(atoms.fresh(27).reshape(3, 9), (heads, other), "v")
    solve(atoms, [v, q])
    assert (atoms.find(other) == 0).all() and (atoms.find(heads) != 0).all()


def test_a_frozen_cell_freezes_its_row_and_column() -> None:
    """A cell that must stay keeps the whole units it belongs to, and leaves the others free."""
    atoms, first, second, product = make()
    atoms.freeze(product.cells[1, 2:3], "here", "a test")
    solve(atoms, [product])
    assert atoms.find(second)[2] == 0
    assert (atoms.find(second)[[0, 1, 3]] != 0).all() and (atoms.find(first) == 0).all()


def test_both_factors_frozen_freezes_cells() -> None:
    """When neither factor can go, nothing of the dim can."""
    atoms, first, second, product = make()
    atoms.freeze(first, "x", "y")
    atoms.freeze(second, "x", "y")
    solve(atoms, [product])
    assert (atoms.find(product.cells) == 0).all()
