"""Schedules: the cubic way down and the cosine of drop and grow."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from setpoint_bench.baselines.schedule import cosine_fraction, cubic_density

fractions = st.floats(0.0, 1.0)


@given(fractions, fractions)
def test_cubic_is_equation_one_of_the_paper(progress: float, final: float) -> None:
    """In sparsity: s_t = s_f + (s_0 - s_f) (1 - progress)^3, from s_0 = 0."""
    sparsity = (1 - final) + (0.0 - (1 - final)) * (1 - progress) ** 3
    assert 1 - cubic_density(progress, final=final) == pytest.approx(sparsity, abs=1e-12)


def test_cubic_stays_at_its_ends() -> None:
    """Before the ramp the density is the first, after it the last."""
    assert cubic_density(-1.0, final=0.1, start=0.9) == pytest.approx(0.9)
    assert cubic_density(2.0, final=0.1, start=0.9) == pytest.approx(0.1)


@given(st.integers(0, 1000), st.floats(0.01, 0.9))
def test_cosine_is_the_papers(step: int, initial: float) -> None:
    """The share is alpha / 2 (1 + cos(pi t / T_end)), and nothing from T_end on."""
    expected = initial / 2 * (1 + math.cos(step * math.pi / 700)) if step < 700 else 0.0
    assert cosine_fraction(step, 700, initial) == pytest.approx(expected, abs=1e-15)
