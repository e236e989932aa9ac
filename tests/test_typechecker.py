"""Shapes and types are checked while the tests run."""

from __future__ import annotations

import numpy as np
import pytest
from jaxtyping import TypeCheckError

from setpoint.groups.group import Slice
from setpoint.groups.walk import rule
from setpoint.report.numbers import digits


def test_a_wrong_shape_is_caught() -> None:
    """A table of two dims where one is annotated is an error."""
    with pytest.raises(TypeCheckError):
        Slice("conv.weight", 0, "produce", np.zeros((2, 2), dtype=np.int64))


def test_an_int_may_stand_for_a_float() -> None:
    """A whole number passes where a float is annotated, text does not."""
    assert digits(3) == "3"
    with pytest.raises(TypeCheckError):
        digits("3")  # type: ignore[arg-type]


def test_nested_functions_are_left() -> None:
    """A function that a function defines runs as it is written, one of a module is wrapped."""
    assert hasattr(rule, "__wrapped__")
    assert not hasattr(rule(), "__wrapped__")
