"""Means, spreads and intervals equal the textbook's."""

from __future__ import annotations

import math

import numpy as np
import pytest

from setpoint_bench.report.results import Cell
from setpoint_bench.report.statistics import Difference, difference, estimate, t_quantile


def cells(values: dict[int, float]) -> list[Cell]:
    return [Cell(task="t", method="m", value=value, seed=seed) for seed, value in values.items()]


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 9, 29, 200])
@pytest.mark.parametrize("share", [0.9, 0.975, 0.995])
def test_quantiles_are_students(freedom: int, share: float) -> None:
    """The quantile of Student's t equals SciPy's to five digits, from one degree of freedom to two hundred."""
    stats = pytest.importorskip("scipy.stats")
    assert t_quantile(share, freedom) == pytest.approx(stats.t.ppf(share, freedom), rel=1e-5)


def test_an_interval_equals_the_paired_t_test() -> None:
    """Mean, spread and interval are those of SciPy's paired test over the common seeds; other seeds do not count."""
    stats = pytest.importorskip("scipy.stats")
    ours, theirs = np.array([0.91, 0.93, 0.90, 0.94]), np.array([0.90, 0.91, 0.91, 0.92])
    found = difference(cells({**dict(enumerate(ours)), 8: 0.1}), cells({**dict(enumerate(theirs)), 9: 0.2}))
    low, high = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert found and found.num == 4
    assert (found.low, found.high) == (pytest.approx(low, rel=1e-5), pytest.approx(high, rel=1e-5))
    assert found.deviation == pytest.approx(np.std(ours - theirs, ddof=1))


def test_few_seeds_have_no_interval() -> None:
    """One pair has no spread, two have no interval, without a common seed there is only a difference of means."""
    one = difference(cells({0: 0.9}), cells({0: 0.8}))
    two = difference(cells({0: 0.9, 1: 0.8}), cells({0: 0.8, 1: 0.7}))
    none = difference(cells({0: 0.9}), cells({1: 0.8}))
    assert one and (one.mean, one.num, one.deviation) == (pytest.approx(0.1), 1, None)
    assert two and (two.num, two.low, two.clear) == (2, None, False)
    assert none and (none.mean, none.num, none.clear) == (pytest.approx(0.1), 0, False)
    assert difference(cells({0: 0.9}), []) is None
    assert estimate([]) is None


def test_clear_is_what_excludes_zero() -> None:
    """Only an interval wholly above or below 0 is clear."""
    assert Difference(1.0, 3, 0.1, 0.5, 1.5).clear and Difference(-1.0, 3, 0.1, -1.5, -0.5).clear
    assert not Difference(1.0, 3, 2.0, -0.5, 2.5).clear
    assert not math.isnan(t_quantile(0.975, 1))
