"""The highest scores: exactly as many as asked for, whatever ties and NaN there are."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from setpoint_bench.baselines.rule import highest


@given(st.lists(st.sampled_from([0.0, 1.0, 2.0, -1.0, float("inf"), float("nan")]), min_size=1, max_size=30), st.data())
def test_highest_is_a_stable_sort(values: list[float], data: st.DataObject) -> None:
    """It is the head of a stable descending sort in which NaN comes last."""
    count = data.draw(st.integers(0, len(values)))
    lowest_for_nan = np.where(np.isnan(values), -np.inf, values)
    expected = np.zeros(len(values), dtype=bool)
    expected[np.argsort(-lowest_for_nan, kind="stable")[:count]] = True
    assert highest(torch.tensor(values), count).tolist() == expected.tolist()
