"""Shapes are checked while the tests run, and types beside them."""

from __future__ import annotations

import jaxtyping
import numpy as np
import pytest
from jaxtyping import Float, TypeCheckError

from setpoint.groups.atoms import Atoms
from setpoint.groups.group import Slice
from setpoint.report.numbers import digits
from typechecker import check


def test_a_wrong_shape_is_caught() -> None:
    """A table of two dims where one is annotated is an error."""
    with pytest.raises(TypeCheckError):
        Slice("conv.weight", 0, "produce", np.zeros((2, 2), dtype=np.int64))


def scaled(values: Float[np.ndarray, " units"], factor: float) -> Float[np.ndarray, " units"]:
    """Some function of a module."""
    return values * factor


def test_an_int_may_stand_for_a_float() -> None:
    """A whole number passes where a float is annotated, text does not."""
    checked = jaxtyping.jaxtyped(scaled, typechecker=check)
    assert checked(np.ones(2), 3).tolist() == [3.0, 3.0]
    with pytest.raises(TypeCheckError):
        checked(np.ones(2), "3")


def test_functions_without_a_shape_are_left() -> None:
    """A function whose signature names no shape runs as it is written, and so does one inside of another."""
    assert hasattr(Atoms.fresh, "__wrapped__")  # its shape has a name of its own
    assert not hasattr(digits, "__wrapped__")

    def inner(values: Float[np.ndarray, " units"]) -> None:
        """Nothing."""

    assert jaxtyping.jaxtyped(inner, typechecker=check) is inner


def test_calls_are_checked_first_and_then_now_and_then() -> None:
    """The first calls of a test are checked, and one in a row of later ones."""
    checked = jaxtyping.jaxtyped(scaled, typechecker=check)
    with pytest.raises(TypeCheckError):
        checked(np.ones((2, 2)), 1.0)
    for _ in range(100):
        checked(np.ones(2), 1.0)
    caught = 0
    for _ in range(100):
        try:
            checked(np.ones((2, 2)), 1.0)
        except TypeCheckError:
            caught += 1
    assert caught == 4
