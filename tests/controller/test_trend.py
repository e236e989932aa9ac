"""Tests of the trend of the loss, against losses in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest

from setpoint.controller.trend import excess_after, fit_trend


def falling(steps: np.ndarray) -> np.ndarray:
    """A loss that the trend describes exactly."""
    return 3.0 - 0.4 * np.log(steps)


def test_a_line_over_the_logarithm_is_followed_exactly() -> None:
    """Without noise the trend foretells the loss at any step, and its noise is next to nothing."""
    steps = np.arange(50.0, 100.0)
    trend = fit_trend(steps, falling(steps))
    assert trend is not None
    assert trend.noise < 1e-4
    for step in (30.0, 99.0, 500.0):
        # A bin's median lies at its middle step and its mean of ln(step) a trifle before it.
        assert trend.at(step) == pytest.approx(3.0 - 0.4 * math.log(step), abs=1e-3)


@pytest.mark.parametrize("jump", [0.0, 0.05, -0.02])
def test_the_excess_is_the_jump(jump: float) -> None:
    """A loss that jumps by a constant at the cut and goes on alike has that jump as its excess."""
    steps = np.arange(1.0, 201.0)
    losses = falling(steps) + np.where(steps > 100, jump, 0.0)
    excess = excess_after(steps, losses, changed=0, cut=100, now=200)
    assert excess is not None
    assert excess.value == pytest.approx(jump, abs=1e-3)
    rise = excess.foretold + excess.value - excess.before
    assert rise == pytest.approx(jump + falling(np.array([173.0]))[0] - falling(np.array([100.0]))[0], abs=0.02)


def test_what_recovers_within_half_the_window_is_no_excess() -> None:
    """A bump that is over halfway from the cut to the decision leaves no trace."""
    steps = np.arange(1.0, 201.0)
    losses = falling(steps) + np.where((steps > 100) & (steps <= 150), 5.0, 0.0)
    excess = excess_after(steps, losses, changed=0, cut=100, now=200)
    assert excess is not None
    assert abs(excess.value) < 1e-3


def test_single_outliers_do_not_matter() -> None:
    """One wild loss in each bin, a thousand times too high, moves neither trend nor excess."""
    steps = np.arange(1.0, 201.0)
    losses = falling(steps)
    losses[::13] = 1000.0
    excess = excess_after(steps, losses, changed=0, cut=100, now=200)
    assert excess is not None
    assert abs(excess.value) < 0.05


def test_the_standard_error_is_honest() -> None:
    """Over 400 runs of pure noise about a trend, excess / error has a spread near 1, and few lie beyond 4."""
    steps, ratios = np.arange(1.0, 401.0), []
    for seed in range(400):
        losses = falling(steps) + 0.3 * np.random.default_rng(seed).standard_normal(400)
        excess = excess_after(steps, losses, changed=0, cut=200, now=400)
        assert excess is not None
        ratios.append(excess.value / excess.error)
    # The noise is estimated from eight bins, so the ratio is Student's with six degrees of freedom.
    assert 0.8 < np.std(ratios) < 1.5
    assert np.mean(np.abs(ratios) > 4) < 0.03


def test_too_little_is_no_trend() -> None:
    """Fewer than eight losses on either side, or none that is finite, give None and not a guess."""
    steps = np.arange(1.0, 41.0)
    assert excess_after(steps, falling(steps), changed=0, cut=34, now=40) is None
    assert excess_after(steps, falling(steps), changed=0, cut=5, now=40) is None
    assert excess_after(steps, np.full(40, np.nan), changed=0, cut=20, now=40) is None
    assert excess_after(np.zeros(0), np.zeros(0), changed=0, cut=20, now=40) is None
