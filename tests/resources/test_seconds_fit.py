"""Seconds as three coefficients: found again from steps in closed form, and close on real ones."""

from __future__ import annotations

import time
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import setpoint
from setpoint.cost.cost import Cost, ProductCost, Term, flops_cost
from setpoint.groups.group import Size
from setpoint.groups.trace import trace
from setpoint.resources import costing
from setpoint.resources.fit import combined, fit_seconds
from setpoint.resources.replica import replica

A, B = Size(0, (("a", 1),)), Size(0, (("b", 1),))
FLOPS = ProductCost("flops", (Term(6.0, (A, B)), Term(96.0, (A,)), Term(24.0, (B,))))
BYTES = ProductCost("bytes", (Term(40.0, (A,)), Term(8.0, (A, B)), Term(4000.0, ())))
VECTORS = [{"a": 64, "b": 80}, {"a": 48, "b": 40}, {"a": 30, "b": 20}, {"a": 12, "b": 24}, {"a": 1, "b": 1}]
POSITIVE = st.floats(0.01, 10.0)


@given(constant=POSITIVE, per_flop=POSITIVE, per_byte=POSITIVE)
def test_the_fit_finds_its_coefficients(constant: float, per_flop: float, per_byte: float) -> None:
    """Steps made by three coefficients of very different sizes are foretold at other widths."""
    true = combined("latency", ((1e-9 * per_flop, FLOPS), (1e-10 * per_byte, BYTES)), 1e-4 * constant)
    fit = fit_seconds("latency", (FLOPS, BYTES), [(widths, true.total(widths)) for widths in VECTORS])
    assert isinstance(fit, Cost) and fit.resource == "latency"
    for widths in ({"a": 55, "b": 9}, {"a": 3, "b": 77}):
        assert fit.total(widths) == pytest.approx(true.total(widths), rel=1e-6)
        fewer = {**widths, "a": widths["a"] - 2}
        assert fit.saving(widths, "a", 2) == pytest.approx(fit.total(widths) - fit.total(fewer))


@given(st.lists(st.floats(1e-4, 10.0), min_size=1, max_size=5))
def test_no_coefficient_is_negative(seconds: list[float]) -> None:
    """Whatever a busy clock says, fewer units never cost more, and the cost is above zero."""
    fit = fit_seconds("latency", (FLOPS, BYTES), list(zip(VECTORS, seconds, strict=False)))
    assert all(term.coefficient >= 0 for term in fit.terms) and fit.total(VECTORS[0]) > 0


@pytest.mark.parametrize(("seconds", "steps"), [((3.0, 2.0), 1), ((0.25, 0.125), 5)])
def test_a_slow_step_is_timed_once(seconds: tuple[float, float], steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step at a shape takes longer, and is left out where steps are quick; where they are slow it is all."""
    made = list[float]()

    class Slow:
        def step(self) -> None:
            made.append(seconds[bool(made)])

    monkeypatch.setattr(time, "perf_counter", lambda: sum(made))
    found = costing._timed_step(Slow(), torch.device("cpu"), None)  # type: ignore[arg-type]
    assert found == (pytest.approx(seconds[steps > 1]), None) and len(made) == steps


def test_steps_of_copies_are_noted_at_their_widths() -> None:
    """Each step that a copy makes is noted, the one that makes its optimizer's state included; without data none is."""
    model, x = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)), torch.randn(4, 8)
    optimizer, groups = torch.optim.AdamW(model.parameters()), trace(model, (x,)).groups
    for data, noted in ((True, [{"0": 32}, {"0": 32}, {"0": 16}]), (False, [])):
        steps = list[dict[str, int]]()
        with replica(model, (optimizer,), (x,), groups, steps, {"0": 32}, data=data) as copy:
            copy.step()
            copy.narrow({"0": 16})
            copy.step()
        assert steps == noted


def test_a_run_pays_for_what_it_learns_on_copies() -> None:
    """The overhead of a budget of memory holds the steps that are made on copies; one of FLOPs makes none."""

    def overhead(budget: str) -> float:
        model, x = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 4)), torch.randn(32, 64)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        summary = setpoint.attach(model, optimizer, budget, total_steps=40, example=(x,)).finish()
        return summary.overhead_flops / summary.dense_flops

    assert overhead("60% flops") < 1 and overhead("60% memory") > 1.5


def test_bytes_are_those_of_all_storages() -> None:
    """The bytes of a step follow the widths as products, and hold weights, moments and what the step makes."""
    model, x = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4)), torch.randn(32, 16)
    optimizer, found = torch.optim.AdamW(model.parameters()), trace(model, (x,))
    make = partial(replica, model, (optimizer,), (x,), found.groups, [])
    moved = ProductCost("bytes", costing.record(make, found.groups).storages)
    weights = sum(parameter.numel() for parameter in model.parameters())
    assert moved.total({"0": 64}) > 4 * 4 * weights  # weights, gradients, two moments
    assert moved.saving({"0": 64}, "0", 32) == pytest.approx(moved.total({"0": 64}) - moved.total({"0": 32}))
    assert flops_cost(found).total({"0": 64}) > 0
