"""Tests of ladders: blocks, alignment, floors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.plants import chain, unit_group
from setpoint.controller.selection import build_ladder, lowest_width, start
from setpoint.groups.group import Group


def _group(width: int, share: float, multiple_of: int) -> Group:
    """Built here rather than in a strategy: run-time type checks draw random numbers, which strategies must not."""
    return unit_group("g", width, min_units=1 + int(share * (width - 1)), multiple_of=multiple_of)


shapes = st.tuples(st.integers(1, 60), st.floats(0, 1), st.sampled_from([1, 2, 3, 8, 16]))


@given(shapes, st.integers(0, 60), st.floats(0, 1), st.lists(st.integers(0, 5), min_size=60, max_size=60))
def test_rungs(shape: tuple[int, float, int], floor: int, slew: float, values: list[int]) -> None:
    """Every rung drops the least salient units, ties by index, to a multiple, not beyond floors and slew limit; the
    foot of an unguarded ladder is the lowest width.
    """
    group = _group(*shape)
    saliency = np.array(values[: group.num_units], dtype=float)
    ladder = build_ladder(group, saliency, dense=group.num_units, floor=floor, slew=slew)
    first = group.num_units % group.multiple_of or group.multiple_of
    order = np.argsort(saliency, kind="stable")
    for rung, edge in enumerate(ladder.edges):
        width = group.num_units - edge
        if rung:
            assert width % group.multiple_of == 0
            assert width >= max(floor, group.min_units)
            assert edge <= max(slew * group.num_units, first)
            assert ladder.order[:edge].tolist() == order[:edge].tolist()
        assert ladder.salience[rung] == pytest.approx(saliency[order[:edge]].sum())
    free = build_ladder(group, saliency, dense=group.num_units)
    assert lowest_width(group) == group.num_units - free.edges[-1]


def test_held_units_stay() -> None:
    """Units that are not free are on no rung, and their worth is NaN."""
    (group,), cost = chain(6, multiple_of=2)
    free = {"layer0": np.array([False, True, True, False, True, True])}
    selection = start(cost, (group,), {"layer0": np.arange(6.0)}, {"layer0": 6}, {"layer0": 6}, free=free)
    assert selection.ladders["layer0"].edges.tolist() == [0, 2, 4]
    selection.move("layer0", 2)
    assert selection.keep()["layer0"].tolist() == [True, False, False, True, False, False]
    selection.worth["layer0"][:] = [5.0, 7.0]
    worth = selection.unit_worth()["layer0"]
    assert np.isnan(worth[[0, 3]]).all() and worth[[1, 2, 4, 5]].tolist() == [5.0, 5.0, 7.0, 7.0]
