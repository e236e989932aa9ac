from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from setpoint.actuator.optimizer_state import cut_state, moments_of
from setpoint.errors import OptimizerError


class Pair(NamedTuple):
    first: torch.Tensor
    second: float


def with_state(**state: object) -> tuple[torch.optim.Optimizer, nn.Parameter]:
    parameter = nn.Parameter(torch.zeros(3, 2))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    optimizer.state[parameter] = state
    return optimizer, parameter


def test_nested_state_is_cut_and_everything_else_stays() -> None:
    """Claim: tensors of the parameter's shape are cut in lists, dicts and named tuples; scalars and None stay."""
    moment = torch.arange(6.0).reshape(3, 2)
    step = torch.tensor(4.0)
    optimizer, parameter = with_state(
        a=[moment, None], b={"c": Pair(moment, 0.5)}, step=step, one=torch.ones(1), d=None
    )
    state = cut_state(optimizer, parameter, {0: np.array([0, 2])}, "w")
    assert state["a"][0].tolist() == [[0, 1], [4, 5]]
    assert state["a"][1] is None and state["d"] is None
    assert isinstance(state["b"]["c"], Pair) and state["b"]["c"].first.shape == (2, 2)
    assert state["step"] is step and state["one"].shape == (1,)
    assert optimizer.state[parameter]["a"][0] is moment and moment.shape == (3, 2)


def test_state_of_another_shape_is_named() -> None:
    """Claim: the error names the optimizer, the entry, both shapes and the parameter."""
    optimizer, parameter = with_state(rows=[torch.zeros(3, 1)])
    with pytest.raises(
        OptimizerError, match=r"SGD keeps state\['rows\[0\]'\] of shape \(3, 1\) for w of shape \(3, 2\)"
    ):
        cut_state(optimizer, parameter, {0: np.array([0])}, "w")


def test_only_tensors_of_the_parameters_shape_are_moments() -> None:
    """Claim: step counters and factors are not."""
    optimizer, parameter = with_state(moment=torch.ones(3, 2), step=torch.tensor(1.0), rows=torch.ones(3, 1))
    assert [part for part, _ in moments_of(optimizer, parameter)] == ["moment"]
