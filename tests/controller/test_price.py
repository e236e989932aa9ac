"""Tests of the PI part against the closed form of its loop."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.signal import lfilter

from setpoint.controller.priced import Feedback, Gains


def _errors(factors: np.ndarray, gains: Gains) -> np.ndarray:
    """Errors that the feedback sees when the meter reads these factors times the prediction."""
    feedback, errors = Feedback(), []
    for factor in factors:
        error = feedback.error(metered=float(factor) * 3.0, predicted=3.0)
        feedback = feedback.updated(error, gains, deadband=0.0)
        errors.append(error)
    return np.array(errors)


@given(st.floats(0, 0.4), st.floats(0.05, 0.6), st.lists(st.floats(0.2, 5.0), min_size=1, max_size=12))
def test_loop_is_the_textbook_transfer_function(kp: float, ki: float, factors: list[float]) -> None:
    """From ln(metered / predicted) to e the loop is (1 - z^-1) / (1 + (kp + ki - 1) z^-1 - kp z^-2)."""
    expected = lfilter([1.0, -1.0], [1.0, kp + ki - 1.0, -kp], np.log(factors))
    assert _errors(np.array(factors), Gains(kp, ki)) == pytest.approx(expected, abs=1e-9)


@given(st.floats(0, 1), st.floats(0.01, 1), st.floats(0.05, 20.0))
def test_no_overshoot(share: float, total_gain: float, factor: float) -> None:
    """After a step of any size the error never changes sign, for all gains that are accepted."""
    gains = Gains(kp=share * total_gain * 0.99, ki=total_gain * (1 - share * 0.99))
    errors = _errors(np.full(30, factor), gains) * np.sign(np.log(factor))
    assert (errors >= -1e-12).all()


def test_settling_of_the_defaults() -> None:
    """The defaults take out 60 % of a step at the next decision and 99 % within eight, as derived."""
    errors = _errors(np.full(12, 2.0), Gains()) / math.log(2.0)
    assert errors[1] == pytest.approx(0.4)
    assert abs(errors[9]) < 0.01
    assert errors[11] / errors[10] == pytest.approx(0.5742, abs=1e-3)


def test_dead_band_rests() -> None:
    """Inside the dead-band nothing changes, just outside it does."""
    feedback = Feedback(0.2, 0.25)
    assert feedback.updated(0.0099, Gains(), deadband=0.02) is feedback
    assert feedback.updated(-0.0099, Gains(), deadband=0.02) is feedback
    assert feedback.updated(0.0101, Gains(), deadband=0.02) != feedback
