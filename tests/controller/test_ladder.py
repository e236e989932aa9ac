"""Tests of ladders: blocks, alignment, floors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.plants import unit_group
from setpoint.controller.ladder import Ladder, build_ladder, lowest_width
from setpoint.groups.group import Group


def _ladder(group: Group, saliency: np.ndarray, **settings: int) -> Ladder:
    limits = {"dense": group.num_units, "floor": 0, "max_dropped": group.num_units, **settings}
    return build_ladder(group, saliency, free=np.ones(group.num_units, bool), **limits)


def _group(width: int, share: float, multiple_of: int) -> Group:
    """Built here rather than in a strategy: run-time type checks draw random numbers, which strategies must not."""
    return unit_group("g", width, min_units=1 + int(share * (width - 1)), multiple_of=multiple_of)


shapes = st.tuples(st.integers(1, 60), st.floats(0, 1), st.sampled_from([1, 2, 3, 8, 16]))


@given(shapes, st.integers(0, 60), st.integers(0, 60), st.lists(st.integers(0, 5), min_size=60, max_size=60))
def test_rungs(shape: tuple[int, float, int], floor: int, max_dropped: int, values: list[int]) -> None:
    """Every rung drops the least salient units, to a multiple, not below floors, not beyond the slew limit."""
    group = _group(*shape)
    saliency = np.array(values[: group.num_units], dtype=float)
    ladder = _ladder(group, saliency, floor=floor, max_dropped=max_dropped)
    first = group.num_units % group.multiple_of or group.multiple_of
    for rung in range(ladder.num_rungs + 1):
        keep = ladder.keep(rung)
        width = int(keep.sum())
        assert width == group.num_units - ladder.edges[rung]
        if rung:
            assert width % group.multiple_of == 0
            assert width >= max(floor, group.min_units)
            assert group.num_units - width <= max(max_dropped, first)
            assert saliency[~keep].max() <= saliency[keep].min()
        assert ladder.salience[rung] == pytest.approx(saliency[~keep].sum())


@given(shapes)
def test_lowest_width_is_the_foot(shape: tuple[int, float, int]) -> None:
    """`lowest_width` is the width at the foot of the unguarded ladder."""
    group = _group(*shape)
    ladder = _ladder(group, np.ones(group.num_units))
    assert lowest_width(group) == group.num_units - ladder.edges[-1]


def test_ties_go_by_index() -> None:
    """Units of equal saliency go in the order of their index."""
    ladder = _ladder(unit_group("g", 6), np.array([1.0, 0.0, 1.0, 0.0, 0.0, 1.0]))
    assert ladder.order.tolist() == [1, 3, 4, 0, 2]


def test_held_units_stay() -> None:
    """Units that are not free are on no rung, and their values are NaN."""
    group = unit_group("g", 6, multiple_of=2)
    free = np.array([False, True, True, False, True, True])
    ladder = build_ladder(group, np.arange(6.0), dense=6, floor=0, max_dropped=6, free=free)
    assert ladder.edges.tolist() == [0, 2, 4]
    assert ladder.keep(2).tolist() == [True, False, False, True, False, False]
    per_unit = ladder.per_unit(np.array([5.0, 7.0]))
    assert np.isnan(per_unit[[0, 3]]).all() and per_unit[[1, 2, 4, 5]].tolist() == [5.0, 5.0, 7.0, 7.0]
