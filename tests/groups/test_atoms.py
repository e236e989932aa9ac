"""Atoms behave like a disjoint-set forest whose class of 0 is frozen."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from setpoint.groups.atoms import Atoms

Pairs = st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=60)


def components(num: int, pairs: list[tuple[int, int]]) -> list[int]:
    """Smallest member of each one's component, by plain relabelling."""
    label = list(range(num))
    for a, b in pairs:
        old, new = max(label[a], label[b]), min(label[a], label[b])
        label = [new if value == old else value for value in label]
    return label


@given(Pairs)
def test_unite_in_one_call_gives_connected_components(pairs: list[tuple[int, int]]) -> None:
    """However many pairs meet in one call, classes are the connected components and roots their least members."""
    atoms = Atoms()
    atoms.fresh(29)
    if pairs:
        left, right = (np.array(side) for side in zip(*pairs, strict=True))
        atoms.unite(left, right)
    assert atoms.find(np.arange(30)).tolist() == components(30, pairs)


def test_frozen_spreads_through_a_class() -> None:
    """Freezing one entry freezes everything united with it, before and after."""
    atoms = Atoms()
    a, b, c = atoms.fresh(2), atoms.fresh(2), atoms.fresh(2)
    atoms.unite(a, b)
    atoms.freeze(b[:1], "here", "a test")
    atoms.unite(c, a)
    assert atoms.find(c).tolist() == [0, int(atoms.find(a)[1])]
    assert atoms.find(c)[1] != 0
