"""The names of the package: rings of names, and where those went that it had before."""

from __future__ import annotations

import re
from importlib import import_module

import pytest

import setpoint


def test_every_public_name_is_there() -> None:
    """Claim: about twenty names, and each can be had."""
    assert len(setpoint.__all__) <= 30 and all(getattr(setpoint, name) is not None for name in setpoint.__all__)


@pytest.mark.parametrize("name", ["MagnitudeSensor", "RankError", "GatedController", "Reserve", "Entry"])
def test_a_name_that_moved_says_where_it_is(name: str) -> None:
    """Claim: the error gives the import that works."""
    with pytest.raises(AttributeError, match=f"import {name}") as caught:
        getattr(setpoint, name)
    found = re.search(r"from (\S+) import", str(caught.value))
    assert found is not None and hasattr(import_module(found[1]), name)


def test_a_name_that_changed_says_the_new_one() -> None:
    """Claim: the error gives a name that is there."""
    for old, new in (("Reference", "Schedule"), ("whole", "unsharded")):
        with pytest.raises(AttributeError, match=f"use setpoint.{new}"):
            getattr(setpoint, old)
        assert new in setpoint.__all__
