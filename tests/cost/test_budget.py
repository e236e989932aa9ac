"""Tests of budgets: what they mean, and every way in which they can be wrong."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from setpoint.cost.budget import RESOURCES, Budget, Price, Tolerance
from setpoint.errors import BudgetError, SetpointError


@given(st.floats(0, 1, exclude_min=True), st.floats(1, 1e18))
def test_fraction_of_dense(fraction: float, dense: float) -> None:
    """A fraction means that part of the dense cost."""
    assert Budget.fraction(fraction, of="flops").absolute(dense) == fraction * dense


@given(st.floats(0, 1e18, exclude_min=True), st.floats(1, 1e18))
def test_total_is_absolute(limit: float, dense: float) -> None:
    """A total means itself, whatever the dense cost."""
    assert Budget.total(limit, of="params").absolute(dense) == limit


def test_integers_are_welcome() -> None:
    """Whole numbers are limits too, and come out as floats."""
    limit = Budget.total(1_000_000, of="params").absolute(5.0)
    assert limit == 1e6 and isinstance(limit, float)
    assert Budget.fraction(1, of="flops").absolute(7.0) == 7.0


@pytest.mark.parametrize("resource", RESOURCES)
@pytest.mark.parametrize("per", ["step", "run"])
def test_fields(resource: str, per: str) -> None:
    """The constructors say what was said."""
    fraction = Budget.fraction(0.25, of=resource, per=per, deadband=0.02)
    assert fraction == Budget(resource, 0.25, per, relative=True, deadband=0.02)
    assert Budget.total(0.25, of=resource, per=per) == Budget(resource, 0.25, per, relative=False)


@pytest.mark.parametrize("limit", [0.0, -0.5, 0, -1, -math.inf, math.inf, math.nan, True, False])
@pytest.mark.parametrize("make", [Budget.fraction, Budget.total])
def test_limits_that_are_no_budget(make: object, limit: float) -> None:
    """Zero, negative, NaN, infinite and boolean limits are refused, and the message shows what was given."""
    with pytest.raises(BudgetError) as caught:
        make(limit, of="flops")  # type: ignore[operator]
    assert repr(limit) in str(caught.value)


@pytest.mark.parametrize("limit", ["0.5", None, [0.5]])
def test_limits_that_are_no_number(limit: object) -> None:
    """Limits that are no numbers are refused, by the budget or by a run-time type check before it."""
    with pytest.raises((BudgetError, TypeError)):
        Budget.fraction(limit, of="flops")  # type: ignore[arg-type]


@pytest.mark.parametrize("fraction", [1.0000001, 2, 50.0])
def test_fractions_over_one(fraction: float) -> None:
    """A fraction over 1 is refused, and the message says how an absolute limit is written."""
    with pytest.raises(BudgetError, match=r"at most 1.*Budget\.total\("):
        Budget.fraction(fraction, of="flops")
    assert Budget.total(fraction, of="flops").limit == fraction


@pytest.mark.parametrize("resource", ["flop", "FLOPs", "", "macs", "time"])
def test_unknown_resource(resource: str) -> None:
    """An unknown resource is refused, and the message names the known ones."""
    with pytest.raises(BudgetError) as caught:
        Budget.fraction(0.5, of=resource)
    assert repr(resource) in str(caught.value)
    assert all(repr(known) in str(caught.value) for known in RESOURCES)


@pytest.mark.parametrize("per", ["epoch", "", "Step"])
def test_unknown_per(per: str) -> None:
    """Spending is per step or per run, and nothing else."""
    with pytest.raises(BudgetError, match="per='step' or per='run'"):
        Budget.fraction(0.5, of="flops", per=per)


@pytest.mark.parametrize("deadband", [-0.01, 1.0, math.nan, math.inf])
def test_bad_deadband(deadband: float) -> None:
    """A dead-band is a relative error in [0, 1)."""
    with pytest.raises(BudgetError, match="deadband"):
        Budget.fraction(0.5, of="flops", deadband=deadband)


def test_errors_can_be_caught_as_value_errors() -> None:
    """A bad budget is a ValueError for those who know nothing of Setpoint's errors."""
    assert issubclass(BudgetError, ValueError) and issubclass(BudgetError, SetpointError)
    with pytest.raises(ValueError, match="above 0"):
        Budget.fraction(-1.0, of="flops")


def test_a_budget_is_a_value() -> None:
    """Equal budgets are equal, hash alike, and cannot be changed."""
    budget = Budget.fraction(0.5, of="flops")
    assert budget == Budget.fraction(0.5, of="flops") and hash(budget) == hash(Budget.fraction(0.5, of="flops"))
    with pytest.raises(AttributeError):
        budget.limit = 0.7  # type: ignore[misc]


def test_how_a_goal_is_measured_is_no_part_of_what_is_asked() -> None:
    """An example may be tensors, which cannot be compared: budgets, prices and tolerances compare without it."""
    example = (torch.ones(2), torch.ones(3))
    for make in (
        partial(Budget.fraction, 0.5),
        partial(Budget.total, 0.5),
        partial(Price, 0.1),
        partial(Tolerance, 0.1),
    ):
        plain, told = make(of="inference"), make(of="inference", example=example)
        assert plain == told and hash(plain) == hash(told) and repr(plain) == repr(told)
        assert told.example is example and plain.example is None
        assert make(of="energy", watts=65).watts == 65 and make(of="energy", watts=65) != make(of="energy", watts=60)


@pytest.mark.parametrize("resource", RESOURCES)
def test_what_a_resource_has_no_use_for_is_refused(resource: str) -> None:
    """Watts go with energy, an example goes with inference; anywhere else they are a mistake."""
    for make in (partial(Budget.total, 0.5), partial(Price, 0.1), partial(Tolerance, 0.1)):
        for name, value, wanted in (("watts", 65.0, "energy"), ("example", (torch.ones(2),), "inference")):
            if resource == wanted:
                assert getattr(make(of=resource, **{name: value}), name) is value
                continue
            with pytest.raises(BudgetError, match=f"of '{wanted}'.*of '{resource}'.*out"):
                make(of=resource, **{name: value})
