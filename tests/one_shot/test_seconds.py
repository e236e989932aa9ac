"""A trained model is cut at once to seconds in a runtime: by a fit to copies, and by a reading of what it chooses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import setpoint
from runtimes.clock import Clock, linears, straight
from setpoint.errors import BudgetError, RuntimeUnavailable


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 4))


def data() -> list[Any]:
    return [torch.randn(64, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]


def bent(model: nn.Module) -> float:
    """Seconds that no line of FLOPs and bytes has."""
    return 1e-4 + 1e-7 * sum(float(m.out_features**1.6 * m.in_features**0.7) for m in linears(model))


@pytest.mark.parametrize("share", [0.8, 0.5])
@pytest.mark.parametrize("law", [straight, bent])
def test_the_cut_model_is_within_its_seconds(law: Callable[[nn.Module], float], share: float) -> None:
    """Claim: the cut model takes its share of the dense seconds, never more and at most 5 % less, and the summary has
    what the runtime shows; one sample is timed.
    """
    model, clock = net(), Clock(law)
    dense = law(model)
    found = setpoint.compress(model, data(), setpoint.Budget.fraction(share, of="inference", runtime=clock))
    assert 0.95 * share <= law(model) / dense <= share
    assert found.after["inference"] == pytest.approx(law(model))
    assert found.before["inference"] == pytest.approx(dense)
    assert (found.resource, found.runtime, set(clock.batches)) == ("inference", "clock", {1})
    assert " spent in clock, of " in str(found)


def test_a_budget_that_is_met_changes_nothing() -> None:
    """Claim: more seconds than the dense model takes cut nothing."""
    found = setpoint.compress(net(), data(), setpoint.Budget.total(9e-3, of="inference", runtime=Clock(straight)))
    assert found.widths == found.dense_widths


def test_a_budget_that_is_missed_leaves_the_model_as_it_was() -> None:
    """Claim: where the chosen widths take more than the fit says, it is an error, and nothing is cut."""
    read = list[float]()

    def slow_at_last(model: nn.Module) -> float:
        read.append(straight(model))
        return read[-1] if len(read) <= first else 0.9 * straight(net())

    def cut(model: nn.Module) -> None:
        budget = setpoint.Budget.fraction(0.6, of="inference", runtime=Clock(slow_at_last))
        setpoint.compress(model, data(), budget)

    first = 1000
    cut(net())
    first = read.index(read[-1])  # the trial, the dense model and the copies come before the cut model
    read.clear()
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(BudgetError, match="in clock was missed by 4 cuts in turn: the last takes"):
        cut(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_what_cannot_be_done_is_said_before_the_data_are_read() -> None:
    """Claim: a runtime that does not load and a text that names none are errors before any work."""

    class Unread:
        def __iter__(self) -> Any:
            raise AssertionError("data are read")

    failing = setpoint.Budget.fraction(0.5, of="inference", runtime=Clock(straight, fails_after=0))
    with pytest.raises(RuntimeUnavailable, match="lacks the op"):
        setpoint.compress(net(), Unread(), failing)
    with pytest.raises(BudgetError, match="unknown resource .onxruntime."):
        setpoint.compress(net(), Unread(), {"onxruntime": "8 ms"})
    with pytest.raises(BudgetError, match=r"cannot be reached.*Ask for at least"):
        setpoint.compress(net(), data(), setpoint.Budget.total(0.5e-3, of="inference", runtime=Clock(straight)))
