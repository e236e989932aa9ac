"""Tests of product costs against the plain sum of products."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from setpoint.cost.cost import Cost, JointCost, ProductCost, Share, Term
from setpoint.groups.group import Size

NAMES = ("a", "b", "c", "d")
parts = st.lists(st.tuples(st.sampled_from(NAMES), st.integers(1, 9)), max_size=3, unique_by=lambda part: part[0])
sizes = st.tuples(st.integers(0, 20), parts.map(tuple))
terms = st.lists(st.tuples(st.integers(0, 10**6), st.lists(sizes, max_size=4)), max_size=8)
widths_everywhere = st.fixed_dictionaries({name: st.integers(1, 300) for name in NAMES})

Spec = list[tuple[int, list[tuple[int, tuple[tuple[str, int], ...]]]]]


def _terms(spec: Spec) -> tuple[Term, ...]:
    """Built here rather than in a strategy: run-time type checks draw random numbers, which strategies must not."""
    return tuple(Term(float(factor), tuple(Size(*size) for size in dims)) for factor, dims in spec)


def _plain(spec: Spec, widths: Mapping[str, int]) -> int:
    """The sum of products in exact integers."""
    total = 0
    for factor, dims in spec:
        total += factor * math.prod(c + sum(per_unit * widths[name] for name, per_unit in pieces) for c, pieces in dims)
    return total


@given(terms, widths_everywhere)
def test_total_is_the_sum_of_products(spec: Spec, widths: dict[str, int]) -> None:
    """The total equals the sum of products over the terms as given, whatever was merged."""
    assert ProductCost("flops", _terms(spec)).total(widths) == pytest.approx(_plain(spec, widths), rel=1e-12)


@given(terms, widths_everywhere, st.sampled_from(NAMES), st.data())
def test_saving_is_a_difference_of_totals(spec: Spec, widths: dict[str, int], group: str, data: st.DataObject) -> None:
    """A saving equals the total before minus the total after, for any group and any number of units, or back."""
    num_units = data.draw(st.integers(-5, widths[group]))
    fewer = {**widths, group: widths[group] - num_units}
    saving = ProductCost("flops", _terms(spec)).saving(widths, group, num_units)
    exact = _plain(spec, widths) - _plain(spec, fewer)
    assert saving == pytest.approx(exact, rel=1e-9, abs=1e-9 * (1 + _plain(spec, widths)))


@given(terms, widths_everywhere, st.sampled_from(NAMES))
def test_fewer_units_never_cost_more(spec: Spec, widths: dict[str, int], group: str) -> None:
    """With coefficients that are not negative no saving is negative, and savings shrink as other groups shrink."""
    cost = ProductCost("flops", _terms(spec))
    saving = cost.saving(widths, group, 1)
    halves = {name: width if name == group else max(1, width // 2) for name, width in widths.items()}
    assert saving >= 0.0
    assert cost.saving(halves, group, 1) <= saving * (1 + 1e-9) + 1e-9 * cost.total(widths)


def test_like_terms_are_merged() -> None:
    """Terms in the same groups, in any order and with any constant factors, become one."""
    a, b = Size(0, (("a", 1),)), Size(2, (("b", 3),))
    cost = ProductCost(
        "flops", (Term(2.0, (a, b)), Term(5.0, (b, Size(7), a)), Term(1.0, (a,)), Term(4.0, (Size(3),)), Term(8.0, ()))
    )
    assert len(cost.terms) == 3
    assert cost.total({"a": 10, "b": 1}) == (2 + 35) * 10 * 5 + 10 + 12 + 8


A, B = Size(0, (("a", 1),)), Size(0, (("b", 1),))
FLOPS = ProductCost("flops", (Term(1.0, (A, B)),))
PARAMS = ProductCost("params", (Term(10.0, (A,)), Term(1.0, (B,))))


def test_a_joint_cost_is_the_largest_share_of_a_limit() -> None:
    """The total is that of the binding budget; savings end where the other one takes over; a meter corrects a share."""
    joint, wide, narrow = JointCost([Share(FLOPS, 50.0), Share(PARAMS, 100.0)]), {"a": 10, "b": 10}, {"a": 10, "b": 2}
    assert isinstance(joint, Cost)
    assert joint.total(wide) == 2.0 and joint.binding(wide).cost is FLOPS
    assert joint.total(narrow) == pytest.approx(1.02) and joint.binding(narrow).cost is PARAMS
    assert joint.saving(wide, "b", 8) == pytest.approx(2.0 - 1.02)
    assert JointCost([Share(FLOPS, 200.0), Share(PARAMS, 220.0, factor=3.0)]).binding(wide).cost is PARAMS
