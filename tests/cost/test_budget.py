"""Tests of budgets: what they mean, and every way in which they can be wrong."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from setpoint.cost.budget import Budget, Price, Tolerance
from setpoint.errors import BudgetError

MADE: list[Any] = [Budget.fraction, Budget.total]
GOALS: list[Any] = [*MADE, Price, Tolerance]


@given(st.floats(0, 1, exclude_min=True), st.floats(1, 1e18))
def test_fraction_of_dense(fraction: float, dense: float) -> None:
    """A fraction means that part of the dense cost."""
    assert Budget.fraction(fraction, of="flops").absolute(dense) == fraction * dense


@given(st.floats(0, 1e18, exclude_min=True), st.floats(1, 1e18))
def test_total_is_absolute(limit: float, dense: float) -> None:
    """A total means itself, whatever the dense cost."""
    assert Budget.total(limit, of="params").absolute(dense) == limit


NO_LIMITS = [0.0, -0.5, 0, -1, -math.inf, math.inf, math.nan, True, False]
X = (torch.ones(2),)
WRONG: list[tuple[Callable[[], object], str]] = [
    *((partial(make, limit, of="flops"), re.escape(repr(limit))) for make in MADE for limit in NO_LIMITS),
    *((partial(Budget.fraction, value, of="flops"), r"at most 1.*Budget\.total\(") for value in (1.0000001, 2, 50.0)),
    *((partial(Budget.fraction, 0.5, of=name), f"unknown resource {name!r}.*'flops'") for name in ("flop", "", "time")),
    (partial(Budget.fraction, 0.5, of="openvino"), "unknown resource 'openvino': use one of.*onnxruntime.*executorch"),
    *((partial(Budget.fraction, 0.5, of="flops", per=per), "per='step' or per='run'") for per in ("epoch", "Step")),
    *((partial(Budget.fraction, 0.5, of="flops", deadband=d), "deadband") for d in (-0.01, 1.0, math.nan, math.inf)),
    *((partial(Budget.total, 1.0, of="energy", watts=w), "watts is the power") for w in (True, 0.0, -1.0, math.inf)),
    (partial(Price, 0.1, of="energy", watts=math.nan), "watts is the power"),
    (partial(Price, -0.1, of="flops"), "the loss that the cost is worth"),
    (partial(Price, math.nan, of="flops"), "a rate is a finite number"),
    (partial(Tolerance, -0.1), "the rise in loss to accept"),
    (partial(Tolerance, True), "a tolerance is a finite number"),
    *((partial(make, 0.5, of="flops", watts=30.0), "watts is for a budget or a price of .energy") for make in GOALS),
    *(
        (partial(make, 0.5, of="energy", example=X), "example is for a budget or a price of .inference")
        for make in GOALS
    ),
]


@pytest.mark.parametrize(("make", "words"), WRONG)
def test_what_is_no_goal_is_refused_in_words(make: Callable[[], object], words: str) -> None:
    """A budget, price or tolerance that cannot be says what was given, and what to write instead."""
    with pytest.raises(BudgetError, match=words):
        make()


def test_a_budget_is_a_value() -> None:
    """Equal budgets are equal, hash alike, and cannot be changed."""
    budget = Budget.fraction(0.5, of="flops")
    assert budget == Budget.fraction(0.5, of="flops") and hash(budget) == hash(Budget.fraction(0.5, of="flops"))
    with pytest.raises(AttributeError):
        budget.limit = 0.7  # type: ignore[misc]


def test_how_a_goal_is_measured_is_no_part_of_what_is_asked() -> None:
    """An example may be tensors, which cannot be compared: budgets, prices and tolerances compare without it."""
    example = (torch.ones(2), torch.ones(3))
    for make in GOALS:
        plain, told = make(0.5, of="inference"), make(0.5, of="inference", example=example)
        assert plain == told and hash(plain) == hash(told) and repr(plain) == repr(told)
        assert told.example is example and plain.example is None
        assert make(0.5, of="energy", watts=65) != make(0.5, of="energy", watts=60)
