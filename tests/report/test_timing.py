"""Timing: what cut copies take before any training, as numbers that a clock of a known law shows."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from runtimes.clock import Clock, straight
from setpoint.errors import GroupError, RuntimeUnavailable
from setpoint.report.timing import time_cuts
from setpoint.runtimes import Forward

EXAMPLE = (torch.zeros(1, 16),)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 4))


@dataclass
class Quantising(Clock):
    """A clock that is four times as fast in int8."""

    int8: bool = False

    def load(self, model: nn.Module, example: Any) -> Forward:
        forward = super().load(model, example)
        return lambda: forward() / (4 if self.int8 else 1)


def test_cut_copies_take_what_their_widths_cost() -> None:
    """Claim: shares are of the dense model's seconds as floats; the constant part is what the clock has; the model
    stays as it is.
    """
    model = net()
    before, dense = copy.deepcopy(model.state_dict()), straight(model)
    found = time_cuts(model, EXAMPLE, Quantising(straight))
    assert [timed.name for timed in found.models] == ["dense", *["cut"] * 4]
    for timed, asked in zip(found.models, (1.0, 0.75, 0.5, 0.4, 0.25), strict=True):
        assert timed.floats is not None and timed.int8 is not None
        assert 0.8 * asked < timed.flops <= asked
        assert timed.floats.seconds == pytest.approx(timed.floats.share * dense)
        assert timed.int8.share == pytest.approx(timed.floats.share / 4)
        assert timed.floats.share == pytest.approx((1e-3 + (dense - 1e-3) * timed.flops) / dense, abs=0.02)
    line = found.line()
    assert line is not None and line[0] == pytest.approx(1e-3 / dense, abs=0.02)
    assert str(found).splitlines()[-3].startswith("constant part: 3")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_int8_that_fails_is_left_out_and_said() -> None:
    """Claim: where quantising fails the floats are shown, with the reason."""

    class Failing(Quantising):
        def load(self, model: nn.Module, example: Any) -> Forward:
            if self.int8:
                raise RuntimeUnavailable("needs nncf: pip install nncf")
            return super().load(model, example)

    found = time_cuts(net(), EXAMPLE, Failing(straight))
    assert found.models[0].int8 is None and found.models[1].floats is not None
    assert str(found).endswith("no int8: needs nncf: pip install nncf")


def test_readings_that_disagree_are_no_numbers() -> None:
    """Claim: on a machine where no two readings agree there is no number, and a line says why."""
    found = time_cuts(net(), EXAMPLE, Clock(straight, speed=lambda number: 1.02 ** (number * (number % 2))))
    assert {timed.floats for timed in found.models[1:]} == {None}
    assert str(found).endswith("the machine is busy, no two readings agree; try again on a quiet one")


def test_a_model_without_anything_to_cut_is_refused() -> None:
    """Claim: it is an error that says where to look."""
    with pytest.raises(GroupError, match="setpoint inspect"):
        time_cuts(nn.Linear(16, 4), EXAMPLE, "eager")
