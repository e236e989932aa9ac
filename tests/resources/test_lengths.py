"""Sizes found from examples equal the sizes that made them."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from setpoint.errors import CostError
from setpoint.groups.group import Group, Size
from setpoint.resources.lengths import Lengths, held_at_two, narrowing_widths, trial_widths


def groups_of(*sizes: int, multiple_of: int = 1) -> tuple[Group, ...]:
    """Groups of so many units."""
    return tuple(Group(f"g{i}", "unit", size, (), multiple_of=multiple_of) for i, size in enumerate(sizes))


@given(
    st.lists(st.integers(8, 300), min_size=1, max_size=30), st.integers(0, 9), st.integers(1, 64), st.integers(0, 29)
)
def test_size_of_one_group_is_found(sizes: list[int], constant: int, per_unit: int, which: int) -> None:
    """Whatever the other groups are, `constant + per_unit * width` is recognised exactly."""
    groups = groups_of(*sizes)
    vectors = trial_widths(groups)
    true = Size(constant, ((f"g{which % len(sizes)}", per_unit),))
    assert Lengths(vectors).size(tuple(true.at(vector) for vector in vectors)) == true


@pytest.mark.parametrize(("num_groups", "units"), [(48, 4), (12, 2), (6, 12)])
def test_coarse_groups_are_told_apart(num_groups: int, units: int) -> None:
    """Many groups of few units, as heads are, get as many vectors as it takes to tell them apart."""
    groups = groups_of(*[units] * num_groups)
    vectors = trial_widths(groups)
    lengths = Lengths(vectors)
    for group in groups:
        true = Size(0, ((group.name, 64),))
        assert lengths.size(tuple(true.at(vector) for vector in vectors)) == true


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize(
    ("num_groups", "units", "enough"),
    [(30, 64, True), (12, 12, True), (48, 4, False), (6, 2, False), (2, 2, True), (2, 3, True)],
)
def test_three_narrower_widths_tell_groups_apart_if_they_can(
    num_groups: int, units: int, enough: bool, dense: bool
) -> None:
    """No group becomes wider again; 12 heads in 12 layers are told apart, and of groups of few units it is said."""
    groups = groups_of(*[units] * num_groups)
    vectors, apart = narrowing_widths(groups, dense=dense)
    assert apart is enough and len(vectors) == 4
    if dense or not apart:
        assert vectors[0] == {group.name: units for group in groups}
    elif units > 3:
        assert all(vectors[0][group.name] < units for group in groups)
    assert all(narrower[name] <= wider[name] for wider, narrower in pairwise(vectors) for name in wider)
    if apart:
        true = [Size(0, ((group.name, 64),)) for group in groups]
        assert [Lengths(vectors).size(tuple(map(each.at, vectors))) for each in true] == true


def test_sums_are_learnt_and_not_guessed() -> None:
    """A concatenation is unknown until its pieces have been seen together."""
    vectors = trial_widths(groups_of(20, 30))
    lengths = Lengths(vectors)
    total = Size(3, (("g0", 2), ("g1", 1)))
    values = tuple(total.at(vector) for vector in vectors)
    assert lengths.size(values) is None
    lengths.learn([Size(0, (("g0", 2),)), Size(3, (("g1", 1),))])
    assert lengths.size(values) == total


def test_a_sum_that_looks_like_another_group_is_refused() -> None:
    """Where a sum follows the widths as a third group does, nothing is taken for the other."""
    lengths = Lengths([{"a": 8, "b": 8, "c": 16}, {"a": 6, "b": 7, "c": 13}, {"a": 4, "b": 2, "c": 6}])
    with pytest.raises(CostError, match="do not tell"):
        lengths.learn([Size(0, (("a", 1),)), Size(0, (("b", 1),))])


def test_a_product_of_widths_is_refused() -> None:
    """A length that is no linear function of one width is not taken for one."""
    vectors = trial_widths(groups_of(20, 30))
    assert Lengths(vectors).size(tuple(v["g0"] * v["g1"] for v in vectors)) is None


def test_a_group_that_no_block_leaves_is_a_constant() -> None:
    """A group of one block cannot be cut, and its width is not varied."""
    group = Group("g", "unit", 8, (), min_units=8, multiple_of=8)
    assert {vector["g"] for vector in trial_widths((group,))} == {8}


def test_groups_of_two_units_can_be_held() -> None:
    """Claim: held are groups that become one unit and nothing else, and the widths to record at are theirs."""
    groups = (
        Group("two", "head", 2, ()),
        Group("three", "head", 3, ()),
        Group("one", "head", 1, ()),
        Group("floor", "head", 2, (), min_units=2),
    )
    held = held_at_two(groups)
    assert [each.min_units for each in held] == [2, *(each.min_units for each in groups[1:])]
    assert {widths["two"] for widths in trial_widths(held)} == {2}
