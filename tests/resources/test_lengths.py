"""Sizes found from examples equal the sizes that made them."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from setpoint.errors import CostError
from setpoint.groups.group import Group, Size
from setpoint.resources.tape import Lengths, falling_widths, trial_widths


def groups_of(*sizes: int) -> tuple[Group, ...]:
    return tuple(Group(f"g{i}", "unit", size, ()) for i, size in enumerate(sizes))


@given(
    st.lists(st.integers(8, 300), min_size=1, max_size=30), st.integers(0, 9), st.integers(1, 64), st.integers(0, 29)
)
def test_size_of_one_group_is_found(sizes: list[int], constant: int, per_unit: int, which: int) -> None:
    """Whatever the other groups are, `constant + per_unit * width` is recognised exactly."""
    groups = groups_of(*sizes)
    vectors = trial_widths(groups)
    true = Size(constant, ((f"g{which % len(sizes)}", per_unit),))
    assert Lengths(vectors).size(tuple(true.at(vector) for vector in vectors)) == true


@pytest.mark.parametrize(("num_groups", "units"), [(48, 4), (12, 3), (6, 12)])
def test_coarse_groups_are_told_apart(num_groups: int, units: int) -> None:
    """Many groups of few units, as heads are, get as many vectors as it takes to tell them apart."""
    groups = groups_of(*[units] * num_groups)
    vectors = trial_widths(groups)
    lengths = Lengths(vectors)
    for group in groups:
        true = Size(0, ((group.name, 64),))
        assert lengths.size(tuple(true.at(vector) for vector in vectors)) == true


def test_sums_are_learnt_and_not_guessed() -> None:
    """A concatenation is unknown until its pieces have been seen together; a product of widths stays unknown."""
    vectors = trial_widths(groups_of(20, 30))
    lengths = Lengths(vectors)
    total = Size(3, (("g0", 2), ("g1", 1)))
    values = tuple(total.at(vector) for vector in vectors)
    assert lengths.size(values) is None
    lengths.learn([Size(0, (("g0", 2),)), Size(3, (("g1", 1),))])
    assert lengths.size(values) == total
    assert lengths.size(tuple(vector["g0"] * vector["g1"] for vector in vectors)) is None


def test_a_sum_that_looks_like_another_group_is_refused() -> None:
    """Where a sum follows the widths as a third group does, nothing is taken for the other."""
    lengths = Lengths([{"a": 8, "b": 8, "c": 16}, {"a": 6, "b": 7, "c": 13}, {"a": 4, "b": 2, "c": 6}])
    with pytest.raises(CostError, match="do not tell"):
        lengths.learn([Size(0, (("a", 1),)), Size(0, (("b", 1),))])


def test_groups_that_cannot_be_varied_are_constants() -> None:
    """Claim: a group of one block, and one that can only become a single unit, are recorded as they are."""
    groups = Group("block", "unit", 8, (), min_units=8, multiple_of=8), Group("two", "head", 2, ())
    assert all(vector == {"block": 8, "two": 2} for vector in trial_widths(groups))


def test_whole_steps_are_timed_at_ever_narrower_widths() -> None:
    """Each width vector is within blocks, nowhere wider than the one before, the first dense and the last the least."""
    settings = {"a": (100, 5, 8), "b": (12, 1, 1), "c": (1, 1, 1)}
    found = falling_widths([Group(n, "unit", w, (), min_units=m, multiple_of=k) for n, (w, m, k) in settings.items()])
    assert found[0] == {"a": 100, "b": 12, "c": 1} and found[-1] == {"a": 8, "b": 1, "c": 1}
    for wider, narrower in pairwise(found):
        assert all(narrower[name] <= wider[name] for name in wider) and narrower["a"] % 8 == 0
