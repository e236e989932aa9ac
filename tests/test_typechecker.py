"""Shapes are checked while the tests run, and types beside them."""

from __future__ import annotations

import jaxtyping
import numpy as np
import pytest
from jaxtyping import Float, TypeCheckError

from setpoint.groups.group import Slice
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
