"""A joint cost is the largest share of a limit."""

from __future__ import annotations

import pytest

from setpoint.cost.cost import Cost, JointCost, ProductCost, Share, Term
from setpoint.groups.group import Size

A, B = Size(0, (("a", 1),)), Size(0, (("b", 1),))
FLOPS = ProductCost("flops", (Term(1.0, (A, B)),))
PARAMS = ProductCost("params", (Term(10.0, (A,)), Term(1.0, (B,))))


def test_the_largest_share_leads() -> None:
    """The total is the larger of both shares, and the binding budget the one it is of."""
    joint = JointCost([Share(FLOPS, 50.0), Share(PARAMS, 100.0)])
    assert isinstance(joint, Cost)
    assert joint.total({"a": 10, "b": 10}) == 2.0 and joint.binding({"a": 10, "b": 10}).cost is FLOPS
    assert joint.total({"a": 10, "b": 2}) == pytest.approx(1.02)
    assert joint.binding({"a": 10, "b": 2}).cost is PARAMS


def test_a_block_saves_what_it_takes_off_the_largest_share() -> None:
    """Savings end where the other budget takes over."""
    joint = JointCost([Share(FLOPS, 50.0), Share(PARAMS, 100.0)])
    assert joint.saving({"a": 10, "b": 10}, "b", 8) == pytest.approx(2.0 - 1.02)


def test_a_meter_corrects_its_share() -> None:
    """A factor of 2 makes a budget lead that had half of its room left."""
    shares = [Share(FLOPS, 200.0), Share(PARAMS, 220.0, factor=3.0)]
    assert JointCost(shares).binding({"a": 10, "b": 10}).cost is PARAMS
