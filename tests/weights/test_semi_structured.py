"""Semi-structured weights: what may be handed to sparse tensor cores, and that it computes the same there."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from setpoint.errors import DeviceError, GroupError
from setpoint.weights.semi_structured import to_semi_structured, why_dense


def in_pattern(layer: nn.Linear) -> nn.Linear:
    """The layer with two weights of every four at zero."""
    with torch.no_grad():
        layer.weight.unflatten(1, (-1, 4))[..., [0, 3]] = 0.0
    return layer


def test_what_stays_dense_and_why() -> None:
    """Claim: convolutions, dense rows and inputs that do not divide by four stay dense; the pattern does not."""
    assert why_dense(in_pattern(nn.Linear(64, 32))) == ""
    assert "no kernels" in why_dense(nn.Conv2d(8, 8, 1))
    assert "6 inputs do not divide" in why_dense(nn.Linear(6, 2))
    layer = in_pattern(nn.Linear(8, 4))
    with torch.no_grad():
        layer.weight[2] = 1.0
    assert "row 2" in why_dense(layer)


def test_without_sparse_tensor_cores_it_is_an_error_and_nothing_changes() -> None:
    """Claim: on a CPU the error names the hardware that is needed, and the model computes what it did."""
    model, x = nn.Sequential(in_pattern(nn.Linear(64, 32)), nn.ReLU()), torch.randn(4, 64)
    before = model(x)
    with pytest.raises(DeviceError, match=r"compute capability 8.0 .* is on cpu"):
        to_semi_structured(model)
    assert torch.equal(model(x), before) and model[0].weight.requires_grad


def test_a_model_without_such_weights_is_an_error() -> None:
    """Claim: where nothing can be handed over, the error says why for each layer."""
    with pytest.raises(GroupError, match="0: Conv2d has no kernels"):
        to_semi_structured(nn.Sequential(nn.Conv2d(8, 8, 1)))


@pytest.mark.gpu
def test_sparse_tensor_cores_compute_the_same() -> None:
    """Claim: outputs equal those of the dense model to half precision; layers out of the pattern are named."""
    torch.manual_seed(0)
    model = nn.Sequential(in_pattern(nn.Linear(256, 256)), nn.ReLU(), nn.Linear(256, 128)).half().cuda().eval()
    x, dense = torch.randn(64, 256, device="cuda", dtype=torch.half), copy.deepcopy(model)
    left = to_semi_structured(model)
    assert set(left) == {"2"}
    with torch.no_grad():
        torch.testing.assert_close(model(x), dense(x), rtol=1e-2, atol=1e-2)
